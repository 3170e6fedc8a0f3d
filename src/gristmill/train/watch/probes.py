"""Small fixed questions asked at checkpoints: does the model begin to calculate, to know facts, to complete code?

An answer is right when the model finds it more probable than each wrong one. The sets are small, so the figures are
rough: read the trend, and the standard error beside it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gristmill.errors import DataError, GristmillError
from gristmill.model.attention.packed import PackedAttention, segment_positions
from gristmill.model.transformer import Transformer
from gristmill.tokens.tokenizer import Tokenizer
from gristmill.train.callbacks import Callback, Run
from gristmill.train.precision import Precision

_TOKENS = 2048
"""Tokens of one forward pass, about."""


@dataclass(frozen=True)
class Probe:
    """A text, the right continuation and wrong ones. Raises DataError when nothing is to choose."""

    kind: str
    prompt: str
    answer: str
    wrong: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.prompt or not self.answer or not self.wrong or not all(self.wrong) or self.answer in self.wrong:
            raise DataError(f"probe {self.prompt!r}: needs a prompt, an answer and other, wrong answers")


def arithmetic_probes() -> list[Probe]:
    """Sums and differences of numbers below ten, after two solved ones; wrong answers are near the right one."""
    found = []
    for left, right in ((2, 3), (4, 4), (1, 6), (5, 2), (3, 6), (4, 1), (7, 2), (3, 3)):
        for sign, value in (("+", left + right), ("-", max(left, right) - min(left, right))):
            first, second = (left, right) if sign == "+" else (max(left, right), min(left, right))
            wrong = tuple(f" {value + off}" for off in (-2, -1, 1, 2) if value + off >= 0)
            found.append(Probe("arithmetic", f"1 + 1 = 2\n6 - 1 = 5\n{first} {sign} {second} =", f" {value}", wrong))
    return found


def fact_probes() -> list[Probe]:
    """Facts that any encyclopedia has, each with wrong answers of its kind."""
    capitals = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Germany": "Berlin", "Egypt": "Cairo"}
    colours = {"grass": "green", "snow": "white", "blood": "red", "coal": "black"}
    others = {
        "A triangle has this many sides:": ("three", "four", "five", "six"),
        "The planet on which we live is called": ("Earth", "Mars", "Venus", "Jupiter"),
        "Water is made of hydrogen and": ("oxygen", "iron", "gold", "carbon"),
        "The first month of the year is": ("January", "March", "July", "October"),
        "The opposite of hot is": ("cold", "tall", "old", "loud"),
        "The largest animal that lives in the sea is the": ("whale", "dog", "horse", "bird"),
        "Romeo and Juliet was written by William": ("Shakespeare", "Newton", "Darwin", "Mozart"),
    }
    asked = [(f"The capital of {country} is", city, tuple(capitals.values())) for country, city in capitals.items()]
    asked += [(f"The colour of {thing} is", colour, tuple(colours.values())) for thing, colour in colours.items()]
    asked += [(prompt, options[0], options) for prompt, options in others.items()]
    return [
        Probe("facts", prompt, f" {answer}", tuple(f" {option}" for option in options if option != answer))
        for prompt, answer, options in asked
    ]


def code_probes() -> list[Probe]:
    """The next piece of short Python programs."""
    return [
        Probe("code", prompt, answer, wrong)
        for prompt, answer, wrong in (
            ("def add(a, b):\n    return a", " + b", (" - b", " * b", " / b")),
            ("def is_even(n):\n    return n %", " 2 == 0", (" 3 == 0", " 2 == 1", " 5 == 0")),
            ("for i in", " range(10):", (" return 10:", " import 10:", " def 10:")),
            ("import numpy as", " np", (" pd", " os", " re")),
            ("items = []\nfor x in range(3):\n    items.", "append(x)", ("import(x)", "return(x)", "lambda(x)")),
            ("if x > 0:\n    sign = 1\nelse:\n    sign =", " -1", (" 1", " 2", " 10")),
            ("with open(path) as handle:\n    text = handle.", "read()", ("append()", "keys()", "sort()")),
            ("def square(x):\n    return x *", " x", (" y", " 0", " 3")),
            ("class Dog:\n    def __init__(", "self, name):", ("return, name):", "import, name):", "0, name):")),
            ('names = {"a": 1}\nfor key, value in names.', "items():", ("append():", "read():", "upper():")),
            ("try:\n    run()\n", "except ValueError:", ("import ValueError:", "while ValueError:", "def ValueError:")),
            ("total = 0\nfor n in numbers:\n    total +=", " n", (" numbers", " total", " for")),
        )
    ]


def all_probes() -> list[Probe]:
    """The three sets."""
    return arithmetic_probes() + fact_probes() + code_probes()


def score_probes(model: Transformer, tokenizer: Tokenizer, probes: Sequence[Probe]) -> dict[str, dict[str, float]]:
    """By kind: `right`, share of the probes whose answer has a greater summed log-probability than each wrong one;
    `exact`, share whose answer is what greedy decoding writes; `chance`, `right` of a guesser; `standard_error` of
    `right`, and `samples`.

    The model is left in the mode it was in. Raises DataError for a probe longer than the model's context, and for a
    text without a token.
    """
    options = [(probe, text) for probe in probes for text in (probe.answer, *probe.wrong)]
    pairs = [(tokenizer.encode(probe.prompt), tokenizer.encode(text, add_bos=False)) for probe, text in options]
    for (probe, text), (prompt, answer) in zip(options, pairs, strict=True):
        if not prompt or not answer or len(prompt) + len(answer) - 1 > model.config.context:
            raise DataError(
                f"probe {probe.prompt!r} with {text!r}: {len(prompt)} and {len(answer)} tokens; each must have one at "
                f"least, and both fit the context of {model.config.context}"
            )
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            scores = iter([score for batch in _batches(pairs) for score in _continuations(model, batch)])
    finally:
        model.train(training)
    outcomes: dict[str, list[tuple[bool, bool, float]]] = defaultdict(list)
    for probe in probes:
        (right, exact), *wrong = (next(scores) for _ in range(1 + len(probe.wrong)))
        outcomes[probe.kind].append((right > max(value for value, _ in wrong), exact, 1 / (1 + len(wrong))))
    return {kind: _summary(found) for kind, found in outcomes.items()}


class ProbeTasks(Callback):
    """Records `probes`, see `score_probes`, at the steps that write checkpoints.

    Asks the averaged weights where the run keeps an average. Raises GristmillError for a model that is not a decoder.
    """

    def __init__(self, tokenizer: Tokenizer, probes: Sequence[Probe] | None = None) -> None:
        self.tokenizer, self.probes = tokenizer, all_probes() if probes is None else list(probes)

    def start(self, run: Run) -> None:
        """Refuse what cannot be asked."""
        if not isinstance(run.model, Transformer):
            raise GristmillError(f"probes ask a decoder to go on with a text; {type(run.model).__name__} is none")

    def after_step(self, run: Run) -> None:
        """Ask all probes at a checkpoint."""
        step, config = run.position.step, run.config
        if not (step % config.checkpoint_every == 0 or run.stopped or config.is_over(step, run.position.tokens)):
            return
        assert isinstance(run.model, Transformer)
        with Precision(config.precision, run.world.device).forward(run.world.device):
            if run.average is None:
                run.record["probes"] = score_probes(run.model, self.tokenizer, self.probes)
            else:
                with run.average.swapped_in(run.model):
                    run.record["probes"] = score_probes(run.model, self.tokenizer, self.probes)


def _summary(found: Sequence[tuple[bool, bool, float]]) -> dict[str, Any]:
    number = len(found)
    right = sum(item[0] for item in found) / number
    return {
        "right": right,
        "exact": sum(item[1] for item in found) / number,
        "chance": sum(item[2] for item in found) / number,
        "standard_error": math.sqrt(right * (1 - right) / number),
        "samples": number,
    }


def _batches(pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[list[tuple[list[int], list[int]]]]:
    """The pairs in order, so many at once as fit a forward pass."""
    batch: list[tuple[list[int], list[int]]] = []
    tokens = 0
    for prompt, answer in pairs:
        if batch and tokens + len(prompt) + len(answer) > _TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append((prompt, answer))
        tokens += len(prompt) + len(answer)
    if batch:
        yield batch


def _continuations(model: Transformer, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """Summed log-probability of each answer after its prompt, and whether every token of it is the most probable."""
    device = model.embed_tokens.weight.device
    # the last token of an answer predicts nothing
    segments = [(prompt + answer)[:-1] for prompt, answer in pairs]
    lengths = [len(segment) for segment in segments]
    ids = torch.tensor([token for segment in segments for token in segment], device=device)
    hidden = model.hidden_states(ids, segment_positions(lengths, device), PackedAttention(lengths, device))
    rows: list[Tensor] = []
    for part, (_, answer) in zip(hidden.split(lengths), pairs, strict=True):
        rows.append(part[-len(answer) :])
    sizes = [len(answer) for _, answer in pairs]
    targets = torch.tensor([token for _, answer in pairs for token in answer], device=device)
    logits = model.logits(torch.cat(rows)).float()
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None]).squeeze(1)
    greedy = logits.argmax(dim=-1) == targets
    return [
        (float(part.sum()), bool(hit.all()))
        for part, hit in zip(logprobs.split(sizes), greedy.split(sizes), strict=True)
    ]

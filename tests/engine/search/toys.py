"""Toy next-token models: tables that the right answer can be read from."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from gristmill.engine.search.model import Hypothesis


@dataclass(frozen=True, eq=False)
class Row:
    token_ids: tuple[int, ...]
    logprobs: torch.Tensor
    hidden: torch.Tensor | None
    prompt: tuple[int, ...]


class Toy:
    """Distributions from a function of the output so far. Knows which hypotheses are alive and what it was asked."""

    def __init__(
        self,
        chances: Callable[[tuple[int, ...]], Sequence[float]],
        vocab_size: int,
        end_ids: Iterable[int],
        hidden: Callable[[tuple[int, ...]], Sequence[float]] | None = None,
    ) -> None:
        self.chances, self.vocab_size, self.end_ids = chances, vocab_size, frozenset(end_ids)
        self.states = hidden
        self.live: set[Row] = set()
        self.forwards = self.rows = 0
        self.ends_are_final = True

    def start(self, prompt_ids: Sequence[int]) -> Row:
        self.forwards += 1
        return self._make(tuple(prompt_ids), ())

    def extend(self, choices: Sequence[tuple[Hypothesis, int]]) -> list[Hypothesis]:
        assert choices, "a forward of nothing"
        self.forwards += 1
        made: list[Hypothesis] = []
        for parent, token in choices:
            assert isinstance(parent, Row)
            assert parent in self.live, "a freed hypothesis was extended"
            assert not (self.ends_are_final and token in self.end_ids), "a complete output was extended"
            assert parent.logprobs[token] > -math.inf, "an impossible token was chosen"
            made.append(self._make(parent.prompt, (*parent.token_ids, token)))
        return made

    def free(self, hypotheses: Iterable[Hypothesis]) -> None:
        for hypothesis in hypotheses:
            assert isinstance(hypothesis, Row)
            self.live.remove(hypothesis)

    def _make(self, prompt: tuple[int, ...], ids: tuple[int, ...]) -> Row:
        self.rows += 1
        logprobs = torch.tensor(self.chances(ids), dtype=torch.float64).log().float()
        hidden = None
        if self.states is not None:
            seen = [(*prompt, *ids)[: i + 1] for i in range(len(prompt) + len(ids))]
            hidden = torch.tensor([self.states(s) for s in (seen if not ids else seen[-1:])])
        made = Row(ids, logprobs, hidden, prompt)
        self.live.add(made)
        return made

    def logprob(self, ids: Sequence[int]) -> float:
        """Log-probability of an output, token by token from the table."""
        return sum(math.log(self.chances(tuple(ids[:i]))[token]) for i, token in enumerate(ids))


def table(rows: Mapping[tuple[int, ...], Sequence[float]], vocab_size: int, end: int) -> Toy:
    """A toy from a table; after an output that has no row it ends."""
    over = [float(token == end) for token in range(vocab_size)]
    return Toy(lambda ids: rows.get(ids, over), vocab_size, [end])


def random_toy(vocab_size: int, seed: int, *, ends: int = 1, sharpness: float = 1.0) -> Toy:
    """Random distributions, one for each output; the last tokens of the vocabulary end."""

    @functools.cache
    def chances(ids: tuple[int, ...]) -> list[float]:
        number = seed
        for token in ids:
            number = (number * 31 + token + 7) % (1 << 31)
        generator = torch.Generator().manual_seed(number)
        logits = torch.randn(vocab_size, generator=generator, dtype=torch.float64) * sharpness
        chosen: list[float] = logits.softmax(-1).tolist()
        return chosen

    return Toy(chances, vocab_size, range(vocab_size - ends, vocab_size))


A, B, X, Y, END = range(5)
"""Tokens of the worked example in which greedy search misses the best output."""


def garden_path() -> Toy:
    """Pr(a) .6, Pr(b) .4; after a: x .55, y .45; after b: x .9, y .1; then the end: bx .36 beats ax .33."""
    return table(
        {(): [0.6, 0.4, 0, 0, 0], (A,): [0, 0, 0.55, 0.45, 0], (B,): [0, 0, 0.9, 0.1, 0]}, vocab_size=5, end=END
    )

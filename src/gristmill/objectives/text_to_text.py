"""Every task as text in, text out: one model, one loss, and numbers and labels are words too.

Source: Raffel et al. 2020 (T5), section 2.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gristmill.errors import DataError
from gristmill.objectives.sequence_pair import Framing, Pair, PairObjective
from gristmill.tokens.tokenizer import Tokenizer

_BEGIN, _ARROW = "[CLS] ", " -> <s> "


@dataclass(frozen=True)
class TextPair:
    """A sample: `source` is the instruction with its input, `target` the response."""

    source: str
    target: str


def serialise(sample: TextPair) -> str:
    """`[CLS] source -> <s> target`. Raises DataError for a source that spells the arrow: it could not be read back."""
    if _ARROW in sample.source + _ARROW[:-1]:
        raise DataError(f"the source spells {_ARROW!r}, which parts it from the target; reword it: {sample.source!r}")
    return f"{_BEGIN}{sample.source}{_ARROW}{sample.target}"


def parse(line: str) -> TextPair:
    """The sample of a serialised line. Raises DataError, showing the line, for anything else."""
    source, arrow, target = line.removeprefix(_BEGIN).partition(_ARROW)
    if not line.startswith(_BEGIN) or not arrow:
        raise DataError(f"expected {_BEGIN}source{_ARROW}target, got {line!r}")
    return TextPair(source, target)


def translation(text: str, translated: str, *, source: str, target: str) -> TextPair:
    """Translate `text` from the language `source` to `target`."""
    return TextPair(f"Translate from {source} to {target}: {text}", translated)


def question(text: str, answer: str) -> TextPair:
    """Answer a question."""
    return TextPair(f"Answer: {text}", answer)


def simplification(text: str, simpler: str) -> TextPair:
    """Say it more simply."""
    return TextPair(f"Simplify: {text}", simpler)


def translation_score(text: str, translated: str, score: float, *, source: str, target: str) -> TextPair:
    """Judge a translation; the score is written out as text."""
    if not math.isfinite(score):
        raise DataError(f"score must be a finite number, got {score}")
    task = f"Score the translation from {source} to {target}. {source}: {text} {target}: {translated}"
    return TextPair(task, str(score))


def classification(task: str, text: str, label: str) -> TextPair:
    """Name the label of a text; `task` is the name of the task, as in `sentiment`."""
    return TextPair(f"{task}: {text}", label)


@dataclass(frozen=True)
class ScoreReport:
    """Numbers read from answers, in order: None where an answer is no number; `unread` are those answers by index."""

    values: tuple[float | None, ...]
    unread: dict[int, str]

    @property
    def read_share(self) -> float:
        """Share of the answers that are numbers."""
        return 1 - len(self.unread) / max(1, len(self.values))


def read_scores(answers: Sequence[str]) -> ScoreReport:
    """Read answers as numbers. What is not a finite number is reported, never guessed."""
    values = [_number(answer) for answer in answers]
    unread = {i: answer for i, (answer, value) in enumerate(zip(answers, values, strict=True)) if value is None}
    return ScoreReport(tuple(values), unread)


class TextToText(PairObjective):
    """Pairs of texts as examples. Raises DataError for a text without tokens or one that spells a special token."""

    def __init__(self, framing: Framing, tokenizer: Tokenizer) -> None:
        super().__init__(framing)
        if tokenizer.vocab_size > framing.vocab_size:
            raise DataError(f"the tokenizer knows {tokenizer.vocab_size} tokens, the model {framing.vocab_size}")
        self.tokenizer = tokenizer

    def pair(self, example: TextPair, generator: np.random.Generator) -> Pair:
        """See `PairObjective`."""
        return Pair(self._ids("source", example.source), self._ids("target", example.target), kind="text_to_text")

    def _ids(self, side: str, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_bos=False)
        if not ids:
            raise DataError(f"the {side} of a text pair is empty")
        for token, number in self.tokenizer.special_tokens.items():
            if number in ids:
                raise DataError(f"the {side} spells the special token {token!r}; remove it: {text!r}")
        return ids


def _number(answer: str) -> float | None:
    try:
        value = float(answer)
    except ValueError:
        return None
    return value if math.isfinite(value) else None

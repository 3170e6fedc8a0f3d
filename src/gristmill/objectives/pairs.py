"""Two texts in one sequence, and pairs of neighbouring sentences to tell from others.

Source: Devlin et al. 2018, section 3.1 (next sentence prediction); Lan et al. 2020, section 3.1 (sentence order).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from gristmill.errors import DataError
from gristmill.objectives.single import example_generator
from gristmill.objectives.vocabulary import EncoderVocabulary, Ids

IS_NEXT, NOT_NEXT = 0, 1
"""Labels of next sentence prediction; for sentence order 1 is swapped. Hugging Face counts the same way."""

_DRAWS = 1000


class Framed(NamedTuple):
    """Token ids with their framing, and the segment of each: 0 or 1; both (tokens,) int64."""

    ids: np.ndarray
    token_type_ids: np.ndarray


def pack_single(ids: Ids, vocabulary: EncoderVocabulary) -> Framed:
    """[CLS] ids [SEP]: two tokens more, all of segment 0."""
    vocabulary.require_frame()
    framed = np.array([vocabulary.cls_id, *ids, vocabulary.sep_id], dtype=np.int64)
    return Framed(framed, np.zeros_like(framed))


def pack_pair(first: Ids, second: Ids, vocabulary: EncoderVocabulary) -> Framed:
    """[CLS] first [SEP] second [SEP]: three tokens more; segment 0 goes through the first [SEP]."""
    left, _ = pack_single(first, vocabulary)
    right = np.array([*second, vocabulary.sep_id], dtype=np.int64)
    return Framed(np.concatenate((left, right)), np.repeat([0, 1], [len(left), len(right)]))


@dataclass(frozen=True, eq=False)
class SentencePair:
    """Token ids of two texts, and the class of the pair, None where it has none."""

    first: Ids
    second: Ids
    label: int | None = None


class SentencePairs(Sequence[SentencePair]):
    """Pairs of a corpus for next sentence prediction or sentence order, by number; a pair follows from the seed and
    its number alone.

    documents: each a list of sentences, each a list of token ids. task: "next", where with probability `wrong` the
    second part is of another document (of another place, when there is one document only) and does not begin with the
    sentence that truly follows; "order", where with probability `wrong` the two change places. max_tokens: None pairs
    single sentences; a number fills both parts together with consecutive sentences up to so many tokens, framing not
    counted, and cuts between two at random. A document of one sentence gives no pair, only wrong second parts.

    Raises DataError for an empty sentence, a `wrong` outside [0, 1], two neighbours longer than `max_tokens`, or
    documents without a pair or without a wrong part.
    """

    def __init__(
        self,
        documents: Sequence[Sequence[Ids]],
        *,
        seed: int,
        task: Literal["next", "order"] = "next",
        wrong: float = 0.5,
        max_tokens: int | None = None,
    ) -> None:
        if task not in ("next", "order"):
            raise DataError(f"task must be next or order, got {task!r}")
        if not 0.0 <= wrong <= 1.0:
            raise DataError(f"wrong must be in [0, 1], got {wrong}")
        for document, sentences in enumerate(documents):
            for number, sentence in enumerate(sentences):
                if len(sentence) == 0:
                    raise DataError(f"document {document}, sentence {number} has no tokens")
        self.documents, self.seed, self.task, self.wrong = documents, seed, task, wrong
        self.max_tokens = max_tokens
        self._stretches = [
            (document, *stretch)
            for document, sentences in enumerate(documents)
            for stretch in _stretches(sentences, max_tokens, document)
        ]
        if not self._stretches:
            raise DataError("no document has two sentences: there is no pair to make")
        self._filled = [document for document, sentences in enumerate(documents) if len(sentences)]

    def __len__(self) -> int:
        return len(self._stretches)

    def __getitem__(self, number: int) -> SentencePair:  # type: ignore[override]
        document, start, end = self._stretches[number]
        generator = example_generator((self.seed, number % len(self)))
        middle = int(generator.integers(start + 1, end))
        sentences = self.documents[document]
        first, second = _joined(sentences[start:middle]), _joined(sentences[middle:end])
        if generator.random() >= self.wrong:
            return SentencePair(first, second, IS_NEXT)
        if self.task == "order":
            return SentencePair(second, first, NOT_NEXT)
        room = None if self.max_tokens is None else self.max_tokens - len(first)
        return SentencePair(first, self._other(document, middle, end - middle, room, generator), NOT_NEXT)

    def _other(
        self, document: int, middle: int, count: int, room: int | None, generator: np.random.Generator
    ) -> np.ndarray:
        """Up to `count` consecutive sentences from elsewhere, as many as `room` tokens hold; one without `room`. The
        first does not equal sentence `middle` of the document, the one that truly follows."""
        for _ in range(_DRAWS):
            place = self._filled[int(generator.integers(len(self._filled)))]
            sentences = self.documents[place]
            start = int(generator.integers(len(sentences)))
            if place == document and len(self._filled) > 1:
                continue
            if np.array_equal(sentences[start], self.documents[document][middle]):
                continue
            fitting = 1
            if room is not None:
                sizes = np.cumsum([len(sentence) for sentence in sentences[start : start + count]])
                fitting = int((sizes <= room).sum())
            if fitting:
                return _joined(sentences[start : start + fitting])
        raise DataError(
            f"document {document}: found no text of another place that fits and does not equal what follows sentence "
            f"{middle - 1}"
        )


def _stretches(sentences: Sequence[Ids], max_tokens: int | None, document: int) -> list[tuple[int, int]]:
    """(start, end) of consecutive sentences, at least two, that make a pair. A last sentence that would stay alone
    goes with the one before once more."""
    if max_tokens is None:
        return [(start, start + 2) for start in range(len(sentences) - 1)]
    found, start = [], 0
    while start < len(sentences) and len(sentences) > 1:
        start = min(start, len(sentences) - 2)
        end, size = start, 0
        while end < len(sentences) and size + len(sentences[end]) <= max_tokens:
            size += len(sentences[end])
            end += 1
        if end < start + 2:
            raise DataError(
                f"document {document}: sentences {start} and {start + 1} have more than {max_tokens} tokens together; "
                "cut them or raise max_tokens"
            )
        found.append((start, end))
        start = end
    return found


def _joined(sentences: Sequence[Ids]) -> np.ndarray:
    return np.concatenate([np.asarray(sentence, dtype=np.int64) for sentence in sentences])

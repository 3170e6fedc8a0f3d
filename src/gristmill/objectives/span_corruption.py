"""Span corruption: hidden spans become sentinels in the source, and the target lists what they hid.

`The puppies are [X] outside [Y] .` -> `[X] frolicking [Y] the house [Z]`. Both sides are shorter than the text, so it
trains faster than reconstructing all of it.

Source: Raffel et al. 2020 (T5), section 3.1.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, pairwise, takewhile

import numpy as np

from gristmill.errors import DataError
from gristmill.objectives.sequence_pair import Framing, Pair, PairObjective, require_absent, unmasked
from gristmill.objectives.spans import Span, choose_spans, replace_spans
from gristmill.tokens.tokenizer import Tokenizer


def sentinel_spans(ids: np.ndarray, spans: Sequence[Span], sentinels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Source and target: the i-th span is sentinel i in the source; the target is each sentinel with its span's
    tokens, and the next sentinel to end it. k spans use k sentinels in the source, k + 1 in the target.

    Raises DataError when there are too few sentinels, or one of them stands in the text.
    """
    if len(sentinels) < len(spans) + 1:
        raise DataError(
            f"{len(spans)} spans need {len(spans) + 1} sentinels, there are {len(sentinels)}: "
            "use shorter rows, longer spans or a lower rate, or add sentinels to the vocabulary"
        )
    require_absent(ids, sentinels, "a sentinel")
    source = replace_spans(ids, spans, [[sentinel] for sentinel in sentinels[: len(spans)]])
    target: list[int] = []
    for sentinel, (start, end) in zip(sentinels, spans, strict=False):
        target += [sentinel, *ids[start:end].tolist()]
    return source, np.array([*target, sentinels[len(spans)]], np.int64)


def splice(source: np.ndarray, target: np.ndarray, sentinels: Sequence[int]) -> np.ndarray:
    """The text again: each sentinel of the source replaced by what the target lists after it.

    Raises DataError when the target's sentinels are not those of the source in order and one more.
    """
    at, cuts = np.flatnonzero(np.isin(source, sentinels)), np.flatnonzero(np.isin(target, sentinels))
    wanted = [*source[at].tolist(), sentinels[len(at)]] if len(at) < len(sentinels) else []
    if target[cuts].tolist() != wanted or len(cuts) == 0 or cuts[0] != 0 or cuts[-1] != len(target) - 1:
        raise DataError("the target's sentinels are not those of the source in order, ended by the next one")
    hidden = [target[start + 1 : end] for start, end in pairwise(cuts)]
    return replace_spans(source, [(int(place), int(place) + 1) for place in at], hidden)


def sentinel_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of <extra_id_0>, <extra_id_1>, ... as far as the tokenizer has them. Raises DataError when it has none."""
    names = (tokenizer.id_of(f"<extra_id_{number}>") for number in count())
    found = tuple(takewhile(lambda index: index is not None, names))
    if not found:
        raise DataError("the tokenizer has no sentinels: add special tokens <extra_id_0>, <extra_id_1>, ...")
    return found  # type: ignore[return-value]


class SpanCorruption(PairObjective):
    """`rate` of the tokens is hidden in spans of `mean_length` tokens on average and `max_length` at most.

    `sentinels` are token ids in the order of use. Raises DataError as `sentinel_spans` and `choose_spans` do.
    """

    def __init__(
        self,
        framing: Framing,
        sentinels: Sequence[int],
        *,
        rate: float = 0.15,
        mean_length: float = 3.0,
        max_length: int | None = None,
    ) -> None:
        super().__init__(framing)
        check_span_options(rate, mean_length, max_length)
        self.sentinels, self.rate = tuple(sentinels), rate
        self.mean_length, self.max_length = mean_length, max_length

    @property
    def extra_tokens(self) -> int:
        """The frame, and the target's last sentinel: spans are apart, so the others replace tokens."""
        return self.framing.extra_tokens + 2

    def pair(self, example: object, generator: np.random.Generator) -> Pair:
        """See `PairObjective`; the example is a segment (ids, None)."""
        ids = unmasked(example, "span corruption")
        spans = choose_spans(generator, len(ids), self.rate, self.mean_length, self.max_length)
        source, target = sentinel_spans(ids, spans, self.sentinels)
        return Pair(source, target, kind="span_corruption")


def check_span_options(rate: float, mean_length: float, max_length: int | None) -> None:
    """Raise DataError, naming the option, for a value out of range."""
    if not 0.0 < rate < 1.0:
        raise DataError(f"rate must be in (0, 1), got {rate}")
    if not mean_length >= 1.0:
        raise DataError(f"mean_length must be at least 1, got {mean_length}")
    if max_length is not None and max_length < mean_length:
        raise DataError(f"max_length must be at least mean_length ({mean_length}), got {max_length}")

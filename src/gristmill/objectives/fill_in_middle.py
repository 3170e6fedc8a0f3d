"""Fill in the middle: a left-to-right model learns to infill, because the middle of a text is moved to its end.

Source: Bavarian et al. 2022, section 3; the form in which the suffix comes first is their second variant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gristmill.errors import DataError
from gristmill.objectives.causal import CausalLM
from gristmill.objectives.sequence_pair import require_absent, unmasked
from gristmill.objectives.single import example_generator
from gristmill.tokens.batch import PackedBatch, Segment

Order = Literal["psm", "spm"]
"""prefix-suffix-middle, or suffix-prefix-middle."""


@dataclass(frozen=True)
class MiddleTokens:
    """Ids of the marks before the prefix, the suffix and the middle, and of the end of the text."""

    prefix: int
    suffix: int
    middle: int
    end: int

    @property
    def ids(self) -> tuple[int, ...]:
        """All four."""
        return self.prefix, self.suffix, self.middle, self.end


def move_middle(ids: np.ndarray, begin: int, stop: int, order: Order, marks: MiddleTokens) -> np.ndarray:
    """ids[begin:stop] moved to the end, with marks and the end token.

    psm: PRE prefix SUF suffix MID middle END; spm: PRE SUF suffix MID prefix middle END, so that the middle follows
    the prefix without a break. Raises DataError for a cut outside the text, or a mark that stands in it.
    """
    if not 0 <= begin <= stop <= len(ids):
        raise DataError(f"the middle {begin}:{stop} does not lie in a text of {len(ids)} tokens")
    require_absent(ids, marks.ids, "marks of infilling")
    prefix, middle, suffix = ids[:begin], ids[begin:stop], ids[stop:]
    if order == "psm":
        parts = [[marks.prefix], prefix, [marks.suffix], suffix, [marks.middle], middle]
    else:
        parts = [[marks.prefix, marks.suffix], suffix, [marks.middle], prefix, middle]
    return np.concatenate([*parts, [marks.end]]).astype(np.int64)


def infill_prompt(prefix: Sequence[int], suffix: Sequence[int], order: Order, marks: MiddleTokens) -> list[int]:
    """What a trained model continues with the middle and the end token."""
    if order == "psm":
        return [marks.prefix, *prefix, marks.suffix, *suffix, marks.middle]
    return [marks.prefix, marks.suffix, *suffix, marks.middle, *prefix]


class FillInMiddle(CausalLM):
    """Causal language modelling in which `rate` of the texts have their middle moved, `spm_share` of these as spm.

    Both cuts are uniform over the token boundaries of a text; all tokens are learned, marks too. A text's own end
    token comes after the middle; one without (a piece of a longer text) gets it when its middle is moved.
    """

    extra_tokens = 4

    def __init__(self, marks: MiddleTokens, *, rate: float = 0.9, spm_share: float = 0.5) -> None:
        for name, value in (("rate", rate), ("spm_share", spm_share)):
            if not 0.0 <= value <= 1.0:
                raise DataError(f"{name} must be in [0, 1], got {value}")
        self.marks, self.rate, self.spm_share = marks, rate, spm_share

    def prepare(self, examples: Sequence[Segment], keys: Sequence[tuple[int, ...]]) -> PackedBatch:
        """See `Objective`; examples are segments (ids, None)."""
        made = zip(examples, keys, strict=True)
        return PackedBatch.from_segments([(self._text(example, example_generator(key)), None) for example, key in made])

    def _text(self, example: Segment, generator: np.random.Generator) -> np.ndarray:
        ids = unmasked(example, "filling in the middle")
        moved, order = generator.random() < self.rate, generator.random() < self.spm_share
        body = ids[:-1] if ids[-1] == self.marks.end else ids
        require_absent(body, self.marks.ids, "marks of infilling")
        begin, stop = sorted(generator.integers(len(body) + 1, size=2).tolist())
        return move_middle(body, begin, stop, "spm" if order else "psm", self.marks) if moved else ids

"""UL2's mixture of denoisers: regular and extreme span corruption and prefix language modelling, each announced by a
mode token at the head of the source.

Source: Tay et al. 2022, section 3.1, table 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from gristmill.errors import DataError
from gristmill.objectives.sequence_pair import Framing, Pair, PairObjective, unmasked
from gristmill.objectives.span_corruption import check_span_options, sentinel_spans
from gristmill.objectives.spans import Span, choose_spans, share

Mode = Literal["R", "S", "X"]
"""Regular, sequential, extreme."""


@dataclass(frozen=True)
class Denoiser:
    """`rate` of the tokens is hidden in spans of `mean_length` on average; None: as one span at the end."""

    mode: Mode
    rate: float
    mean_length: float | None
    weight: float = 1.0

    def spans(self, generator: np.random.Generator, length: int) -> list[Span]:
        """What to hide of `length` tokens."""
        if self.mean_length is None:
            return [(length - share(self.rate, length), length)]
        return choose_spans(generator, length, self.rate, self.mean_length)


DENOISERS = (
    Denoiser("R", 0.15, 3),
    Denoiser("R", 0.15, 8),
    Denoiser("S", 0.25, None),
    Denoiser("X", 0.50, 3),
    Denoiser("X", 0.50, 8),
    Denoiser("X", 0.15, 64),
    Denoiser("X", 0.50, 64),
)
"""The published seven, in equal parts."""


class UL2(PairObjective):
    """Each text draws one denoiser by weight; the pair's `kind` is its mode.

    `modes` are the ids of the three mode tokens. A sequential one predicts the rest of the text as it is, the others
    as `span_corruption` does. Raises DataError for a missing mode, weights without a sum or options out of range.
    """

    def __init__(
        self,
        framing: Framing,
        sentinels: Sequence[int],
        modes: Mapping[Mode, int],
        denoisers: Sequence[Denoiser] = DENOISERS,
    ) -> None:
        super().__init__(framing)
        missing = [mode for mode in get_args(Mode) if mode not in modes]
        if missing:
            raise DataError(f"modes lacks the token of {', '.join(missing)}")
        weights = np.array([denoiser.weight for denoiser in denoisers], float)
        if len(weights) == 0 or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
            raise DataError("denoisers need weights of 0 or more with a sum above 0")
        for denoiser in denoisers:
            check_span_options(denoiser.rate, denoiser.mean_length or 1.0, None)
        self.sentinels, self.modes, self.denoisers = tuple(sentinels), dict(modes), tuple(denoisers)
        self._shares = weights / weights.sum()

    @property
    def extra_tokens(self) -> int:
        """The frame, the mode, and a target's last sentinel."""
        return self.framing.extra_tokens + 2

    def pair(self, example: object, generator: np.random.Generator) -> Pair:
        """See `PairObjective`; the example is a segment (ids, None)."""
        ids = unmasked(example, "UL2")
        denoiser = self.denoisers[int(generator.choice(len(self.denoisers), p=self._shares))]
        spans = denoiser.spans(generator, len(ids))
        if denoiser.mean_length is None:
            source, target = ids[: spans[0][0]], ids[spans[0][0] :]
        else:
            source, target = sentinel_spans(ids, spans, self.sentinels)
        return Pair(np.concatenate(([self.modes[denoiser.mode]], source)), target, kind=denoiser.mode)

"""Denoising autoencoding: the encoder reads a noisy text, the decoder predicts all of the clean one.

Each example draws one entry of a mixture of noises, and its pair says which.

Source: Lewis et al. 2020 (BART), section 2.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gristmill.errors import DataError
from gristmill.objectives.noising import Noise, NoiseOptions, add_noise
from gristmill.objectives.sequence_pair import Framing, Pair, PairObjective, require_absent, unmasked

Noises = Noise | tuple[Noise, ...]
"""One noise, or several that are applied one after the other."""

BART: Mapping[Noises, float] = {("sentence_permutation", "text_infilling"): 1.0}
"""What the published model was trained with: both noises on every text."""


class Denoising(PairObjective):
    """Full reconstruction of texts under noises drawn with `mixture`'s weights.

    A pair's `kind` is its noises, joined by "+". Raises DataError for a mixture without weight, an unknown noise, or
    one whose option is missing.
    """

    def __init__(self, framing: Framing, mixture: Mapping[Noises, float], options: NoiseOptions) -> None:
        super().__init__(framing)
        self.options = options
        self.choices = [noise if isinstance(noise, tuple) else (noise,) for noise in mixture]
        for noises in self.choices:
            for noise in noises:
                options.require(noise)
        weights = np.array(list(mixture.values()), float)
        if len(weights) == 0 or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
            raise DataError(f"the mixture needs weights of 0 or more with a sum above 0, got {dict(mixture)}")
        self._cumulated = np.cumsum(weights / weights.sum())

    @property
    def extra_tokens(self) -> int:
        """The frame, and what infilling may insert."""
        infillings = max(noises.count("text_infilling") for noises in self.choices)
        return self.framing.extra_tokens + infillings * self.options.max_inserted

    def pair(self, example: object, generator: np.random.Generator) -> Pair:
        """See `PairObjective`; the example is a segment (ids, None)."""
        clean = unmasked(example, "denoising")
        require_absent(clean, [self.options.mask_id], "the mask")
        drawn = int(np.searchsorted(self._cumulated, generator.random(), side="right"))
        noises = self.choices[min(drawn, len(self.choices) - 1)]
        noisy = clean
        for noise in noises:
            noisy = add_noise(noise, noisy, self.options, generator).ids
        return Pair(noisy, clean, kind="+".join(noises))

"""Masked language modelling of an encoder-decoder: only chosen tokens are predicted, each at its own place.

The decoder reads the target with what is not learned shown as masks. A rate of 1 hides the whole source, which leaves
a language model that knows the length.

Source: Raffel et al. 2020, section 3.3.1; Devlin et al. 2018 (what replaces a token); Song et al. 2019 (the rate).
"""

from __future__ import annotations

import numpy as np

from gristmill.errors import DataError
from gristmill.objectives.masked import PLAIN, Corrupted, Masking
from gristmill.objectives.sequence_pair import Framing, Pair, PairObjective, require_absent, unmasked
from gristmill.objectives.vocabulary import EncoderVocabulary
from gristmill.tokens.batch import IGNORED


def masked_pair(corrupted: Corrupted, mask_id: int, kind: str = "masked") -> Pair:
    """The pair that predicts the chosen tokens of a corrupted text from it."""
    clean, learned = corrupted.restored(), corrupted.target_ids != IGNORED
    return Pair(corrupted.input_ids, clean, learned, np.where(learned, clean, mask_id), kind)


class MaskedPair(PairObjective):
    """`masking` says what is chosen and what stands in its place; by default 15% and [MASK]. Special tokens are never
    chosen. Raises DataError when framing and vocabulary are not of one size."""

    kind = "masked"

    def __init__(self, framing: Framing, vocabulary: EncoderVocabulary, masking: Masking = PLAIN) -> None:
        super().__init__(framing)
        if vocabulary.size != framing.vocab_size:
            raise DataError(f"the vocabulary has {vocabulary.size} tokens, the framing {framing.vocab_size}")
        self.vocabulary, self.masking = vocabulary, masking

    def pair(self, example: object, generator: np.random.Generator) -> Pair:
        """See `PairObjective`; the example is a segment (ids, None)."""
        ids = self.vocabulary.checked(unmasked(example, self.kind), self.kind)
        require_absent(ids, [self.vocabulary.mask_id], "the mask")
        return masked_pair(self.masking.corrupt(ids, self.vocabulary, generator), self.vocabulary.mask_id, self.kind)

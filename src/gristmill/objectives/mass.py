"""MASS: one contiguous fragment is hidden from the encoder, and the decoder predicts just that.

`The kitten [M] [M] [M] ball .` -> `_ _ is chasing the _ _`. A fragment of one token is masked language modelling, one
of the whole text language modelling.

Source: Song et al. 2019, section 3.2; half of the text is their choice.
"""

from __future__ import annotations

from gristmill.objectives.masked import Masking
from gristmill.objectives.masked_pair import MaskedPair
from gristmill.objectives.sequence_pair import Framing
from gristmill.objectives.vocabulary import EncoderVocabulary


class Mass(MaskedPair):
    """Hides `rate` of each text in one piece without a special token, wherever it falls. Raises DataError for a rate
    outside (0, 1]."""

    kind = "mass"

    def __init__(self, framing: Framing, vocabulary: EncoderVocabulary, *, rate: float = 0.5) -> None:
        masking = Masking(rate=rate, unit="fragment", mask_share=1.0, random_share=0.0)
        super().__init__(framing, vocabulary, masking)

"""Translation language modelling: a sentence and its translation in one sequence, tokens hidden in both.

A hidden token can be predicted from its own language or from the other, which draws the two together. A sentence
without translation is learned as by any masked LM, so one objective serves both kinds of text.

Source: Conneau and Lample 2019 (XLM), sections 3.3 and 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from gristmill.errors import DataError
from gristmill.objectives.encoder_batch import EncoderBatch, Row, encoder_states, headed, masked_loss_sum
from gristmill.objectives.masked import Masking
from gristmill.objectives.pairs import pack_pair, pack_single
from gristmill.objectives.single import SingleTerm, example_generator
from gristmill.objectives.vocabulary import EncoderVocabulary, Ids


@dataclass(frozen=True, eq=False)
class Tagged:
    """Token ids of a text and the number of its language."""

    ids: Ids
    language: int = 0


class TranslationLM(SingleTerm):
    """The `Objective` of masked tokens in aligned sentences, for an encoder with a masked LM head. An example is one
    `Tagged` text or two that are translations of each other.

    languages: how many there are, for a model that adds an embedding of the language to each token: one token type
    each. 0 leaves the language out, so that texts may mix them: the model sees tokens and positions alone.
    Raises DataError for a negative number, or a vocabulary without [CLS] and [SEP].
    """

    extra_tokens = 3

    def __init__(self, vocabulary: EncoderVocabulary, masking: Masking | None = None, *, languages: int = 0) -> None:
        if languages < 0:
            raise DataError(f"languages must be 0 or more, got {languages}")
        vocabulary.require_frame()
        self.vocabulary, self.masking, self.languages = vocabulary, masking or Masking(), languages

    def prepare(self, examples: Sequence[Sequence[Tagged]], keys: Sequence[tuple[int, ...]]) -> EncoderBatch:
        """Pack and corrupt. Raises DataError for other than one or two texts, an empty one, unknown tokens, or a
        language that is not among those declared."""
        rows = []
        for number, (texts, key) in enumerate(zip(examples, keys, strict=True)):
            ids, types = self.packed(texts, number)
            corrupted = self.masking.corrupt(ids, self.vocabulary, example_generator(key))
            rows.append(Row(*corrupted, types))
        return EncoderBatch.from_rows(rows, token_types=self.languages)

    def packed(self, texts: Sequence[Tagged], number: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The framed tokens of an example, and the language of each; [CLS] and the first [SEP] have the first's."""
        if len(texts) not in (1, 2):
            raise DataError(f"example {number}: expected a text, or a text and its translation, got {len(texts)}")
        checked = [self.vocabulary.checked(text.ids, f"example {number}, text {n}") for n, text in enumerate(texts)]
        for text in texts:
            if self.languages and not 0 <= text.language < self.languages:
                raise DataError(f"example {number}: language {text.language} is none of the {self.languages} declared")
        if len(texts) == 1:
            packed = pack_single(checked[0], self.vocabulary)
        else:
            packed = pack_pair(checked[0], checked[1], self.vocabulary)
        return packed.ids, np.array([text.language for text in texts])[packed.token_type_ids]

    def loss_sum(self, model: nn.Module, batch: EncoderBatch) -> tuple[Tensor, int]:
        """Summed loss in nats over the chosen tokens, and their number."""
        found = headed(model, "masked_lm", "pretraining")
        return masked_loss_sum(found, encoder_states(found.body, batch), batch.target_ids)

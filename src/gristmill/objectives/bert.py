"""BERT's pretraining: masked tokens, and the decision whether two texts belong together, learned at once.

The loss is the mean over masked tokens plus the mean over pairs. RoBERTa leaves the pairs out; ALBERT asks for the
order of the two instead, which is a matter of the examples (`SentencePairs(task="order")`).

Source: Devlin et al. 2018, section 3.1; Liu et al. 2019 (RoBERTa), section 4.2; Lan et al. 2020 (ALBERT), section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.errors import DataError
from gristmill.model.heads import PretrainingHead
from gristmill.objectives.encoder_batch import (
    EncoderBatch,
    Row,
    encoder_states,
    headed,
    masked_loss_sum,
    segment_vectors,
)
from gristmill.objectives.masked import Masking
from gristmill.objectives.pairs import IS_NEXT, NOT_NEXT, SentencePair, pack_pair
from gristmill.objectives.single import example_generator
from gristmill.objectives.vocabulary import EncoderVocabulary

MASKED, PAIR = "masked_lm", "pair"
"""Names of the two terms."""


class BertPretraining:
    """The `Objective` of BERT, for an encoder with a pretraining head. Examples are `SentencePair`s.

    pair: False leaves the decision about the pair out; labels are then not read, and a masked LM head is enough. The
    masked tokens and their loss are the same either way.
    """

    extra_tokens = 3

    def __init__(self, vocabulary: EncoderVocabulary, masking: Masking | None = None, *, pair: bool = True) -> None:
        vocabulary.require_frame()
        self.vocabulary, self.masking, self.pair = vocabulary, masking or Masking(), pair
        self.weights: Mapping[str, float] = {MASKED: 1.0, PAIR: 1.0} if pair else {MASKED: 1.0}

    def prepare(self, examples: Sequence[SentencePair], keys: Sequence[tuple[int, ...]]) -> EncoderBatch:
        """Pack as [CLS] first [SEP] second [SEP] and corrupt. Raises DataError for an empty text, one with unknown
        tokens, or a label that is not 0 or 1 where it is to be learned."""
        rows = []
        for number, (example, key) in enumerate(zip(examples, keys, strict=True)):
            if self.pair and example.label not in (IS_NEXT, NOT_NEXT):
                raise DataError(f"pair {number}: the label must be {IS_NEXT} or {NOT_NEXT}, got {example.label!r}")
            first = self.vocabulary.checked(example.first, f"pair {number}, first text")
            second = self.vocabulary.checked(example.second, f"pair {number}, second text")
            ids, types = pack_pair(first, second, self.vocabulary)
            rows.append(Row(*self.masking.corrupt(ids, self.vocabulary, example_generator(key)), types))
        labels = torch.tensor([example.label for example in examples]) if self.pair and rows else None
        return EncoderBatch.from_rows(rows, token_types=2, labels=labels)

    def counts(self, batch: EncoderBatch) -> Mapping[str, int]:
        """Masked tokens, and pairs."""
        counts = {MASKED: batch.target_count, PAIR: len(batch.segment_lengths)}
        return {name: counts[name] for name in self.weights}

    def loss_sums(self, model: nn.Module, batch: EncoderBatch) -> Mapping[str, Tensor]:
        """See `Objective`. Raises CheckpointError for a model without the head."""
        found = headed(model, "pretraining") if self.pair else headed(model, "pretraining", "masked_lm")
        hidden = encoder_states(found.body, batch)
        sums = {MASKED: masked_loss_sum(found, hidden, batch.target_ids)[0]}
        if self.pair:
            assert isinstance(found.head, PretrainingHead)
            assert batch.labels is not None
            vectors = segment_vectors(hidden, batch.segment_lengths, found.head.pooling)
            logits = found.head.pair(found.head.pooler(vectors))
            sums[PAIR] = F.cross_entropy(logits.float(), batch.labels, reduction="sum")
        return sums

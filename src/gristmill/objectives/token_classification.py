"""Token classification: a label for every token, from the encoder's state there.

Source: Devlin et al. 2018, section 5.3; Clark et al. 2020, whose discriminator is an instance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.errors import CheckpointError, DataError
from gristmill.objectives.encoder_batch import EncoderBatch, Row, encoder_states, headed
from gristmill.objectives.pairs import pack_single
from gristmill.objectives.single import SingleTerm
from gristmill.objectives.vocabulary import EncoderVocabulary, Ids
from gristmill.tokens.batch import IGNORED


@dataclass(frozen=True, eq=False)
class LabelledTokens:
    """Token ids and the label of each; IGNORED where it has none, as later pieces of a word."""

    ids: Ids
    labels: Ids


class TokenClassification(SingleTerm):
    """The `Objective` of labelled tokens, for an encoder with a token classifier of `classes` labels. [CLS] and [SEP],
    put around each example, have no label. Raises DataError for fewer than two classes."""

    extra_tokens = 2

    def __init__(self, vocabulary: EncoderVocabulary, classes: int) -> None:
        if classes < 2:
            raise DataError(f"classes must be at least 2, got {classes}")
        vocabulary.require_frame()
        self.vocabulary, self.classes = vocabulary, classes

    def prepare(self, examples: Sequence[LabelledTokens], keys: Sequence[tuple[int, ...]]) -> EncoderBatch:
        """Frame; nothing is hidden. Raises DataError for an empty example, unknown tokens, as many labels as there are
        not tokens, or a label that is no class."""
        rows = []
        for number, (example, _) in enumerate(zip(examples, keys, strict=True)):
            ids = self.vocabulary.checked(example.ids, f"example {number}")
            labels = np.asarray(example.labels, dtype=np.int64)
            if len(labels) != len(ids):
                raise DataError(f"example {number} has {len(ids)} tokens and {len(labels)} labels")
            wrong = (labels != IGNORED) & ((labels < 0) | (labels >= self.classes))
            if wrong.any():
                raise DataError(f"example {number}: label {labels[wrong][0]} is none of {self.classes} classes")
            targets = np.concatenate(([IGNORED], labels, [IGNORED]))
            rows.append(Row(pack_single(ids, self.vocabulary).ids, targets))
        return EncoderBatch.from_rows(rows)

    def loss_sum(self, model: nn.Module, batch: EncoderBatch) -> tuple[Tensor, int]:
        """Summed cross-entropy in nats over the labelled tokens, and their number. Raises CheckpointError for another
        head or another number of labels."""
        found = headed(model, "token_classifier")
        if len(found.head_config.labels) != self.classes:
            raise CheckpointError(f"the head has {len(found.head_config.labels)} labels, the objective {self.classes}")
        learned = (batch.target_ids != IGNORED).nonzero().squeeze(1)
        logits = found.head(encoder_states(found.body, batch)[learned])
        return F.cross_entropy(logits.float(), batch.target_ids[learned], reduction="sum"), len(learned)

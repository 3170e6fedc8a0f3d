"""Sentence comparison: two texts are encoded apart, and the score of their vectors is learned.

Neither vector knows of the other text, so vectors can be kept and compared at will. The pairs of a batch are not
compared crosswise: what is learned from one does not depend on which others it meets.

Source: Reimers and Gurevych 2019, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.errors import CheckpointError, DataError
from gristmill.model.encoder import Encoder
from gristmill.model.heads import Headed, Pooling
from gristmill.objectives.encoder_batch import EncoderBatch, encoder_states, segment_vectors, unlearned
from gristmill.objectives.pairs import pack_single
from gristmill.objectives.single import SingleTerm
from gristmill.objectives.vocabulary import EncoderVocabulary, Ids


@dataclass(frozen=True, eq=False)
class ScoredPair:
    """Token ids of two texts, and how near they are: the cosine itself, or the probability of belonging together."""

    first: Ids
    second: Ids
    score: float


def similarity(first: Tensor, second: Tensor, how: Literal["cosine", "dot"] = "cosine") -> Tensor:
    """Scores (pairs,) of vectors (pairs, size); the same when the two are exchanged."""
    if how == "cosine":
        return F.cosine_similarity(first, second, dim=-1)
    return (first * second).sum(dim=-1)


class SentenceComparison(SingleTerm):
    """The `Objective` of scored pairs, for an encoder, a head on it aside.

    loss: "squared" is (cosine - score)^2, with scores in [-1, 1]; "logistic" the cross-entropy of
    sigmoid(scale * score of the vectors) with scores in [0, 1]. how: the score of two vectors; "dot" needs "logistic".
    Raises DataError for options that do not fit together.
    """

    extra_tokens = 2

    def __init__(
        self,
        vocabulary: EncoderVocabulary,
        *,
        how: Literal["cosine", "dot"] = "cosine",
        loss: Literal["squared", "logistic"] = "squared",
        pooling: Pooling = "mean",
        scale: float = 1.0,
    ) -> None:
        for name, value, known in (("how", how, ("cosine", "dot")), ("loss", loss, ("squared", "logistic"))):
            if value not in known:
                raise DataError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if loss == "squared" and (how == "dot" or scale != 1.0):
            raise DataError("the squared loss compares a cosine as it is: use how='cosine' and scale=1, or 'logistic'")
        vocabulary.require_frame()
        self.vocabulary, self.how, self.loss, self.pooling, self.scale = vocabulary, how, loss, pooling, scale

    def prepare(self, examples: Sequence[ScoredPair], keys: Sequence[tuple[int, ...]]) -> EncoderBatch:
        """Two segments a pair, each framed by itself. Raises DataError for an empty text, one with unknown tokens, or a
        score out of range."""
        rows, low = [], -1.0 if self.loss == "squared" else 0.0
        for number, (example, _) in enumerate(zip(examples, keys, strict=True)):
            if not low <= example.score <= 1.0:
                raise DataError(f"pair {number}: the score must be in [{low:.0f}, 1], got {example.score}")
            for name, ids in (("first", example.first), ("second", example.second)):
                checked = self.vocabulary.checked(ids, f"pair {number}, {name} text")
                rows.append(unlearned(pack_single(checked, self.vocabulary).ids))
        return EncoderBatch.from_rows(rows, labels=torch.tensor([float(example.score) for example in examples]))

    def counts(self, batch: EncoderBatch) -> dict[str, int]:
        """Pairs."""
        return dict.fromkeys(self.weights, len(batch.segment_lengths) // 2)

    def scores(self, model: nn.Module, batch: EncoderBatch) -> Tensor:
        """Score of each pair, (pairs,). Raises CheckpointError for a model that is no encoder."""
        body = model.body if isinstance(model, Headed) else model
        if not isinstance(body, Encoder):
            raise CheckpointError(f"sentence comparison trains an encoder, got {type(body).__name__}")
        vectors = segment_vectors(encoder_states(body, batch), batch.segment_lengths, self.pooling).float()
        return similarity(vectors[::2], vectors[1::2], self.how)

    def loss_sum(self, model: nn.Module, batch: EncoderBatch) -> tuple[Tensor, int]:
        """Summed loss over the pairs, and their number."""
        scores, labels = self.scores(model, batch), batch.labels
        assert labels is not None
        if self.loss == "squared":
            return (scores - labels).square().sum(), len(labels)
        return F.binary_cross_entropy_with_logits(self.scale * scores, labels, reduction="sum"), len(labels)

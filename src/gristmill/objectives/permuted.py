"""Permuted language modelling: predict the tokens one after another in a random order; their positions stay.

Every token is predicted from those earlier in the order, wherever they stand, so both sides serve as context, nothing
is replaced by [MASK], and predictions depend on each other. Attention masks alone do not do it: the residual path
would show a token to its own prediction, and the model would not know which position is asked for. Two streams do
(gristmill.model.attention.two_stream).

Source: Yang et al. 2019 (XLNet), sections 2.2 and 2.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from gristmill.errors import DataError, RequestError
from gristmill.model.attention.two_stream import two_stream_states
from gristmill.objectives.encoder_batch import EncoderBatch, Row, headed, masked_loss_sum
from gristmill.objectives.single import SingleTerm, example_generator
from gristmill.objectives.vocabulary import EncoderVocabulary
from gristmill.tokens.batch import IGNORED

Order = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PermutedBatch(EncoderBatch):
    """orders: for each segment its positions in the order of their prediction."""

    orders: tuple[Order, ...] = ()


def factorisation(order: Sequence[int]) -> list[tuple[int, frozenset[int]]]:
    """The conditionals whose product is the probability of a sequence: each position, and those that it depends on, in
    the order of prediction."""
    return [(place, frozenset(order[:turn])) for turn, place in enumerate(order)]


def predicted_targets(ids: np.ndarray, order: Sequence[int], share: float = 1.0) -> np.ndarray:
    """(tokens,): the last `share` of the order predicts its own tokens, at least one; all else is IGNORED. The first
    in the order predicts nothing, for it has nothing to read. Raises DataError when `order` is no permutation."""
    if sorted(order) != list(range(len(ids))):
        raise DataError(f"order must name each of {len(ids)} positions once, got {list(order)}")
    targets = np.full_like(ids, IGNORED)
    later = list(order[1:])
    count = max(round(share * len(later)), 1)
    places = later[len(later) - count :] if later else []
    targets[places] = ids[places]
    return targets


class PermutedLM(SingleTerm):
    """The `Objective` of permuted language modelling, for an encoder with a masked LM head. Examples are segments
    (ids, None); [CLS] is put before each and comes first in every order, so it is given.

    share: of the order, how much of its end is predicted; what comes first has little to read. shuffle: False predicts
    in natural order, as a causal model does. Raises DataError for a share outside (0, 1].
    """

    extra_tokens = 1

    def __init__(self, vocabulary: EncoderVocabulary, *, share: float = 1.0, shuffle: bool = True) -> None:
        if not 0.0 < share <= 1.0:
            raise DataError(f"share must be above 0 and at most 1, got {share}")
        vocabulary.require_frame(sep=False)
        self.vocabulary, self.share, self.shuffle = vocabulary, share, shuffle

    def prepare(self, examples: Sequence[Any], keys: Sequence[tuple[int, ...]]) -> PermutedBatch:
        """Draw an order for each segment. Raises DataError for an empty one, one with a loss mask or unknown tokens."""
        segments, orders = [], []
        for number, (example, key) in enumerate(zip(examples, keys, strict=True)):
            ids = self.vocabulary.segment(example, number)
            places = np.arange(1, len(ids) + 1)
            drawn = example_generator(key).permutation(places) if self.shuffle else places
            segments.append(np.array([self.vocabulary.cls_id, *ids], dtype=np.int64))
            orders.append((0, *drawn.tolist()))
        return self.ordered(segments, orders)

    def ordered(self, segments: Sequence[np.ndarray], orders: Sequence[Order]) -> PermutedBatch:
        """A batch of framed segments with given orders. Raises DataError when an order does not fit its segment."""
        pairs = list(zip(segments, orders, strict=True))
        rows = [Row(ids, predicted_targets(ids, order, self.share)) for ids, order in pairs]
        return PermutedBatch.from_rows(rows, orders=tuple(orders))

    def states(self, model: nn.Module, batch: PermutedBatch) -> Tensor:
        """The states (tokens, hidden) that predict: each has read what is earlier in its order, and no more.

        Raises RequestError for a segment longer than the model's context.
        """
        body = headed(model, "masked_lm", "pretraining").body
        if max(batch.segment_lengths) > body.config.context:
            raise RequestError(
                f"a segment of {max(batch.segment_lengths)} tokens, [CLS] included, is longer than the model's context "
                f"of {body.config.context}: cut documents shorter",
                field="row_length",
            )
        return two_stream_states(body, batch.input_ids, batch.orders, mask_token_id=self.vocabulary.mask_id).query

    def loss_sum(self, model: nn.Module, batch: PermutedBatch) -> tuple[Tensor, int]:
        """Summed loss in nats over the predicted tokens, and their number."""
        found = headed(model, "masked_lm", "pretraining")
        return masked_loss_sum(found, self.states(model, batch), batch.target_ids)

"""Batches of encoder objectives, and the states that an encoder makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from gristmill.errors import CheckpointError, DataError, RequestError
from gristmill.model.attention.packed import PackedAttention
from gristmill.model.heads import Headed, HeadKind, MaskedLMHead, Pooling
from gristmill.model.transformer import Stack
from gristmill.objectives.cross_entropy import linear_cross_entropy_sum
from gristmill.tokens.batch import IGNORED, PackedBatch

SHAPE_STEP = 256
"""Tokens and predicted rows are rounded up to a multiple of this, so that kernels meet few different shapes."""


class Row(NamedTuple):
    """One segment: what the model reads, what it predicts at each position (IGNORED for nothing), and token types."""

    ids: np.ndarray
    targets: np.ndarray
    types: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class EncoderBatch(PackedBatch):
    """Segments laid end to end for an encoder: `target_ids[i]` is what position i itself predicts.

    token_type_ids: (tokens,) in [0, token_types), None for all 0. labels: what an objective knows besides of each
    segment, or of each two of them.
    """

    token_type_ids: Tensor | None = None
    token_types: int = 0
    labels: Tensor | None = None

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **moved)

    @classmethod
    def from_rows(
        cls, rows: Sequence[Row], *, token_types: int = 0, labels: Tensor | None = None, **fields: Any
    ) -> Self:
        """Lay rows end to end. Raises DataError when there is none."""
        if not rows:
            raise DataError("a batch needs at least one example")
        types = None
        if token_types:
            types = _flat([np.zeros_like(row.ids) if row.types is None else row.types for row in rows])
        return cls(
            _flat([row.ids for row in rows]),
            _flat([row.targets for row in rows]),
            _flat([np.arange(len(row.ids)) for row in rows]),
            tuple(len(row.ids) for row in rows),
            types,
            token_types,
            labels,
            **fields,
        )


def unlearned(ids: np.ndarray, types: np.ndarray | None = None) -> Row:
    """A row that predicts no token."""
    return Row(ids, np.full_like(ids, IGNORED), types)


def encoder_states(stack: Stack, batch: EncoderBatch, input_ids: Tensor | None = None) -> Tensor:
    """Final states (tokens, hidden) of a batch, or of other tokens in its place.

    Raises RequestError for a segment longer than the model's context or for token types that it does not have.
    """
    config = stack.config
    if max(batch.segment_lengths) > config.context:
        raise RequestError(
            f"a segment of {max(batch.segment_lengths)} tokens, framing included, is longer than the model's context "
            f"of {config.context}: cut documents shorter",
            field="row_length",
        )
    if batch.token_types > config.embedding.token_types:
        raise RequestError(
            f"the objective uses {batch.token_types} token types, the model has {config.embedding.token_types}",
            field="token_type_ids",
        )
    ids = batch.input_ids if input_ids is None else input_ids
    plain = PackedBatch(ids, batch.target_ids, batch.position_ids, batch.segment_lengths)
    plain = plain.rounded_up(SHAPE_STEP, config.context)
    types = batch.token_type_ids
    if types is not None:
        types = torch.cat((types, types.new_zeros(len(plain.input_ids) - len(types))))
    cache = PackedAttention(plain.segment_lengths, ids.device)
    return stack.hidden_states(plain.input_ids, plain.position_ids, cache, token_type_ids=types)[: batch.tokens]


def masked_loss_sum(model: Headed, hidden: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Summed cross-entropy in nats of the model's masked LM head on states (tokens, hidden), and the number of
    targets (tokens,) that are not IGNORED. The head computes the rows that have a target, and no others."""
    head = model.head
    assert isinstance(head, MaskedLMHead)
    learned = (targets != IGNORED).nonzero().squeeze(1)
    surplus = -len(learned) % SHAPE_STEP
    rows = torch.cat((learned, learned.new_zeros(surplus)))
    wanted = torch.cat((targets[learned], targets.new_full((surplus,), IGNORED)))
    states = head.transform(hidden[rows])
    return linear_cross_entropy_sum(states, head.decoder.weight, wanted, head.decoder.bias), len(learned)


def segment_vectors(hidden: Tensor, lengths: Sequence[int], how: Pooling) -> Tensor:
    """One vector per segment, (segments, size), of flat states (tokens, size); see gristmill.model.heads.pool."""
    sizes = torch.tensor(list(lengths), device=hidden.device)
    ends = sizes.cumsum(0)
    if how == "mean":
        segment = torch.repeat_interleave(torch.arange(len(sizes), device=hidden.device), sizes)
        total = hidden.new_zeros(len(sizes), hidden.shape[1]).index_add(0, segment, hidden)
        return total / sizes[:, None]
    return hidden[ends - 1 if how == "last" else ends - sizes]


def headed(model: nn.Module, *kinds: HeadKind) -> Headed:
    """The model, when it has a head of one of these kinds. Raises CheckpointError naming what it has instead."""
    if isinstance(model, Headed) and model.head_config.kind in kinds:
        return model
    found = f"a head of kind {model.head_config.kind!r}" if isinstance(model, Headed) else type(model).__name__
    raise CheckpointError(f"this objective trains a model with a head of kind {' or '.join(kinds)}, got {found}")


def _flat(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))

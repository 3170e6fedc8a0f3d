"""Flat, document-aware batches: ragged segments end to end, no padding. Training and engine share this layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gristmill.errors import DataError

IGNORED = -100
"""Target of a position that predicts nothing; the value `torch.nn.functional.cross_entropy` ignores."""

Segment = tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray | None]
"""Token ids of one document or piece and its loss mask: 1 where the token is to be learned; None learns all."""


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Segments laid end to end. A token attends and predicts only within its own segment.

    All tensors are int64 of shape (tokens,). `target_ids[i]` is the token to predict at i, IGNORED where there is
    none: at the last token of a segment and where the next token is masked. `position_ids` restart at 0 in each
    segment; `segment_lengths` sum to tokens.
    """

    input_ids: Tensor
    target_ids: Tensor
    position_ids: Tensor
    segment_lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        shape = (sum(self.segment_lengths),)
        for name in ("input_ids", "target_ids", "position_ids"):
            tensor: Tensor = getattr(self, name)
            if tensor.shape != shape or tensor.dtype != torch.int64:
                raise ValueError(
                    f"{name} must be int64 of shape {shape}, the sum of segment_lengths; "
                    f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
                )

    @property
    def tokens(self) -> int:
        """Tokens of all segments."""
        return len(self.input_ids)

    @property
    def target_count(self) -> int:
        """Positions that predict a token; a loss summed over the batch is divided by this, summed globally."""
        return int((self.target_ids != IGNORED).sum())

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device."""
        return PackedBatch(
            self.input_ids.to(device), self.target_ids.to(device), self.position_ids.to(device), self.segment_lengths
        )

    def rounded_up(self, multiple: int, longest: int) -> PackedBatch:
        """The batch with more segments, of id 0 and without targets, that make its length a multiple. None of them has
        more than `longest` tokens, the context of the model.

        Kernels are made and kept for each shape they meet: batches of ever new lengths would cost time and memory.
        """
        surplus = -len(self.input_ids) % multiple
        if surplus == 0:
            return self
        zeros = self.input_ids.new_zeros(surplus)
        return PackedBatch(
            torch.cat((self.input_ids, zeros)),
            torch.cat((self.target_ids, zeros + IGNORED)),
            torch.cat((self.position_ids, torch.arange(surplus, device=zeros.device) % longest)),
            (*self.segment_lengths, *[longest] * (surplus // longest), *[surplus % longest] * (surplus % longest > 0)),
        )

    @classmethod
    def from_segments(cls, segments: Sequence[Segment]) -> PackedBatch:
        """Lay segments end to end. Raises DataError for no segment, an empty one, or a mask of another length."""
        if not segments:
            raise DataError("a batch needs at least one segment")
        for number, (ids, mask) in enumerate(segments):
            if len(ids) == 0:
                raise DataError(f"segment {number} has no tokens")
            if mask is not None and len(mask) != len(ids):
                raise DataError(f"segment {number} has {len(ids)} tokens, but its loss mask has {len(mask)}")
        lengths = np.fromiter((len(ids) for ids, _ in segments), dtype=np.int64, count=len(segments))
        ends = np.cumsum(lengths)
        ids = np.concatenate([np.asarray(ids) for ids, _ in segments]).astype(np.int64)
        targets = np.empty_like(ids)
        targets[:-1] = ids[1:]
        if any(mask is not None for _, mask in segments):
            learned = np.concatenate(
                [np.ones(len(ids), bool) if mask is None else np.asarray(mask) != 0 for ids, mask in segments]
            )
            targets[:-1][~learned[1:]] = IGNORED
        targets[ends - 1] = IGNORED
        positions = np.arange(len(ids), dtype=np.int64) - np.repeat(ends - lengths, lengths)
        return cls(
            torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(positions), tuple(lengths.tolist())
        )

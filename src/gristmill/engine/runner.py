"""What computes a step: the model, its key-value memory, and nothing of requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from gristmill.engine.memory.paged_cache import Chunk, PagedKVCache
from gristmill.model.attention.layer import Memory
from gristmill.model.lora.low_rank import Lora, applied
from gristmill.model.transformer import Transformer


class Runner(Protocol):
    """Computes ragged batches through block tables. One thread owns it."""

    @property
    def device(self) -> torch.device:
        """Where hidden states and logits are."""

    def hidden_states(self, ids: Sequence[int], chunks: Sequence[Chunk]) -> Tensor:
        """Final hidden states (tokens, hidden) of the tokens `ids`, which lie chunk after chunk.

        Their keys and values are stored in the slots of the chunks' tables. The result may be overwritten by the next
        call.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, hidden) -> (rows, vocab), float32."""

    def greedy(self, hidden: Tensor) -> list[int]:
        """The most probable token of each row of (rows, hidden), -1 for a row whose logits are not all numbers."""

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy keys and values of whole blocks, (from, to) each; every source is read before any target is written."""

    def read_blocks(self, blocks: Sequence[int]) -> list[Tensor]:
        """What blocks hold, to be sent elsewhere: tensors whose second dimension is the slots of the blocks."""

    def write_blocks(self, blocks: Sequence[int], data: Sequence[Tensor]) -> None:
        """Put into blocks what `read_blocks` of an equal runner gave."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Memory that one token takes in all layers."""


@runtime_checkable
class AdaptingRunner(Runner, Protocol):
    """A runner whose chunks may have adapters."""

    def adapt(self, lora: Lora) -> object:
        """An adapter of this model as chunks name it. Nothing of it is left when nobody holds the result."""


RunnerFactory = Callable[[int, int], Runner]
"""Makes a runner for so many blocks of so many tokens."""


class TorchRunner:
    """The reference: gristmill.model's own forward in PyTorch, on any device."""

    def __init__(self, model: Transformer, *, num_blocks: int, block_size: int, kv_dtype: torch.dtype) -> None:
        self.model = model
        self.device = model.embed_tokens.weight.device
        self.cache = PagedKVCache(model.config, num_blocks, block_size, kv_dtype, self.device)

    @torch.inference_mode()
    def hidden_states(self, ids: Sequence[int], chunks: Sequence[Chunk]) -> Tensor:
        """See `Runner.hidden_states`."""
        self.cache.plan(chunks)
        positions = [position for chunk in chunks for position in range(chunk.start, chunk.start + chunk.length)]
        with applied(self.model, _spans(chunks)):
            return self.model.hidden_states(
                torch.tensor(ids, device=self.device),
                torch.tensor(positions, device=self.device),
                self.cache,
                memory=self.memory(chunks),
            )

    def adapt(self, lora: Lora) -> Lora:
        """See `AdaptingRunner.adapt`."""
        return lora.to(self.device)

    def memory(self, chunks: Sequence[Chunk]) -> Memory | None:
        """What cross-attention reads; None without an encoder."""
        return None

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """See `Runner.logits`."""
        return self.model.logits(hidden).float()

    @torch.inference_mode()
    def greedy(self, hidden: Tensor) -> list[int]:
        """See `Runner.greedy`."""
        highest, best = self.logits(hidden).max(dim=-1)
        return torch.where(highest.isfinite(), best, -1).tolist()  # the maximum of a row with NaN is NaN

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See `Runner.copy_blocks`."""
        self.write_blocks([to for _, to in pairs], self.read_blocks([source for source, _ in pairs]))

    def read_blocks(self, blocks: Sequence[int]) -> list[Tensor]:
        """See `Runner.read_blocks`."""
        slots = self.cache.slots_of(blocks)
        return [store.index_select(1, slots) for store in self.cache.stores]

    def write_blocks(self, blocks: Sequence[int], data: Sequence[Tensor]) -> None:
        """See `Runner.write_blocks`."""
        slots = self.cache.slots_of(blocks)
        for store, values in zip(self.cache.stores, data, strict=True):
            store.index_copy_(1, slots, values.to(store.device))

    @property
    def kv_bytes_per_token(self) -> int:
        """See `Runner.kv_bytes_per_token`."""
        return self.cache.bytes_per_token


def _spans(chunks: Sequence[Chunk]) -> list[tuple[slice, Lora]]:
    """Which tokens of a step have which adapter."""
    spans, end = [], 0
    for chunk in chunks:
        begin, end = end, end + chunk.length
        if chunk.adapter is not None:
            spans.append((slice(begin, end), cast(Lora, chunk.adapter)))
    return spans

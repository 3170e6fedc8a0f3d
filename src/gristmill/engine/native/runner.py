"""The native runner: one C++ call computes a whole step of a decoder of the Llama family.

It has no model of its own: `decoder.describe` reads the modules of a `Transformer`, and `native_refusal` names what is
not covered. Results differ from `TorchRunner` by the rounding of the chosen kind of weights; a row's result depends
neither on the rows beside it, nor on how a prompt was cut into chunks, nor on the number of threads.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from gristmill.engine.memory.paged_cache import Chunk
from gristmill.engine.native import build
from gristmill.engine.native.adapter import NativeAdapter
from gristmill.engine.native.decoder import (
    KV_DTYPES,
    DecoderStruct,
    describe,
    make_stores,
    native_refusal,
    plain_embedding,
)
from gristmill.engine.native.linear import Kind
from gristmill.errors import RequestError
from gristmill.model.config import ModelConfig, RopeConfig
from gristmill.model.lora.low_rank import Lora
from gristmill.model.positions.rope import rope_tables
from gristmill.model.transformer import Transformer

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64


class _Step(ctypes.Structure):
    """`Step` of kernels/stack.cpp."""

    _fields_ = (
        *((name, _LONG) for name in ("tokens", "chunk_count")),
        *((name, _POINTER) for name in ("starts", "lengths", "tables", "table_ends")),
        ("cosines", _POINTER * 2),
        ("sines", _POINTER * 2),
        ("rope_by_token", _LONG),
        ("adapters", _POINTER),
        ("low_size", _LONG),
        *((name, _POINTER) for name in ("x", "hidden")),
    )


class NativeRunner:
    """`Runner` in C++, on the CPU.

    kind: what floating weights become: float32, bfloat16, int8_weights, or int8 or int4, the last two with activations
    rounded to eight bits; layers that are quantised already stay what they are. group_size is for int4; matrices that
    groups do not divide, and the output head, become int8 instead. kv_dtype: float32, bfloat16 or int8. threads: None
    for torch's number. release: put the packed layers into the model in place of its own, whose memory is then free;
    the model goes on to work, for inference.

    Raises RequestError for a model that `native_refusal` refuses, an unknown kind, another kv_dtype, or numbers below
    1.
    """

    def __init__(
        self,
        model: Transformer,
        kind: Kind,
        *,
        num_blocks: int,
        block_size: int,
        kv_dtype: torch.dtype = torch.float32,
        threads: int | None = None,
        group_size: int = 32,
        release: bool = False,
    ) -> None:
        if refusal := native_refusal(model):
            raise RequestError(refusal, field="model")
        if kv_dtype not in KV_DTYPES:
            raise RequestError(f"kv_dtype {kv_dtype} is not float32, bfloat16 or int8", field="kv_dtype")
        threads = torch.get_num_threads() if threads is None else threads
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size), ("threads", threads)):
            if value < 1:
                raise RequestError(f"{name} must be at least 1, got {value}", field=name)
        self.model, self.config, self.kind = model, model.config, kind
        self.device, self.num_blocks, self.block_size = torch.device("cpu"), num_blocks, block_size
        self.stores = make_stores(model.config, num_blocks * block_size, kv_dtype)
        """All that a slot holds; the second dimension is the slots."""
        self.decoder = describe(model, kind, group_size, self.stores, block_size, release)
        self._rope = _RopeTables(model.config)
        self._embedding = plain_embedding(model)
        self._library = _library()
        self._stack = self._library.gristmill_stack(ctypes.byref(self.decoder.struct), threads)
        self._step = _Step()
        self._states, self._scores = torch.empty(0, model.config.hidden_size), torch.empty(0, model.config.vocab_size)

    def __del__(self) -> None:
        if stack := getattr(self, "_stack", None):
            self._library.gristmill_stack_free(stack)

    @property
    def kv_bytes_per_token(self) -> int:
        """See `Runner.kv_bytes_per_token`."""
        return sum(store[:, 0].nbytes for store in self.stores)

    @torch.inference_mode()
    def hidden_states(self, ids: Sequence[int], chunks: Sequence[Chunk]) -> Tensor:
        """See `Runner.hidden_states`. The next call overwrites the result.

        Raises ValueError for blocks that are none or too few, and IndexError for an id that is none.
        """
        starts, lengths = array("q", [chunk.start for chunk in chunks]), array("q", [chunk.length for chunk in chunks])
        tables, ends = array("q"), array("q")
        for chunk in chunks:
            tables.extend(chunk.block_table[: -(-(chunk.start + chunk.length) // self.block_size)])
            ends.append(len(tables))
        if sum(lengths) != len(ids) or not chunks:
            raise ValueError(f"{len(ids)} ids for {len(chunks)} chunks of {sum(lengths)} tokens")
        positions = None
        if self._rope.by_token or self.config.positions.absolute is not None:
            positions = torch.tensor([p for c in chunks for p in range(c.start, c.start + c.length)], dtype=torch.long)
        x = self._embedded(torch.tensor(ids, dtype=torch.long), positions)
        if len(ids) > len(self._states):
            self._states = torch.empty(len(ids), self.config.hidden_size)
        hidden = self._states[: len(ids)]
        step = self._step
        step.tokens, step.chunk_count = len(ids), len(chunks)
        step.starts, step.lengths = starts.buffer_info()[0], lengths.buffer_info()[0]
        step.tables, step.table_ends = tables.buffer_info()[0], ends.buffer_info()[0]
        step.x, step.hidden = x.data_ptr(), hidden.data_ptr()
        adapters = [cast(NativeAdapter | None, chunk.adapter) for chunk in chunks]
        pointers = array("Q", [0 if adapter is None else adapter.address for adapter in adapters])
        step.low_size = max(0 if adapter is None else adapter.low_size for adapter in adapters)
        step.adapters = pointers.buffer_info()[0] if step.low_size else None
        self._rope.fill(step, chunks, positions)
        wrong = self._library.gristmill_stack_run(self._stack, ctypes.byref(step))
        if wrong >= 0:
            raise ValueError(
                f"chunk {wrong}: {lengths[wrong]} tokens from position {starts[wrong]} do not fit its blocks "
                f"{list(chunks[wrong].block_table)}, of {self.block_size} tokens and {self.num_blocks} in all"
            )
        return hidden

    def adapt(self, lora: Lora) -> NativeAdapter:
        """See `AdaptingRunner.adapt`."""
        return NativeAdapter(lora, self.model.order)

    def _embedded(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """What the first layer reads, (tokens, hidden) float32 of its own."""
        if self._embedding is not None:
            return self._embedding.index_select(0, tokens)
        return self.model.embed(tokens, tokens if positions is None else positions).float().contiguous()

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """See `Runner.logits`. The next call overwrites the result."""
        rows = _rows(hidden)
        if len(rows) > len(self._scores):
            self._scores = torch.empty(len(rows), self.config.vocab_size)
        self._library.gristmill_stack_logits(self._stack, rows.data_ptr(), len(rows), self._scores.data_ptr())
        return self._scores[: len(rows)]

    @torch.inference_mode()
    def greedy(self, hidden: Tensor) -> list[int]:
        """See `Runner.greedy`."""
        rows = _rows(hidden)
        best, highest = array("q", bytes(8 * len(rows))), array("f", bytes(4 * len(rows)))
        self._library.gristmill_stack_greedy(
            self._stack, rows.data_ptr(), len(rows), best.buffer_info()[0], highest.buffer_info()[0]
        )
        return best.tolist()

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See `Runner.copy_blocks`."""
        self.write_blocks([to for _, to in pairs], self.read_blocks([source for source, _ in pairs]))

    def read_blocks(self, blocks: Sequence[int]) -> list[Tensor]:
        """See `Runner.read_blocks`."""
        slots = self._slots(blocks)
        return [store.index_select(1, slots) for store in self.stores]

    def write_blocks(self, blocks: Sequence[int], data: Sequence[Tensor]) -> None:
        """See `Runner.write_blocks`."""
        slots = self._slots(blocks)
        for store, values in zip(self.stores, data, strict=True):
            store.index_copy_(1, slots, values)

    def _slots(self, blocks: Sequence[int]) -> Tensor:
        first = torch.tensor(list(blocks), dtype=torch.long)[:, None] * self.block_size
        return (first + torch.arange(self.block_size)).flatten()


class _RopeTables:
    """Cosines and sines by position, as far as sequences have come; or by token where a scaling depends on lengths."""

    def __init__(self, config: ModelConfig) -> None:
        ropes = (config.positions.rope, config.positions.local_rope)
        self._ropes: tuple[RopeConfig | None, ...] = ropes
        self._head_dim = config.head_dim
        self.by_token = any(rope and rope.scaling and rope.scaling.needs_lengths for rope in ropes)
        self._tables: list[tuple[Tensor, Tensor] | None] = [None, None]
        self._reach = 0

    def fill(self, step: _Step, chunks: Sequence[Chunk], positions: Tensor | None) -> None:
        """Point a step to its tables."""
        ends = [chunk.start + chunk.length for chunk in chunks]
        if self.by_token:
            assert positions is not None
            counts = torch.tensor([chunk.length for chunk in chunks])
            self._compute(step, positions, torch.tensor(ends).repeat_interleave(counts))
        elif max(ends) > self._reach:
            self._reach = max(1024, 1 << (max(ends) - 1).bit_length())
            self._compute(step, torch.arange(self._reach), None)

    def _compute(self, step: _Step, positions: Tensor, lengths: Tensor | None) -> None:
        step.rope_by_token = self.by_token
        for place, rope in enumerate(self._ropes):
            if rope is None:
                continue
            own = lengths if rope.scaling is not None and rope.scaling.needs_lengths else None
            cos, sin, _ = rope_tables(positions, rope, self._head_dim, torch.float32, own)
            kept = cos.contiguous(), sin.contiguous()
            self._tables[place] = kept
            step.cosines[place], step.sines[place] = kept[0].data_ptr(), kept[1].data_ptr()


def _rows(hidden: Tensor) -> Tensor:
    return hidden if hidden.dtype == torch.float32 and hidden.is_contiguous() else hidden.float().contiguous()


def _library() -> ctypes.CDLL:
    """The kernels, with the types of the functions that are called here."""
    library = build.require_native_library()
    library.gristmill_stack.argtypes = (ctypes.POINTER(DecoderStruct), ctypes.c_int)
    library.gristmill_stack.restype = _POINTER
    library.gristmill_stack_free.argtypes = (_POINTER,)
    library.gristmill_stack_run.restype = ctypes.c_long
    library.gristmill_stack_run.argtypes = (_POINTER, ctypes.POINTER(_Step))
    library.gristmill_stack_logits.argtypes = (_POINTER, _POINTER, ctypes.c_long, _POINTER)
    library.gristmill_stack_greedy.argtypes = (_POINTER, _POINTER, ctypes.c_long, _POINTER, _POINTER)
    return library

"""Processes that hold one model together: rank 0 runs the engine, the others do as it says.

Orders (what to compute, which blocks to copy) travel as whole numbers in a group of their own, where the others wait
for the next one as long as it takes; all else gives up after `timeout`. So an engine may be idle, and a process that
is dead or silent in the middle of a step is an error, never a wait without end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor

from gristmill.engine.memory.paged_cache import Chunk, PagedKVCache
from gristmill.engine.runner import Runner, RunnerFactory, TorchRunner
from gristmill.errors import GristmillError, RequestError
from gristmill.model.transformer import Transformer

_IDLE = timedelta(days=365)
_KV_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


class Order(IntEnum):
    """What rank 0 tells the others to do with it."""

    STOP = 0
    ALLOCATE = 1
    STEP = 2
    LOGITS = 3
    COPY = 4
    READ = 5
    WRITE = 6


@dataclass(frozen=True, eq=False)
class Ranks:
    """Where this process stands. `states` carries tensors, `orders` what to do."""

    rank: int
    size: int
    device: torch.device
    states: dist.ProcessGroup
    orders: dist.ProcessGroup

    def tell(self, order: Order, numbers: Sequence[int] = ()) -> None:
        """Rank 0: give an order to all others."""
        dist.broadcast(torch.tensor([order, len(numbers)]), 0, group=self.orders)
        if numbers:
            dist.broadcast(torch.tensor(numbers), 0, group=self.orders)

    def hear(self) -> tuple[Order, list[int]]:
        """The others: wait for an order."""
        head = torch.empty(2, dtype=torch.long)
        dist.broadcast(head, 0, group=self.orders)
        numbers = torch.empty(int(head[1]), dtype=torch.long)
        if len(numbers):
            dist.broadcast(numbers, 0, group=self.orders)
        return Order(int(head[0])), numbers.tolist()

    def send(self, x: Tensor, to: int) -> None:
        """One tensor to another process, as bytes, so that every type travels."""
        if x.numel():
            dist.send(x.contiguous().flatten().view(torch.uint8), to, group=self.states)

    def receive(self, into: Tensor, source: int) -> Tensor:
        """Fill a contiguous tensor with what `send` sent."""
        if into.numel():
            dist.recv(into.flatten().view(torch.uint8), source, group=self.states)
        return into


def join(device: str | None = None, timeout: float = 60.0) -> Ranks:
    """Join the processes that torchrun has started: gloo on "cpu", nccl on "cuda" (the default where there is any).

    timeout: seconds after which another process that does not do its part of a step counts as dead. Raises
    GristmillError when the environment is not that of torchrun.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    backend = "nccl" if device == "cuda" else "gloo"
    place = torch.device(device, int(os.environ.get("LOCAL_RANK", "0"))) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise GristmillError(
                f"{', '.join(missing)} not set: start the processes with `torchrun --nproc-per-node N ...` "
                "(docs/scale-out.md)"
            )
        dist.init_process_group(backend)
    return Ranks(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=place,
        states=dist.new_group(backend=backend, timeout=timedelta(seconds=timeout)),
        # rank 0 waits for the others to take an order, they for the next one as long as it takes
        orders=dist.new_group(backend="gloo", timeout=_IDLE if dist.get_rank() else timedelta(seconds=timeout)),
    )


class Part(TorchRunner):
    """What one process holds of a model and of its key-value memory, and how the processes compute a step together.

    Every rank calls the same methods in the same order; what they return is whole on rank 0. The memory comes with
    `allocate`, when rank 0 knows how large it is.
    """

    along: int | None = None
    """The dimension of a memory's tensors that is split; None: rank 0 has it all."""
    splits_head = False
    """Whether the logits are computed by all."""

    def __init__(self, model: Transformer, ranks: Ranks) -> None:
        self.model, self.ranks, self.device = model, ranks, ranks.device
        self.weights_dtype, self.hidden_size = model.embed_tokens.weight.dtype, model.config.hidden_size
        self.shares = [1, *([0] * (ranks.size - 1))]
        """Of the split dimension, how much each rank has."""

    def allocate(self, num_blocks: int, block_size: int, kv_dtype: torch.dtype) -> None:
        """Make this process's share of the memory."""
        self.cache = self.make_cache(num_blocks, block_size, kv_dtype)

    def make_cache(self, num_blocks: int, block_size: int, kv_dtype: torch.dtype) -> PagedKVCache:
        """This process's share of the memory."""
        return PagedKVCache(self.model.config, num_blocks, block_size, kv_dtype, self.device)

    @property
    def kv_bytes_per_token(self) -> int:
        """Memory that one token takes, on all processes together."""
        return self.cache.bytes_per_token * sum(self.shares) // self.shares[self.ranks.rank]

    @torch.inference_mode()
    def gather_blocks(self, blocks: Sequence[int]) -> list[Tensor]:
        """On rank 0, what `read_blocks` of one process with the whole model would give."""
        own = self.read_blocks(blocks)
        if self.along is None:
            return own
        if self.ranks.rank:
            for x in own:
                self.ranks.send(x, 0)
            return own
        parts = [own] + [[self._receive(x, rank) for x in own] for rank in range(1, self.ranks.size)]
        return [torch.cat(same, self.along) for same in zip(*parts, strict=True)]

    @torch.inference_mode()
    def scatter_blocks(self, blocks: Sequence[int], data: Sequence[Tensor]) -> None:
        """Put what `gather_blocks` gave into blocks; `data` is given on rank 0."""
        if self.along is None:
            self.write_blocks(blocks, data)
        elif self.ranks.rank:
            slots = len(blocks) * self.cache.block_size
            empty = [store.new_empty((store.shape[0], slots, *store.shape[2:])) for store in self.cache.stores]
            self.write_blocks(blocks, [self.ranks.receive(x, 0) for x in empty])
        else:
            parts = [x.to(self.device).split(self.shares, self.along) for x in data]
            for rank in range(1, self.ranks.size):
                for part in parts:
                    self.ranks.send(part[rank], rank)
            self.write_blocks(blocks, [part[0] for part in parts])

    def _receive(self, like: Tensor, rank: int) -> Tensor:
        assert self.along is not None
        shape = list(like.shape)
        shape[self.along] = self.shares[rank]
        return self.ranks.receive(like.new_empty(shape), rank)


class GroupRunner:
    """`Runner` of rank 0: tells the others what it does, and does its own part."""

    def __init__(self, part: Part, num_blocks: int, block_size: int, kv_dtype: torch.dtype) -> None:
        self.part, self.ranks, self.device = part, part.ranks, part.device
        self._broken: str | None = None
        if kv_dtype not in _KV_DTYPES:
            raise RequestError(f"keys and values cannot be kept as {kv_dtype}", field="kv_dtype")
        with self._together(Order.ALLOCATE, (num_blocks, block_size, _KV_DTYPES.index(kv_dtype))):
            part.allocate(num_blocks, block_size, kv_dtype)

    def hidden_states(self, ids: Sequence[int], chunks: Sequence[Chunk]) -> Tensor:
        """See `Runner.hidden_states`."""
        with self._together(Order.STEP, _encode(ids, chunks)):
            return self.part.hidden_states(ids, chunks)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """See `Runner.logits`."""
        if not self.part.splits_head:
            return self.part.logits(hidden)
        with self._together(Order.LOGITS, (len(hidden),)):
            hidden = hidden.contiguous()
            dist.broadcast(hidden, 0, group=self.ranks.states)
            return self.part.logits(hidden)

    def greedy(self, hidden: Tensor) -> list[int]:
        """See `Runner.greedy`."""
        highest, best = self.logits(hidden).max(dim=-1)
        return torch.where(highest.isfinite(), best, -1).tolist()

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See `Runner.copy_blocks`."""
        with self._together(Order.COPY, [block for pair in pairs for block in pair]):
            self.part.copy_blocks(pairs)

    def read_blocks(self, blocks: Sequence[int]) -> list[Tensor]:
        """See `Runner.read_blocks`: as one process with the whole model would."""
        with self._together(Order.READ, blocks):
            return self.part.gather_blocks(blocks)

    def write_blocks(self, blocks: Sequence[int], data: Sequence[Tensor]) -> None:
        """See `Runner.write_blocks`."""
        with self._together(Order.WRITE, blocks):
            self.part.scatter_blocks(blocks, data)

    @property
    def kv_bytes_per_token(self) -> int:
        """See `Runner.kv_bytes_per_token`: on all processes together."""
        return self.part.kv_bytes_per_token

    @contextmanager
    def _together(self, order: Order, numbers: Sequence[int]) -> Iterator[None]:
        if self._broken is not None:
            raise GristmillError(self._broken)
        try:
            self.ranks.tell(order, numbers)
            yield
        except RuntimeError as error:  # what torch.distributed raises for a process that is gone or silent
            self._broken = (
                f"{order.name.lower()} failed on rank 0 of {self.ranks.size}, another process may be gone: start all "
                f"of them again ({error})"
            )
            raise GristmillError(self._broken) from error


@contextmanager
def lead(part: Part, kv_dtype: torch.dtype | None = None) -> Iterator[RunnerFactory]:
    """Rank 0: what to give to `Engine(runner=...)`, once. At the end the other ranks return from `serve_rank`.

    kv_dtype: type of keys and values, the weights' unless given.
    """

    def make(num_blocks: int, block_size: int) -> Runner:
        return GroupRunner(part, num_blocks, block_size, kv_dtype or part.weights_dtype)

    try:
        yield make
    finally:
        with suppress(RuntimeError):  # those that are gone need no telling
            part.ranks.tell(Order.STOP)


@torch.inference_mode()
def serve_rank(part: Part) -> None:
    """The other ranks: do what rank 0 says until it stops. Raises GristmillError when rank 0, or one of the others in
    the middle of a step, is gone."""
    ranks = part.ranks
    try:
        while True:
            order, numbers = ranks.hear()
            if order is Order.STOP:
                return
            _follow(part, order, numbers)
    except RuntimeError as error:
        raise GristmillError(f"rank {ranks.rank} of {ranks.size} stops, another process is gone ({error})") from error


def _follow(part: Part, order: Order, numbers: list[int]) -> None:
    if order is Order.ALLOCATE:
        part.allocate(numbers[0], numbers[1], _KV_DTYPES[numbers[2]])
    elif order is Order.STEP:
        part.hidden_states(*_decode(numbers))
    elif order is Order.LOGITS:
        hidden = torch.empty((numbers[0], part.hidden_size), dtype=part.weights_dtype, device=part.device)
        dist.broadcast(hidden, 0, group=part.ranks.states)
        part.logits(hidden)
    elif part.along is None:
        return  # the memory is rank 0's
    elif order is Order.COPY:
        part.copy_blocks(list(zip(numbers[::2], numbers[1::2], strict=True)))
    elif order is Order.READ:
        part.gather_blocks(numbers)
    else:
        part.scatter_blocks(numbers, ())


def _encode(ids: Sequence[int], chunks: Sequence[Chunk]) -> list[int]:
    """A step as whole numbers: the count of ids, the ids, and of each chunk start, length, count of blocks, blocks."""
    numbers = [len(ids), *ids]
    for chunk in chunks:
        numbers += [chunk.start, chunk.length, len(chunk.block_table), *chunk.block_table]
    return numbers


def _decode(numbers: list[int]) -> tuple[list[int], list[Chunk]]:
    at = numbers[0] + 1
    ids, chunks = numbers[1:at], []
    while at < len(numbers):
        start, length, blocks = numbers[at : at + 3]
        at += 3 + blocks
        chunks.append(Chunk(numbers[at - blocks : at], start, length))
    return ids, chunks

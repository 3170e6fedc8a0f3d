"""Batches by number: `batch(number)` depends on the number alone, so a resumed run goes on exactly where it stood.

A loader deals examples and hands them to `prepare`, an objective's. Each example comes with a key, from which all that
is random about it follows; so what it is packed with, and which process prepares it, makes no difference.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from gristmill.core import Batch
from gristmill.corpus.packing import Packing, pack
from gristmill.corpus.shards import TokenSource
from gristmill.errors import DataError
from gristmill.tokens.batch import PackedBatch

Key = tuple[int, ...]
"""Names an example and the epoch in which it comes; the seed is part of it."""

Prepare = Callable[[Sequence[Any], Sequence[Key]], Batch]
"""Examples and their keys -> a batch: `Objective.prepare`."""


def lay_end_to_end(segments: Sequence[Any], keys: Sequence[Key]) -> PackedBatch:
    """The segments as they are; all that next-token prediction needs."""
    return PackedBatch.from_segments(segments)


class EpochOrder:
    """The numbers below `count`, in another order each epoch, and how they are dealt to batches.

    An epoch is spread evenly: a batch has `per_batch` numbers or a few less, and none is a small leftover.
    """

    def __init__(self, count: int, per_batch: int, seed: int, shuffle: bool = True) -> None:
        self.count, self.seed, self.shuffle = count, seed, shuffle
        self.batches = -(-count // per_batch)
        """Batches of an epoch."""
        self._kept: tuple[int, np.ndarray] = (-1, np.arange(count))

    def of(self, epoch: int) -> np.ndarray:
        """All numbers in the order of an epoch, int64 of shape (count,)."""
        kept, order = self._kept  # the last one is kept, because batches mostly follow each other
        if self.shuffle and kept != epoch:
            order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.count)
            self._kept = (epoch, order)
        return order

    def deal(self, number: int) -> tuple[int, np.ndarray]:
        """The epoch of a batch, counted from 0 through all epochs, and its numbers."""
        if number < 0:
            raise ValueError(f"the number of a batch must be 0 or more, got {number}")
        epoch, place = divmod(number, self.batches)
        begin, end = (turn * self.count // self.batches for turn in (place, place + 1))
        return epoch, self.of(epoch)[begin:end]


class PackedLoader:
    """Packed rows of a token source, dealt into flat batches.

    Documents are packed once; each epoch deals the rows in another order, and every token comes exactly once an
    epoch. `prepare` gets each piece of a document as a segment (ids, mask or None) of its own, with the key
    (seed, epoch, document, start). The same arguments and source give the same batches. Raises DataError as `pack`
    does.
    """

    def __init__(
        self,
        source: TokenSource,
        *,
        row_length: int,
        rows_per_batch: int,
        seed: int,
        shuffle: bool = True,
        long_documents: Literal["cut", "refuse"] = "cut",
        prepare: Prepare = lay_end_to_end,
    ) -> None:
        """`row_length` is in tokens; `shuffle` False deals the rows in the same order each epoch (evaluation)."""
        if rows_per_batch < 1:
            raise ValueError(f"rows_per_batch must be at least 1, got {rows_per_batch}")
        self.source = source
        self.rows_per_batch = rows_per_batch
        self.seed = seed
        self.prepare = prepare
        self.packing: Packing = pack(source.lengths, row_length, seed=seed, long_documents=long_documents)
        self.order = EpochOrder(len(self.packing), rows_per_batch, seed, shuffle)

    @property
    def batches_per_epoch(self) -> int:
        """Batches in which every token comes once."""
        return self.order.batches

    @property
    def utilisation(self) -> float:
        """Share of the rows' room that holds tokens."""
        return self.packing.utilisation

    def rows(self, number: int) -> list[int]:
        """Row numbers of a batch; `number` counts from 0 through all epochs."""
        return [int(row) for row in self.order.deal(number)[1]]

    def batch(self, number: int) -> Batch:
        """The batch of a number. Raises DataError for ids outside the vocabulary, and as `prepare` does."""
        return self.prepare(*self.segments(*self.order.deal(number)))

    def segments(self, epoch: int, rows: np.ndarray) -> tuple[list[Any], list[Key]]:
        """The pieces of some rows, and their keys."""
        pieces = self.packing.pieces_of(rows)
        keys: list[Key] = [(self.seed, epoch, document, start) for document, start, _ in pieces.tolist()]
        return list(self.source.read(pieces)), keys


class ExampleLoader:
    """Examples of any kind, such as sentence pairs, dealt into batches of up to `examples_per_batch`.

    Each epoch deals them in another order, every example exactly once. The key of an example is (seed, epoch, index).
    Raises DataError when there is none.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        *,
        examples_per_batch: int,
        seed: int,
        prepare: Prepare,
        shuffle: bool = True,
    ) -> None:
        if examples_per_batch < 1:
            raise ValueError(f"examples_per_batch must be at least 1, got {examples_per_batch}")
        if len(examples) == 0:
            raise DataError("there are no examples to make batches of")
        self.examples, self.seed, self.prepare = examples, seed, prepare
        self.order = EpochOrder(len(examples), examples_per_batch, seed, shuffle)

    @property
    def batches_per_epoch(self) -> int:
        """Batches in which every example comes once."""
        return self.order.batches

    def batch(self, number: int) -> Batch:
        """The batch of a number, counted from 0 through all epochs. Raises DataError as `prepare` does."""
        epoch, indices = self.order.deal(number)
        chosen = indices.tolist()
        return self.prepare([self.examples[index] for index in chosen], [(self.seed, epoch, i) for i in chosen])

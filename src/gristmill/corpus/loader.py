"""Batches by number: `batch(step)` depends on the step alone, so a resumed run goes on exactly where it stood."""

from typing import Literal

import numpy as np

from gristmill.corpus.packing import Packing, pack
from gristmill.corpus.shards import TokenSource
from gristmill.tokens.batch import PackedBatch


class PackedLoader:
    """Packed rows of a token source, dealt into flat batches.

    Documents are packed once; each epoch deals the rows in another order, and every token comes exactly once an
    epoch. The rows of an epoch are spread evenly, so a batch has `rows_per_batch` rows or a few less and none is
    a small leftover. The same arguments and source give the same batches. Raises DataError as `pack` does.
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
    ) -> None:
        """`row_length` is in tokens; `shuffle` False deals the rows in the same order each epoch (evaluation)."""
        if rows_per_batch < 1:
            raise ValueError(f"rows_per_batch must be at least 1, got {rows_per_batch}")
        self.source = source
        self.rows_per_batch = rows_per_batch
        self.seed = seed
        self.shuffle = shuffle
        self.packing: Packing = pack(source.lengths, row_length, seed=seed, long_documents=long_documents)
        self._order: tuple[int, np.ndarray] = (-1, np.arange(len(self.packing)))

    @property
    def batches_per_epoch(self) -> int:
        """Batches in which every token comes once."""
        return -(-len(self.packing) // self.rows_per_batch)

    @property
    def utilisation(self) -> float:
        """Share of the rows' room that holds tokens."""
        return self.packing.utilisation

    def rows(self, step: int) -> list[int]:
        """Row numbers of a batch; `step` counts from 0 through all epochs."""
        if step < 0:
            raise ValueError(f"step must be 0 or more, got {step}")
        epoch, place = divmod(step, self.batches_per_epoch)
        begin = place * len(self.packing) // self.batches_per_epoch
        end = (place + 1) * len(self.packing) // self.batches_per_epoch
        return [int(row) for row in self._epoch_order(epoch)[begin:end]]

    def batch(self, step: int) -> PackedBatch:
        """The batch of a step: each piece of a document is a segment of its own."""
        pieces = [piece for row in self.rows(step) for piece in self.packing[row]]
        return PackedBatch.from_segments([self.source.piece(*piece) for piece in pieces])

    def _epoch_order(self, epoch: int) -> np.ndarray:
        # The order of one epoch is kept because steps mostly follow each other; it is always the same for an epoch.
        if self.shuffle and self._order[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._order = (epoch, generator.permutation(len(self.packing)))
        return self._order[1]

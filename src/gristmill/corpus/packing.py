"""Pack documents into rows of a fixed length, so that hardly any of a row is wasted and no token is lost.

Documents longer than a row are cut into full rows and a remainder. Within windows of the shuffled pieces, the
longest goes first, each into the fullest row that still has room (best-fit decreasing).

Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gristmill.errors import DataError

Piece = tuple[int, int, int]
"""(document, start, end): tokens start to end of a document."""


@dataclass(frozen=True, eq=False)
class Packing:
    """Rows of pieces. `packing[row]` is a list of (document, start, end); their lengths sum to at most row_length.

    `pieces` has shape (pieces, 3), grouped by row; row i owns pieces[offsets[i]:offsets[i + 1]].
    """

    pieces: np.ndarray
    offsets: np.ndarray
    row_length: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> list[Piece]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        begin, end = self.offsets[row : row + 2]
        return [(document, start, stop) for document, start, stop in self.pieces[begin:end].tolist()]

    def pieces_of(self, rows: np.ndarray) -> np.ndarray:
        """The pieces of some rows, one row after the other, shape (pieces, 3)."""
        spans = zip(self.offsets[rows].tolist(), self.offsets[rows + 1].tolist(), strict=True)
        return np.concatenate([self.pieces[begin:end] for begin, end in spans])

    def __iter__(self) -> Iterator[list[Piece]]:
        return (self[row] for row in range(len(self)))

    @property
    def tokens(self) -> int:
        """Tokens in all rows, which are all tokens of all documents."""
        return int((self.pieces[:, 2] - self.pieces[:, 1]).sum())

    @property
    def utilisation(self) -> float:
        """Tokens over the room of all rows, in (0, 1]."""
        return self.tokens / (len(self) * self.row_length)


def pack(
    lengths: Sequence[int] | np.ndarray,
    row_length: int,
    *,
    seed: int,
    window: int = 16_384,
    long_documents: Literal["cut", "refuse"] = "cut",
) -> Packing:
    """Pack documents of the given lengths, in tokens. Every token stands in exactly one piece.

    Depends on the arguments alone. `window` bounds how many pieces are sorted together. Raises DataError for no
    document, an empty one, or with `long_documents` "refuse" for one longer than a row.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if row_length < 1 or window < 1:
        raise DataError(f"row_length and window must be at least 1, got {row_length} and {window}")
    if len(sizes) == 0:
        raise DataError("there are no documents to pack")
    if sizes.min() < 1:
        raise DataError(f"document {int(sizes.argmin())} has no tokens")
    if long_documents == "refuse" and sizes.max() > row_length:
        worst = int(sizes.argmax())
        raise DataError(
            f"{int((sizes > row_length).sum())} documents are longer than a row of {row_length} tokens, the longest "
            f"is document {worst} with {sizes[worst]}. Use longer rows, or leave these documents out."
        )
    generator = np.random.Generator(np.random.PCG64(seed))
    pieces = _cut(sizes, generator.permutation(len(sizes)), row_length)
    rows: list[list[int]] = []
    for begin in range(0, len(pieces), window):
        piece_lengths = pieces[begin : begin + window, 2] - pieces[begin : begin + window, 1]
        rows.extend([begin + item for item in row] for row in _best_fit_decreasing(piece_lengths, row_length))
    order = generator.permutation(len(rows))
    counts = np.array([len(rows[row]) for row in order], dtype=np.int64)
    members = np.array([piece for row in order for piece in rows[row]], dtype=np.int64)
    return Packing(pieces[members], np.concatenate([[0], np.cumsum(counts)]), row_length)


def _cut(sizes: np.ndarray, order: np.ndarray, row_length: int) -> np.ndarray:
    """Pieces (document, start, end) of the documents in the given order, none longer than a row."""
    counts = -(-sizes[order] // row_length)
    documents = np.repeat(order, counts)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    starts = (np.arange(len(documents)) - firsts) * row_length
    return np.stack([documents, starts, np.minimum(starts + row_length, sizes[documents])], axis=1)


def _best_fit_decreasing(lengths: np.ndarray, row_length: int) -> list[list[int]]:
    """Rows of item numbers. Open rows lie in stacks by the room they have left; a bit set tells the stacks in use."""
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    available = 0
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        roomy = available >> length
        if roomy:
            room = length + (roomy & -roomy).bit_length() - 1  # the least room that is enough
            row = by_room[room].pop()
            if not by_room[room]:
                available ^= 1 << room
            rows[row].append(item)
        else:
            room, row = row_length, len(rows)
            rows.append([item])
        left = room - length
        if left:
            by_room[left].append(row)
            available |= 1 << left
    return rows

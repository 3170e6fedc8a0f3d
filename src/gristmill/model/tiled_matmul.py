"""Matrix products in two levels of tiles: the readable reference of what a device does with a large product.

Above, blocks of both matrices that fit the device's memory are sent there one pair at a time. Below, each block product
is made of tiles small enough for fast memory; every tile of the result is independent of the others, so that a kernel
computes them in parallel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gristmill.errors import RequestError


def tiled_matmul(a: Tensor, b: Tensor, *, block: int, tile: int, device: torch.device | str | None = None) -> Tensor:
    """a (rows, inner) times b (inner, columns), on the device and in the type of `a`.

    At most two blocks of the arguments and one of the result, each `block` x `block`, are on `device` (None: that of
    `a`) at a time; they are multiplied in tiles of `tile` x `tile`. No size needs to be a multiple of either. Sums of
    half precision are formed in float32. Raises RequestError when the arguments do not fit together.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or a.dtype != b.dtype:
        raise RequestError(
            f"a (rows, inner) and b (inner, columns) must be matrices of one type, got {a.dtype} {tuple(a.shape)} "
            f"and {b.dtype} {tuple(b.shape)}"
        )
    if not 1 <= tile <= block:
        raise RequestError(f"tile must be at least 1 and at most block ({block}), got {tile}", field="tile")
    place = a.device if device is None else torch.device(device)
    wide = torch.float32 if a.dtype in (torch.float16, torch.bfloat16) else a.dtype
    out = a.new_empty(a.shape[0], b.shape[1])
    for rows in _pieces(a.shape[0], block):
        for columns in _pieces(b.shape[1], block):
            total = torch.zeros(rows.stop - rows.start, columns.stop - columns.start, dtype=wide, device=place)
            for inner in _pieces(a.shape[1], block):
                _add_product(total, a[rows, inner].to(place, wide), b[inner, columns].to(place, wide), tile)
            out[rows, columns] = total.to(out)
    return out


def _add_product(total: Tensor, a: Tensor, b: Tensor, tile: int) -> None:
    """total += a b. One tile of `total` reads a row of tiles of `a` and a column of tiles of `b`."""
    for rows in _pieces(a.shape[0], tile):
        for columns in _pieces(b.shape[1], tile):
            for inner in _pieces(a.shape[1], tile):
                total[rows, columns] += a[rows, inner] @ b[inner, columns]


def _pieces(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))

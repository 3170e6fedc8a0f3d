"""A product in tiles is the product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.errors import RequestError
from gristmill.model.tiled_matmul import tiled_matmul

sizes = st.integers(1, 23)


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, sizes, st.integers(1, 9), st.integers(0, 8), st.integers(0, 99))
def test_integers_are_exact(rows: int, inner: int, columns: int, tile: int, more: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(-1000, 1000, (rows, inner), generator=generator)
    b = torch.randint(-1000, 1000, (inner, columns), generator=generator)
    assert torch.equal(tiled_matmul(a, b, block=tile + more, tile=tile), a @ b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sizes_that_are_no_multiple_of_the_tile(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((67, 45), (45, 31)))
    found = tiled_matmul(a, b, block=32, tile=7)
    assert found.dtype == dtype
    # half precision is summed in float32 and rounded once
    wide = (a.float() @ b.float()).to(dtype) if dtype == torch.bfloat16 else a @ b
    torch.testing.assert_close(found, wide)


def test_no_more_than_three_blocks_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is multiplied is a tile, and everything that is sent a block."""
    sent: list[torch.Size] = []
    plain = torch.Tensor.to

    def to(tensor: torch.Tensor, *arguments: object) -> torch.Tensor:
        sent.append(tensor.shape)
        return plain(tensor, *arguments)

    monkeypatch.setattr(torch.Tensor, "to", to)
    tiled_matmul(torch.ones(10, 9), torch.ones(9, 11), block=4, tile=3, device="cpu")
    assert len(sent) == 3 * 3 * (2 * 3 + 1)  # for every block of the result three pairs, and itself back
    assert all(max(shape) <= 4 for shape in sent)


def test_what_does_not_fit_is_refused() -> None:
    for a, b in ((torch.ones(2, 3), torch.ones(2, 3)), (torch.ones(2, 2), torch.ones(2, 2).long())):
        with pytest.raises(RequestError, match="must be matrices of one type"):
            tiled_matmul(a, b, block=2, tile=1)
    for tile in (0, 3):
        with pytest.raises(RequestError, match="tile"):
            tiled_matmul(torch.ones(2, 2), torch.ones(2, 2), block=2, tile=tile)

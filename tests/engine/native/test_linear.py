"""Packed native layers against plain ones, with and without the instructions that only some processors have."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill.engine.native.build import native_library, native_refusal
from gristmill.engine.native.linear import (
    KINDS,
    Int8Only,
    Kind,
    NativeLinear,
    allocate,
    argmax_rows,
    of_kind,
    pack,
    packed_bytes,
)
from gristmill.errors import CheckpointError, RequestError
from gristmill.model.int8 import Int8Linear, quantise
from gristmill.model.quantised.weights import Int4Weight, Int8Weight, round_to_nearest
from gristmill.model.quantised.weights import pack as pack_codes

pytestmark = [
    pytest.mark.peer,  # needs a C++ compiler
    pytest.mark.skipif(native_library() is None, reason=str(native_refusal())),
]
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes = st.integers(1, 100)


@pytest.fixture(params=["1", "portable"])
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("GRISTMILL_NATIVE", request.param)
    if reason := native_refusal():
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rounded(x: Tensor, group: int) -> Tensor:
    """Activations as int4 layers see them: eight bits, one scale per group."""
    whole, scale = quantise(x.unflatten(1, (-1, group)))
    return (whole.float() * scale).flatten(1)


def close(out: Tensor, exact: Tensor, terms: Tensor, tolerance: float) -> bool:
    """Every value within `tolerance` of the sum of its terms' magnitudes, which is what rounding scales with."""
    return bool(((out - exact).abs() <= tolerance * terms + 1e-30).all())


@quick
@given(out=sizes, inputs=sizes, rows=st.integers(1, 40), bias=st.booleans(), seed=st.integers(0, 99))
def test_float32_equals_linear(build: str, out: int, inputs: int, rows: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    w, x, b = torch.randn(out, inputs), torch.randn(rows, inputs), torch.randn(out) if bias else None
    exact = F.linear(x.double(), w.double(), None if b is None else b.double())
    terms = F.linear(x.abs(), w.abs(), None if b is None else b.abs())
    assert close(NativeLinear(w, b)(x), exact, terms, 1e-5)


@quick
@given(out=sizes, inputs=sizes, rows=st.integers(1, 40), bias=st.booleans(), seed=st.integers(0, 99))
def test_bfloat16_is_exact_but_for_the_sum(build: str, out: int, inputs: int, rows: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    w, x, b = torch.randn(out, inputs).bfloat16(), torch.randn(rows, inputs), torch.randn(out) if bias else None
    seen = x.bfloat16()
    exact = F.linear(seen.double(), w.double(), None if b is None else b.double())
    terms = F.linear(seen.float().abs(), w.float().abs(), None if b is None else b.abs())
    assert close(NativeLinear(w, b)(x), exact, terms, 1e-5)
    own = NativeLinear(w, b)(seen)  # in and out in bfloat16: one rounding at the end
    assert own.dtype == torch.bfloat16
    assert close(own.float(), exact.float(), terms, 1e-5 + 2**-8)


@quick
@given(out=sizes, inputs=sizes, rows=st.integers(1, 40), bias=st.booleans(), seed=st.integers(0, 99))
def test_int8_equals_the_reference(build: str, out: int, inputs: int, rows: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    w, x, b = torch.randn(out, inputs), torch.randn(rows, inputs), torch.randn(out) if bias else None
    x[0] *= 1e-3
    layer = NativeLinear(of_kind(w, "int8"), b)
    reference = Int8Linear(w, b)(x)
    assert layer.kind == "int8"
    assert torch.allclose(layer(x), reference, rtol=1e-6, atol=1e-6 * float(reference.abs().max()))


@quick
@given(out=sizes, inputs=sizes, rows=st.integers(1, 40), bias=st.booleans(), seed=st.integers(0, 99))
def test_int8_weights_leave_activations_as_they_are(
    build: str, out: int, inputs: int, rows: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    w, x, b = torch.randn(out, inputs), torch.randn(rows, inputs), torch.randn(out) if bias else None
    weight = of_kind(w, "int8_weights")
    assert isinstance(weight, Int8Only)
    layer, dense = NativeLinear(weight, b), weight.dequantised()
    exact = F.linear(x.double(), dense.double(), None if b is None else b.double())
    assert layer.kind == "int8_weights"
    assert close(layer(x), exact, F.linear(x.abs(), dense.abs(), None if b is None else b.abs()), 1e-5)


@quick
@given(
    out=sizes,
    groups=st.integers(1, 4),
    group=st.sampled_from([32, 64, 128]),
    rows=st.integers(1, 40),
    scale=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_int4_equals_the_dequantised_product(
    build: str, out: int, groups: int, group: int, rows: int, scale: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    codes = torch.randint(-8, 8, (out, groups * group), dtype=torch.int8)
    scales = (torch.randn(out, groups) * 0.01).to(scale).float()
    if scale == torch.float16:
        scales[0, 0] = 2.0**-24  # its smallest
    weight, b = Int4Weight(pack_codes(codes), scales), torch.randn(out)
    x = rounded(torch.randn(rows, groups * group), group)
    dense = weight.dequantised()
    exact = F.linear(x.double(), dense.double(), b.double())
    assert close(NativeLinear(weight, b)(x), exact, F.linear(x.abs(), dense.abs(), b.abs()), 1e-5)


def test_int4_activations_keep_an_outlier_in_its_group(build: str) -> None:
    torch.manual_seed(0)
    weight = round_to_nearest(torch.randn(40, 128), 4)
    x = torch.randn(3, 128)
    x[:, 5] = 1e4
    out = NativeLinear(weight)(x)
    assert torch.allclose(out, rounded(x, 32) @ weight.dequantised().T, rtol=1e-5, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_products_do_not_overflow(build: str, kind: Kind) -> None:
    weight, x = torch.full((33, 8192), -0.5), torch.full((13, 8192), 2.0)
    x[1] *= -1
    out = NativeLinear(of_kind(weight, kind))(x)
    assert torch.allclose(out, F.linear(x, weight), rtol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("threads")
def test_a_row_depends_neither_on_the_others_nor_on_threads(build: str, kind: Kind) -> None:
    torch.manual_seed(0)
    layer, x = NativeLinear(of_kind(torch.randn(100, 160), kind), torch.randn(100)), torch.randn(40, 160)
    alone = torch.cat([layer(row[None]) for row in x])
    for count in (1, 2):
        torch.set_num_threads(count)
        for rows in (1, 2, 5, 12, 13, 25, 40):
            assert torch.equal(layer(x[:rows]), alone[:rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_spoils_itself_alone(build: str, kind: Kind, value: float) -> None:
    torch.manual_seed(0)
    layer, x = NativeLinear(of_kind(torch.randn(50, 64), kind)), torch.randn(5, 64)
    fine = layer(x)
    x[2, 63] = value
    out = layer(x)
    assert not out[2].isfinite().any()
    others = [0, 1, 3, 4]
    assert torch.equal(out[others], fine[others])


@pytest.mark.parametrize("kind", KINDS)
def test_zero_rows_and_rows_of_zeros(build: str, kind: Kind) -> None:
    bias = torch.randn(17)
    layer = NativeLinear(of_kind(torch.randn(17, 32), kind), bias)
    assert layer(torch.empty(0, 32)).shape == (0, 17)
    assert torch.equal(layer(torch.zeros(2, 3, 32)), bias.expand(2, 3, 17))


def test_packs_into_memory_of_the_caller_and_outlives_what_it_came_from() -> None:
    weight, x = torch.randn(64, 96), torch.randn(3, 96)
    expected = F.linear(x, weight)
    arena = allocate(2 * packed_bytes(weight) + (4 << 20))  # large enough for huge pages
    layer = NativeLinear(weight)
    again = pack(weight, memory=arena[4096:])
    assert torch.equal(again.memory[: packed_bytes(weight)], layer.packed.memory)
    weight.zero_()
    twin = copy.deepcopy(layer)
    del layer
    assert torch.allclose(twin(x), expected, atol=1e-4)
    with pytest.raises(CheckpointError, match="aligned to 64"):
        pack(weight, memory=arena[1:])
    with pytest.raises(CheckpointError, match=f"need {packed_bytes(weight)} bytes"):
        pack(weight, memory=arena[:64])


def test_the_packed_form_is_no_larger_than_it_need_be() -> None:
    weight = torch.randn(64, 128)
    bits = {kind: 8 * packed_bytes(of_kind(weight, kind)) / weight.numel() for kind in KINDS}
    eight = 8 + 32 / 128
    assert bits == {"float32": 32, "bfloat16": 16, "int8": eight, "int4": 4 + 16 / 32, "int8_weights": eight}


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(RequestError, match="Did you mean int4"):
        of_kind(torch.ones(2, 32), "int44")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="group_size 48"):
        of_kind(torch.ones(2, 96), "int4", 48)
    with pytest.raises(CheckpointError, match="groups of 32"):
        of_kind(torch.ones(2, 40), "int4")
    for weight in (torch.ones(3), torch.ones(2, 2, dtype=torch.float64), torch.ones(0, 4)):
        with pytest.raises(CheckpointError):
            pack(weight)
    with pytest.raises(CheckpointError, match="bias"):
        pack(torch.ones(3, 4), torch.ones(4))
    with pytest.raises(ValueError, match="rows of 4 values"):
        NativeLinear(torch.ones(3, 4))(torch.ones(2, 5))


def test_canonical_int8_is_taken_as_it_is() -> None:
    weight = Int8Weight(torch.tensor([[127, -127, 1], [0, 5, -3]], dtype=torch.int8), torch.tensor([[0.5], [2.0]]))
    out = NativeLinear(weight, torch.tensor([1.0, 0.0]))(torch.tensor([[127.0, 1.0, -2.0]]))
    assert out.tolist() == [[(127 * 127 - 127 - 2) * 0.5 + 1, (5 + 6) * 2.0]]


@quick
@given(rows=st.integers(0, 5), vocab=st.integers(1, 70), seed=st.integers(0, 99), nan=st.booleans())
def test_argmax_of_rows(build: str, rows: int, vocab: int, seed: int, nan: bool) -> None:
    torch.manual_seed(seed)
    logits = torch.randint(-3, 3, (rows, vocab)).float()  # ties: the first counts
    logits[1::2] = -float("inf")
    bad = nan and rows > 0
    if bad:
        logits[-1, seed % vocab] = float("nan")
    index, value = argmax_rows(logits)
    for row in range(rows - bad):
        assert index[row] == logits[row].tolist().index(max(logits[row].tolist()))
        assert value[row] == logits[row].max()
    if bad:
        assert index[-1] == -1
        assert value[-1].isnan()

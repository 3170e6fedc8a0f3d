"""Norm, feed-forward and rotary positions: worked numbers and the layers of transformers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gristmill.model.feedforward import SwiGLU
from gristmill.model.norm import RMSNorm
from gristmill.model.positions import apply_rope, rope_tables


def test_rms_norm_worked_example() -> None:
    norm = RMSNorm(4, 1e-12)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.allclose(norm(x), torch.tensor([0.365148, 0.730297, 1.095445, 1.460593]), atol=1e-5)
    assert torch.allclose(norm(3 * x), norm(x), atol=1e-6)
    assert not torch.allclose(norm(x + 1), norm(x), atol=1e-2)


@pytest.mark.peer
def test_rms_norm_equals_transformers_and_torch() -> None:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    ours, theirs, torchs = RMSNorm(16, 1e-5), modeling.LlamaRMSNorm(16, 1e-5), torch.nn.RMSNorm(16, 1e-5)
    with torch.no_grad():
        for norm in (ours, theirs, torchs):
            norm.weight.copy_(torch.linspace(0.5, 2, 16))
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert torch.allclose(ours(x), torchs(x), atol=1e-6)


def test_swiglu_worked_example() -> None:
    layer = SwiGLU(2, 2)
    with torch.no_grad():
        layer.gate_up_proj.weight.copy_(torch.cat((torch.eye(2), torch.diag(torch.tensor([2.0, 3.0])))))
        layer.down_proj.weight.copy_(torch.eye(2))
        found = layer(torch.tensor([1.0, 2.0]))
    assert torch.allclose(found, torch.tensor([1.462117, 10.569565]), atol=1e-5)


@pytest.mark.peer
def test_swiglu_equals_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    shape = SimpleNamespace(hidden_size=6, intermediate_size=10, mlp_bias=False, hidden_act="silu")
    theirs, ours = modeling.LlamaMLP(shape), SwiGLU(6, 10)
    with torch.no_grad():
        ours.gate_up_proj.weight.copy_(torch.cat((theirs.gate_proj.weight, theirs.up_proj.weight)))
        ours.down_proj.weight.copy_(theirs.down_proj.weight)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)


def rotate(x: list[float], position: float, theta: float = 10_000.0) -> torch.Tensor:
    """One head in the interleaved order of the formula, rotated by the half-split code."""
    pairs = torch.tensor(x).view(-1, 2)
    tables = rope_tables(torch.tensor([position]), len(x), theta, torch.float32)
    halves = apply_rope(pairs.T.reshape(1, 1, -1), tables)
    return halves.view(2, -1).T.flatten()


def test_rotary_positions_worked_examples() -> None:
    found = rotate([1.0, 2.0, 3.0, 4.0], 1)
    assert torch.allclose(found, torch.tensor([-1.142640, 1.922076, 2.959851, 4.029800]), atol=1e-5)
    assert torch.allclose(rotate([1.0, 2.0], torch.pi / 2), torch.tensor([-2.0, 1.0]), atol=1e-5)
    for first, second in ((7, 3), (9, 5)):  # one distance, one score
        one, other = rotate([1.0, 2.0], first * 0.1), rotate([2.0, 1.0], second * 0.1)
        assert float(one @ other) == pytest.approx(2.515989, abs=1e-5)
        product = torch.view_as_complex(one) * torch.view_as_complex(other).conj()
        assert float(product.real) == pytest.approx(2.515989, abs=1e-5)


def test_rotary_positions_keep_norms_and_see_only_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 6, 3, 16, generator=generator)

    def scores(shift: int) -> torch.Tensor:
        tables = rope_tables(torch.arange(6) + shift, 16, 10_000.0, torch.float32)
        rotated = apply_rope(query, tables)
        assert torch.allclose(rotated.norm(dim=-1), query.norm(dim=-1), atol=1e-5)
        return torch.einsum("qhd,khd->hqk", rotated, apply_rope(key, tables))

    assert torch.allclose(scores(0), scores(100), atol=1e-3)


@pytest.mark.peer
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rotary_positions_equal_transformers_far_out(theta: float) -> None:
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=1, rope_parameters={"rope_type": "default", "rope_theta": theta}
    )
    positions = torch.tensor([0, 1, 17, 8191, 131_071])
    x = torch.randn(5, 1, 64, generator=torch.Generator().manual_seed(0))
    cos, sin = modeling.LlamaRotaryEmbedding(config)(x, positions[None])
    theirs, _ = modeling.apply_rotary_pos_emb(x[:, 0], x[:, 0], cos[0], sin[0], unsqueeze_dim=0)
    ours = apply_rope(x, rope_tables(positions, 64, theta, torch.float32))
    assert torch.allclose(ours[:, 0], theirs.view(5, 64), atol=1e-6)

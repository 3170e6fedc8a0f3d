"""Mixture of experts: the plain loop, load balancing, and the layers of transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gristmill.errors import CheckpointError
from gristmill.model.config import MoEConfig
from gristmill.model.moe import (
    MixtureOfExperts,
    Routing,
    collect_router_stats,
    load_balancing_loss,
    reference_mixture,
    update_correction_bias,
)

SOFTMAX = MoEConfig(num_experts=8, top_k=2, intermediate_size=12)
SIGMOID = MoEConfig(
    num_experts=8,
    top_k=3,
    intermediate_size=12,
    shared_intermediate_size=10,
    scoring="sigmoid",
    scale=2.5,
    correction_bias=True,
    num_groups=4,
    top_groups=2,
    group_score="top2",
)


def mixture(config: MoEConfig, seed: int = 0) -> MixtureOfExperts:
    """A random mixture over 16 values whose correction bias matters."""
    torch.manual_seed(seed)
    moe = MixtureOfExperts(16, config)
    if moe.router.correction_bias is not None:
        moe.router.correction_bias.normal_(0.0, 0.2)
    return moe


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["softmax", "sigmoid"]),
    st.booleans(),
    st.sampled_from([0, 10]),
    st.booleans(),
    st.sampled_from([(1, 1, "max"), (4, 2, "max"), (2, 1, "top2")]),
    st.integers(1, 4),
    st.integers(0, 9),
)
def test_the_sorted_form_equals_the_loop_over_tokens(
    scoring: Any, normalise: bool, shared: int, bias: bool, groups: Any, top_k: int, count: int
) -> None:
    moe = mixture(
        MoEConfig(
            num_experts=8,
            top_k=top_k,
            intermediate_size=12,
            shared_intermediate_size=shared,
            scoring=scoring,
            normalise=normalise,
            scale=1.5,
            correction_bias=bias,
            num_groups=groups[0],
            top_groups=groups[1],
            group_score=groups[2],
        )
    )
    x = tokens(count)
    if count == 0:
        assert moe(x).shape == x.shape
        return
    assert torch.allclose(moe(x), reference_mixture(moe, x), atol=1e-6)


@pytest.mark.parametrize("config", [SOFTMAX, SIGMOID])
def test_gradients_equal_those_of_the_loop(config: MoEConfig) -> None:
    moe = mixture(config)
    found = []
    for form in (moe, lambda x: reference_mixture(moe, x)):
        x = tokens(20).requires_grad_()
        moe.zero_grad()
        form(x).square().sum().backward()
        found.append([x.grad, *(parameter.grad for parameter in moe.parameters())])
    for ours, plain in zip(*found, strict=True):
        assert ours is not None
        assert ours.abs().max() > 0
        assert torch.allclose(ours, plain, atol=1e-5)


def test_no_token_is_dropped_when_all_choose_the_same_expert() -> None:
    moe = mixture(dataclasses.replace(SOFTMAX, top_k=1))
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[3] = 1.0
    x = tokens(50).abs()
    counts = moe.router(x).counts()
    assert counts.tolist() == [0, 0, 0, 50, 0, 0, 0, 0]
    assert torch.allclose(moe(x), reference_mixture(moe, x), atol=1e-6)


def test_tokens_do_not_see_each_other() -> None:
    moe, x = mixture(SIGMOID), tokens(24)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(moe(x[order]), moe(x)[order], atol=1e-6)
    assert torch.allclose(moe(x.view(4, 6, 16)), moe(x).view(4, 6, 16))


def test_only_the_best_groups_are_chosen_from_and_the_bias_only_chooses() -> None:
    moe, x = mixture(SIGMOID), tokens(200)
    routing = moe.router(x)
    assert max(len(set(row)) for row in (routing.experts // 2).tolist()) <= 2  # groups of two experts
    scores = (x @ moe.router.weight.T).sigmoid().gather(1, routing.experts)
    expected = 2.5 * scores / scores.sum(dim=-1, keepdim=True)
    assert torch.allclose(routing.weights, expected, atol=1e-6)
    assert torch.allclose(routing.probabilities.sum(dim=-1), torch.ones(200))
    assert moe.router.correction_bias is not None
    moe.router.correction_bias.zero_()
    assert not torch.equal(moe.router(x).experts, routing.experts)


def test_impossible_routers_are_refused() -> None:
    with pytest.raises(CheckpointError, match="top_groups"):
        mixture(MoEConfig(num_experts=8, top_k=3, intermediate_size=4, num_groups=4, top_groups=1))
    with pytest.raises(CheckpointError, match="top2"):
        mixture(MoEConfig(num_experts=4, top_k=1, intermediate_size=4, num_groups=4, top_groups=2, group_score="top2"))


def test_the_bias_is_saved_and_the_switches_are_not() -> None:
    names = set(mixture(SIGMOID).state_dict())
    assert names == {
        "router.weight",
        "router.correction_bias",
        "gate_up_proj",
        "down_proj",
        "shared_expert.gate_up_proj.weight",
        "shared_expert.down_proj.weight",
    }
    assert set(mixture(SOFTMAX).state_dict()) == {"router.weight", "gate_up_proj", "down_proj"}


def test_statistics_are_kept_per_layer_and_only_inside_the_context() -> None:
    model = nn.Sequential(mixture(SOFTMAX, 0), nn.Tanh(), mixture(SOFTMAX, 1))
    with collect_router_stats(model) as stats:
        model(tokens(10))
        model(tokens(6, seed=1))
    model(tokens(5))
    assert {name: [len(part.experts) for part in parts] for name, parts in stats.layers.items()} == {
        "0": [10, 6],
        "2": [10, 6],
    }
    assert int(stats.counts("0").sum()) == 16 * 2
    with pytest.raises(RuntimeError, match="inside"), collect_router_stats(model):
        raise RuntimeError("inside")
    assert not any(part._forward_hooks for part in model.modules())


def test_balancing_loss_is_least_when_all_experts_are_used_alike() -> None:
    even = Routing(torch.full((8, 4), 0.25), torch.ones(8, 2), torch.arange(16).view(8, 2) % 4, torch.zeros(8, 4))
    skewed = Routing(
        torch.eye(4)[torch.zeros(8, dtype=torch.long)], torch.ones(8, 1), torch.zeros(8, 1).long(), torch.zeros(8, 4)
    )
    for routing, expected in ((even, 2.0), (skewed, 4.0)):
        with collect_router_stats(nn.Identity()) as stats:
            pass
        stats.layers["moe"] = [routing]
        assert float(load_balancing_loss(stats)) == pytest.approx(expected)


def test_balancing_loss_needs_a_mixture() -> None:
    with collect_router_stats(nn.Linear(2, 2)) as stats:
        pass
    with pytest.raises(CheckpointError, match="mixture"):
        load_balancing_loss(stats)
    with pytest.raises(CheckpointError, match="correction_bias"):
        update_correction_bias(mixture(SOFTMAX), torch.zeros(8))


def spread(counts: Tensor) -> float:
    return float(counts.max() / counts.float().mean())


def test_the_loss_evens_the_load() -> None:
    moe, x = mixture(SOFTMAX), tokens(256)
    optimiser = torch.optim.SGD([moe.router.weight], lr=1.0)
    with torch.no_grad():
        moe.router.weight[0] += 0.3 * x.mean(dim=0) / x.mean(dim=0).norm() * 4
    before = spread(moe.router(x).counts())
    for _ in range(40):
        with collect_router_stats(moe) as stats:
            moe(x)
        optimiser.zero_grad()
        load_balancing_loss(stats).backward()
        optimiser.step()
    assert spread(moe.router(x).counts()) < 0.8 * before


def test_the_bias_evens_the_load_without_a_loss() -> None:
    moe, x = mixture(dataclasses.replace(SIGMOID, num_groups=1, top_groups=1, group_score="max")), tokens(512)
    weights = moe.router.weight.detach().clone()
    before = spread(moe.router(x).counts())
    for _ in range(200):
        counts = moe.router(x).counts()
        update_correction_bias(moe, counts, rate=0.005)
    assert before > 1.3 > 1.1 > spread(moe.router(x).counts())
    assert torch.equal(moe.router.weight, weights)
    assert moe.router.correction_bias is not None
    bias = moe.router.correction_bias.clone()
    update_correction_bias(moe, torch.tensor([9, 1, 5, 5, 5, 5, 5, 5]), rate=0.5)
    moved = moe.router.correction_bias - bias
    assert torch.allclose(moved, torch.tensor([-0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]), atol=1e-6)


def transplant(ours: MixtureOfExperts, theirs: Any) -> None:
    """Random weights for theirs, and the same for ours."""
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
        ours.router.weight.copy_(theirs.gate.weight)
        ours.gate_up_proj.copy_(theirs.experts.gate_up_proj)
        ours.down_proj.copy_(theirs.experts.down_proj)
        if ours.shared_expert is not None:
            shared = theirs.shared_experts
            ours.shared_expert.gate_up_proj.weight.copy_(torch.cat((shared.gate_proj.weight, shared.up_proj.weight)))
            ours.shared_expert.down_proj.weight.copy_(shared.down_proj.weight)
        if ours.router.correction_bias is not None:
            theirs.gate.e_score_correction_bias.normal_(generator=torch.Generator().manual_seed(5))
            ours.router.correction_bias.copy_(theirs.gate.e_score_correction_bias)


def _same(ours: MixtureOfExperts, theirs: Any) -> None:
    transplant(ours, theirs)
    x = tokens(40)
    assert torch.allclose(ours(x), theirs(x[None])[0], atol=1e-5)


@pytest.mark.peer
def test_mixtral() -> None:
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    shape = transformers.MixtralConfig(hidden_size=16, intermediate_size=12, num_local_experts=8, num_experts_per_tok=2)
    _same(mixture(SOFTMAX), modeling.MixtralSparseMoeBlock(shape))


@pytest.mark.peer
@pytest.mark.parametrize("normalise", [True, False])
def test_qwen3(normalise: bool) -> None:
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    shape = transformers.Qwen3MoeConfig(
        hidden_size=16, moe_intermediate_size=12, num_experts=8, num_experts_per_tok=4, norm_topk_prob=normalise
    )
    config = dataclasses.replace(SOFTMAX, top_k=4, normalise=normalise)
    _same(mixture(config), modeling.Qwen3MoeSparseMoeBlock(shape))


@pytest.mark.peer
@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_deepseek_v2(method: str) -> None:
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.deepseek_v2.modeling_deepseek_v2")
    shape = transformers.DeepseekV2Config(
        hidden_size=16,
        num_attention_heads=4,
        moe_intermediate_size=12,
        n_routed_experts=8,
        n_shared_experts=2,
        num_experts_per_tok=3,
        topk_method=method,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.7,
    )
    grouped = {"num_groups": 4, "top_groups": 2} if method != "greedy" else {}
    config = MoEConfig(
        num_experts=8,
        top_k=3,
        intermediate_size=12,
        shared_intermediate_size=24,
        normalise=False,
        scale=1.7,
        **grouped,
    )
    _same(mixture(config), modeling.DeepseekV2Moe(shape))


@pytest.mark.peer
def test_deepseek_v3() -> None:
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    shape = transformers.DeepseekV3Config(
        hidden_size=16,
        moe_intermediate_size=12,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    )
    _same(mixture(dataclasses.replace(SIGMOID, shared_intermediate_size=12)), modeling.DeepseekV3MoE(shape))


@pytest.mark.peer
def test_balancing_loss_equals_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    model = nn.Sequential(mixture(SOFTMAX, 0), nn.Tanh(), mixture(SOFTMAX, 1))
    x = tokens(30)
    with collect_router_stats(model) as stats:
        model(x)
    middle = model[1](model[0](x))
    logits = (x @ model[0].router.weight.T, middle @ model[2].router.weight.T)
    theirs = modeling.load_balancing_loss_func(logits, num_experts=8, top_k=2)
    assert torch.allclose(load_balancing_loss(stats), theirs, atol=1e-5)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_the_grouped_product_equals_one_by_one(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has the grouped product on the CPU too, for its meaning and not for speed: there it is only checked."""
    torch.manual_seed(0)
    moe = MixtureOfExperts(128, MoEConfig(num_experts=8, top_k=2, intermediate_size=64)).to(device, torch.bfloat16)
    with torch.no_grad():
        moe.router.weight[5] = -100.0  # an expert without tokens
    x = torch.rand(300, 128, device=device, dtype=torch.bfloat16)
    outputs, gradients, called = [], [], []
    grouped_mm = torch.nn.functional.grouped_mm
    monkeypatch.setattr(
        torch.nn.functional, "grouped_mm", lambda *args, **more: called.append(1) or grouped_mm(*args, **more)
    )
    for grouped in (True, False):
        moe.grouped = grouped
        monkeypatch.setattr(moe, "_can_group", (lambda rows: moe.grouped) if device == "cpu" else moe._can_group)
        moe.zero_grad()
        y = moe(x)
        y.float().square().sum().backward()
        outputs.append(y)
        gradients.append([parameter.grad for parameter in moe.parameters()])
        assert len(called) == 2  # both products of the grouped pass, none of the other
    assert torch.allclose(*outputs, atol=2e-2, rtol=2e-2)
    for fast, plain in zip(*gradients, strict=True):
        assert fast is not None
        assert plain is not None
        assert (fast - plain).norm() < 2e-2 * plain.norm()

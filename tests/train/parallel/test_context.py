"""Attention over tokens on several processes is that over tokens on one, whatever the segments and the rule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.core import AttentionRule
from gristmill.errors import GristmillError
from gristmill.model.attention.packed import PackedAttention
from gristmill.model.config import LayerConfig, PositionConfig, RopeConfig
from gristmill.model.positions.scaling import DynamicNTKScaling
from gristmill.objectives.masked import MaskedLM
from gristmill.train.parallel import Parallel, start
from gristmill.train.parallel.collectives import TensorGroup
from gristmill.train.parallel.context import ContextAttention, check_context, split_context
from gristmill.train.parallel.mesh import stop
from gristmill.train.world import LossModule
from train.parallel.small import EVERYTHING, LLAMA, curve, small_model, small_run
from train.parallel.spawn import read, together, write

SEGMENTS = {
    "one": (48,),
    "ragged": (1, 20, 2, 3, 14, 7, 1),
    "borders": (12, 12, 24),  # cut exactly where the processes are, and once more
    "tiny": (1,) * 48,
}
RULES = {
    "causal": AttentionRule(),
    "both_ways": AttentionRule(causal=False),
    "window": AttentionRule(window=5),
    "window_both_ways": AttentionRule(causal=False, window=5, scale=0.3),
    "pattern": AttentionRule(pattern=lambda query, key: (query - key) % 3 == 0),
    "softcap": AttentionRule(softcap=1.5),
    "bias": AttentionRule(bias=lambda q, k: -0.1 * (q[:, None] - k[None, :]).abs().expand(4, -1, -1).float()),
    "sinks": AttentionRule(sinks=torch.tensor([0.5, -1.0, 0.0, 2.0])),
}
LENGTHS = replace(
    LLAMA,
    positions=PositionConfig(
        rope=RopeConfig(scaling=DynamicNTKScaling(factor=2.0, original_max_position_embeddings=8))
    ),
)
LAYOUTS = {
    "context": (LLAMA, Parallel(context=4)),
    "data": (EVERYTHING, Parallel(data=2, context=2)),
    "shard": (LLAMA, Parallel(shard=2, context=2)),
    "tensor": (EVERYTHING, Parallel(context=2, tensor=2)),
    "sequence": (LLAMA, Parallel(context=2, tensor=2, sequence=True)),
    "lengths": (LENGTHS, Parallel(context=4)),
}


def whole_inputs() -> list[torch.Tensor]:
    """Queries, keys and values of 48 tokens, and a weight for each output."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(48, heads, size, generator=draw) for heads, size in ((4, 8), (2, 8), (2, 6), (4, 6))]


def work(directory: Path) -> None:
    mesh = start(Parallel(context=4), "cpu")
    rank, group = dist.get_rank(), TensorGroup(mesh.group("context"))
    for segments, lengths in SEGMENTS.items():
        for name, rule in RULES.items():
            query, key, value, weight = (x[12 * rank : 12 * rank + 12].clone() for x in whole_inputs())
            leaves = [x.requires_grad_() for x in (query, key, value)]
            out = ContextAttention(lengths, group).attend(0, query, key, value, rule)
            (out * weight).sum().backward()
            write(directory / f"{segments}.{name}.{rank}", [out.detach(), *(x.grad for x in leaves)])
    for name, (config, layout) in LAYOUTS.items():
        weights = small_run(config, directory / name, start(layout, "cpu"))
        write(directory / f"{name}.{rank}", weights)
    stop()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    together(work, 4, directory)
    return directory


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("segments", SEGMENTS)
def test_outputs_and_gradients_are_those_of_one_process(runs: Path, segments: str, rule: str) -> None:
    query, key, value, weight = whole_inputs()
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out = PackedAttention(SEGMENTS[segments]).attend(0, *leaves, RULES[rule])
    (out * weight).sum().backward()
    parts = [read(runs / f"{segments}.{rule}.{rank}") for rank in range(4)]
    for found, expected in zip(zip(*parts, strict=True), [out, *(x.grad for x in leaves)], strict=True):
        torch.testing.assert_close(torch.cat(found), expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_is_that_of_one_process(runs: Path, name: str, tmp_path: Path) -> None:
    expected = small_run(LAYOUTS[name][0], tmp_path)
    for step, alone in zip(curve(runs / name), curve(tmp_path), strict=True):
        assert step == pytest.approx(alone, rel=1e-5, abs=1e-5)
    for rank in range(4):
        found = read(runs / f"{name}.{rank}")
        assert found.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-5)


class _Alone(TensorGroup):
    """A process of a group that is not there."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(1, 5))
def test_pieces_cover_every_token_once_and_know_the_whole_length(lengths: list[int], parts: int) -> None:
    lengths.append(-sum(lengths) % parts or parts)
    pieces = [ContextAttention(lengths, _Alone(rank, parts)) for rank in range(parts)]
    assert {piece.tokens for piece in pieces} == {sum(lengths) // parts}
    expected = PackedAttention(lengths).lengths
    assert torch.equal(torch.cat([piece.lengths for piece in pieces]), expected)


def test_what_looks_further_than_one_token_is_refused_by_name() -> None:
    module = LossModule(small_model(LLAMA), MaskedLM.__new__(MaskedLM))
    with pytest.raises(GristmillError, match=r"parallel\.context trains decoders .* with MaskedLM"):
        split_context(module, mesh=None)  # type: ignore[arg-type]
    with pytest.raises(GristmillError, match="recurrent layers"):
        check_context(replace(LLAMA, layers=(LayerConfig(), LayerConfig(mixer="linear"))))
    with pytest.raises(GristmillError, match="cross-attention"):
        check_context(replace(LLAMA, cross_attention=True))

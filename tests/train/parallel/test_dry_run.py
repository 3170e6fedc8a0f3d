"""What a layout would do, without the devices: checked against closed forms, PyTorch's own counter and the planner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from gristmill.errors import GristmillError
from gristmill.model.config import FeedForwardConfig, ModelConfig, MoEConfig
from gristmill.objectives.causal import CausalLM
from gristmill.scale.memory import TrainingSettings, training_memory
from gristmill.tokens.batch import PackedBatch
from gristmill.train.config import TrainConfig
from gristmill.train.parallel import Parallel, start
from gristmill.train.parallel.dry_run import DryRun, dry_run
from gristmill.train.parallel.mesh import stop
from gristmill.train.parallel.world import DistributedWorld
from gristmill.train.world import LossModule
from train.parallel.small import EVERYTHING, LLAMA, small_model

MOE = replace(LLAMA, feed_forward=FeedForwardConfig(moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=24)))
TOKENS = 64


def plan(config: ModelConfig, layout: Parallel, processes: int, micros: int = 1, **options: Any) -> DryRun:
    training = TrainConfig(steps=1, micro_batches=micros * layout.shares, **options)
    return dry_run(config, layout, processes, training, tokens=TOKENS, sequence=32)


def traffic(found: DryRun, stage: int = 0) -> dict[tuple[str, str], tuple[int, int]]:
    """Calls and bytes by kind and dimension."""
    return {(item.kind, item.over): (item.calls, item.payload) for item in found.processes[stage].traffic}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_memory_is_what_the_planner_foresees(precision: Any) -> None:
    config = replace(LLAMA, hidden_size=64, head_dim=16, intermediate_size=192, max_position_embeddings=512)
    training = TrainConfig(steps=1, precision=precision)
    (found,) = dry_run(config, Parallel(), 1, training, tokens=1024, sequence=512).processes
    settings = TrainingSettings(tokens=1024, sequence=512, precision=precision, device="cpu")
    expected = training_memory(config, settings)
    assert (found.weights, found.gradients) == (expected.weights, expected.gradients)
    assert found.optimiser == pytest.approx(expected.optimiser, rel=1e-3)
    assert found.activations == pytest.approx(expected.activations, rel=0.05)


def test_shards_are_equal_parts_and_are_gathered_for_each_pass() -> None:
    alone, found = plan(LLAMA, Parallel(), 1), plan(LLAMA, Parallel(shard=4), 4, micros=3)
    (one,), (part,) = alone.processes, found.processes
    rounded = one.weights + LLAMA.hidden_size * 4  # the embedding's 27 rows are rounded up to 28
    assert part.weights * 4 == rounded
    assert part.gradients == one.gradients  # whole, as gradients of three micro-batches add up before they travel
    assert plan(LLAMA, Parallel(shard=4), 4).processes[0].gradients * 4 == rounded
    for name, shape in part.shapes.items():
        assert shape == (-(-one.shapes[name][0] // 4), *one.shapes[name][1:])
    sums = traffic(found)["reduce-scatter", "shard"]
    assert sums == (3, rounded)  # two blocks and what is outside of them, once a step
    gathers = traffic(found)["all-gather", "shard"]
    assert gathers[0] == 3 * 5  # each micro-batch: the root once, the blocks forward and backward


def test_a_tensor_group_sums_twice_a_layer_in_each_direction() -> None:
    found = plan(LLAMA, Parallel(tensor=2, data=3), 6, micros=2)
    states = TOKENS * LLAMA.hidden_size * 4
    layers, loss = 4 * LLAMA.num_hidden_layers, 3 * TOKENS * 4  # greatest logit, sum of exponentials and target
    expected = 2 * (layers + 1 + 1 + 2), 2 * ((layers + 1 + 1) * states + loss)
    assert traffic(found)["all-reduce", "tensor"] == expected  # besides layers: the embedding and the head
    (process,) = found.processes
    assert traffic(found)["all-reduce", "replicas"] == (1, process.gradients)
    shapes = process.shapes
    assert shapes["layers.0.self_attn.qkv_proj.weight"] == (32, 32)  # of 64: 4 query, 2 key and 2 value heads of 8
    assert shapes["layers.1.mlp.down_proj.weight"] == (32, 24)
    assert shapes["embed_tokens.weight"] == (14, 32)
    by_sending = {item.over: item.sent for item in process.traffic}
    assert by_sending["replicas"] == 2 * process.gradients * 2 // 3


def test_context_gathers_keys_and_values_of_each_layer() -> None:
    found = plan(LLAMA, Parallel(context=4), 4)
    keys_values = TOKENS * 2 * LLAMA.key_value_size * 4
    assert traffic(found)["all-gather", "context"] == (2, 2 * keys_values)
    assert traffic(found)["reduce-scatter", "context"] == (2, 2 * keys_values)
    alone = plan(LLAMA, Parallel(), 1)
    assert found.processes[0].activations < alone.processes[0].activations / 2
    assert found.processes[0].weights == alone.processes[0].weights


def test_tokens_travel_to_their_experts_and_back() -> None:
    found = plan(MOE, Parallel(expert=4, data=2), 8)
    rows, counts = TOKENS * 2 * 32 * 4, 4 * 8
    # there and back, forward and backward, in two layers; and how many will come
    assert traffic(found)["all-to-all", "expert"] == (2 * 5, 2 * (4 * rows + counts))
    experts = sum(4 * 3 * 24 * 32 for _ in range(2))  # a layer's one of four experts
    assert traffic(found)["all-reduce", "expert_replicas"] == (1, experts)
    assert traffic(found)["all-reduce", "replicas"] == (1, found.processes[0].gradients - experts)
    assert found.processes[0].shapes["layers.0.mlp.down_proj"] == (1, 32, 24)


def test_each_stage_of_a_pipeline_is_told() -> None:
    found = plan(replace(EVERYTHING, num_hidden_layers=4), Parallel(pipeline=4, data=2), 8, micros=8)
    assert found.bubble == pytest.approx(3 / 11)
    assert [process.rank for process in found.processes] == [0, 2, 4, 6]
    names = [name for process in found.processes for name in process.shapes]
    assert len(names) == len(set(names))
    assert sum(process.weights for process in found.processes) == 4 * found.parameters
    states = TOKENS * 32 * 4
    assert [traffic(found, stage)["send", "pipeline"] for stage in range(4)] == [
        (8, 8 * states),
        (16, 16 * states),
        (16, 16 * states),
        (8, 8 * states),
    ]
    kept = [process.activations for process in found.processes]
    assert kept[1] == 3 * kept[2] / 2  # three and two micro-batches wait for their gradients


def _as_one_of_many(config: ModelConfig, layout: Parallel) -> Counter[str]:
    """Collectives of a real forward and backward pass, as PyTorch's own debugging tool counts them."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        model = small_model(config)
        module = DistributedWorld(start(layout, "cpu")).wrap(LossModule(model, CausalLM()))
        batch = PackedBatch.from_segments([(list(range(20)), None)] * 3)
        with CommDebugMode() as seen:
            torch.stack(list(module(batch).values())).sum().backward()
        return Counter({str(kind): number for kind, number in seen.get_comm_counts().items()})
    finally:
        stop()


@pytest.mark.filterwarnings("ignore::UserWarning")  # the tool's own, about modules that return no tensor
@pytest.mark.parametrize(
    ("config", "layout"),
    [(LLAMA, Parallel(shard=4)), (EVERYTHING, Parallel(tensor=4)), (EVERYTHING, Parallel(tensor=4, sequence=True))],
    ids=["shard", "tensor", "sequence"],
)
def test_collectives_are_as_many_as_pytorch_counts(config: ModelConfig, layout: Parallel) -> None:
    counted, (found,) = _as_one_of_many(config, layout), plan(config, layout, 4).processes
    for kind, name in {
        "all-reduce": "allreduce",
        "all-gather": "allgather",
        "reduce-scatter": "reduce_scatter",
    }.items():
        expected = sum(number for key, number in counted.items() if name in key)
        # gradients that a process knows in part are summed after the backward pass
        later = 1 if kind == "all-reduce" and config is EVERYTHING else 0
        assert sum(item.calls for item in found.traffic if item.kind == kind) == expected + later, (kind, counted)


def test_the_report_can_be_read() -> None:
    lines = plan(LLAMA, Parallel(tensor=2, pipeline=2), 4, micros=2).lines(shapes=True)
    assert lines[0] == "16,384 weights on 4 processes (pipeline 2, tensor 2); 2 micro-batches of 64 tokens each"
    assert lines[1] == "pipeline: 33.3% of the time is waiting"
    assert any(line.startswith("  all-reduce over tensor (2): 10 calls") for line in lines)
    assert "  layers.1.mlp.down_proj.weight [32, 24]" in lines


@pytest.fixture
def in_a_run() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    stop()


def test_not_inside_of_a_run(in_a_run: None) -> None:
    with pytest.raises(GristmillError, match="part of a run already"):
        plan(LLAMA, Parallel(), 1)


@pytest.mark.parametrize(
    ("config", "layout", "processes", "options", "told"),
    [
        (LLAMA, Parallel(tensor=4), 4, {}, r"parallel\.tensor \(4\) must divide num_key_value_heads \(2\)"),
        (LLAMA, Parallel(shard=3), 4, {}, "does not fit 4 processes"),
        (MOE, Parallel(expert=3), 3, {}, r"parallel\.expert \(3\) must divide moe\.num_experts \(4\)"),
        (LLAMA, Parallel(pipeline=3), 3, {}, r"parallel\.pipeline \(3\) is more than the model's 2 layers"),
        (LLAMA, Parallel(pipeline=2), 2, {}, "1 micro-batches, fewer than the 2 stages"),
        (LLAMA, Parallel(pipeline=2, shard=2), 4, {}, r"does not go together with parallel\.shard"),
        (LLAMA, Parallel(shard=2), 2, {"optimiser": "muon"}, "muon works on whole matrices"),
        (LLAMA, Parallel(context=5), 5, {}, r"tokens \(64\) must be a multiple"),
    ],
)
def test_layouts_that_do_not_fit_are_refused_by_name(
    config: ModelConfig, layout: Parallel, processes: int, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(GristmillError, match=told):
        plan(config, layout, processes, **options)


def test_too_few_micro_batches_are_refused() -> None:
    with pytest.raises(GristmillError, match=r"micro_batches \(2\) must be a multiple of .* shares \(4\)"):
        dry_run(LLAMA, Parallel(shard=4), 4, TrainConfig(steps=1, micro_batches=2), tokens=TOKENS, sequence=32)

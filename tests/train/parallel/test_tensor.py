"""What two processes compute together is what one computes: gradients, matrix products, the loss over a vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from gristmill.errors import GristmillError
from gristmill.model.feedforward import FeedForward
from gristmill.objectives.causal import CausalLM
from gristmill.objectives.cross_entropy import reference_cross_entropy_sum
from gristmill.tokens.batch import IGNORED, PackedBatch
from gristmill.train.loop import accumulate_gradients, count_targets, loss_and_gradients
from gristmill.train.parallel import DistributedWorld, Parallel, start
from gristmill.train.parallel.collectives import TensorGroup
from gristmill.train.parallel.mesh import stop
from gristmill.train.parallel.slices import Slice
from gristmill.train.parallel.tensor import RowLinear
from gristmill.train.parallel.vocabulary import vocabulary_cross_entropy_sum
from gristmill.train.precision import Precision
from gristmill.train.world import LossModule
from train.parallel.small import EVERYTHING, LLAMA, small_model
from train.parallel.spawn import read, together, write

ROWS, HIDDEN, VOCABULARY = 5, 6, 11


def batches() -> list[PackedBatch]:
    """Three, of very different length."""
    return [
        PackedBatch.from_segments([(torch.arange(n) % 27, None) for n in sizes]) for sizes in ((3,), (40, 20), (9,))
    ]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(world: DistributedWorld, model: nn.Module) -> float:
    """Gradients of the mean loss over the batches of all processes."""
    module, objective = world.wrap(LossModule(model, CausalLM())), CausalLM()
    own = [batches()[number] for number in world.share(0, 3)]
    counts, _ = count_targets(objective, own, world)
    return accumulate_gradients(module, objective, own, counts, world, Precision("float32", "cpu"))["loss"]


def by_ddp(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """Plain DDP of the sum over the same batches; it averages over two processes, so two times its gradient."""
    count = sum(batch.target_count for batch in batches())
    replica = DistributedDataParallel(LossModule(model, CausalLM()))
    own = batches()[rank::2]
    with replica.no_sync():
        for batch in own[:-1]:
            (replica(batch)["loss"] / count).backward()
    (replica(own[-1])["loss"] / count).backward()
    return {name: 2 * gradient for name, gradient in gradients(model).items()}


def integers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def feed_forward() -> FeedForward:
    layer = FeedForward(HIDDEN, 8, "relu", gated=False, bias=True)
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = integers(*parameter.shape, seed=seed)
    return layer


def shared_feed_forward(group: TensorGroup, x: Tensor) -> Tensor:
    """Column-split, then row-split with a sum, on this process's part."""
    layer = feed_forward()
    columns, rows = Slice("tensor", 0, (8,)), Slice("tensor", 1, (8,))
    up = layer.up_proj
    up.weight = nn.Parameter(columns.take(up.weight, group.rank, group.size))
    up.bias = nn.Parameter(columns.take(up.bias, group.rank, group.size))
    down = RowLinear(group, 4, HIDDEN, bias=True)
    down.weight = nn.Parameter(rows.take(layer.down_proj.weight, group.rank, group.size))
    down.bias = layer.down_proj.bias
    layer.down_proj = down
    out: Tensor = layer(group.copy(x))
    return out


def torch_feed_forward(x: Tensor) -> Tensor:
    """The same by torch's own tensor parallelism."""
    plan: Any = {"up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
    out: Tensor = parallelize_module(feed_forward(), init_device_mesh("cpu", (2,)), plan)(x)
    return out


def split_cross_entropy(group: TensorGroup, softcap: float | None) -> list[Tensor]:
    """Loss, and gradients of states, weight and bias, of this process's part of the vocabulary."""
    hidden, weight, bias, targets = head_case()
    part = Slice("tensor", 0, (VOCABULARY,))
    own = [part.take(tensor, group.rank, group.size).requires_grad_() for tensor in (weight, bias)]
    begin = group.rank * part.sizes(0, 2)[0]
    loss = vocabulary_cross_entropy_sum(group, begin, hidden.requires_grad_(), own[0], targets, own[1], softcap)
    (3 * loss).backward()
    return [loss.detach(), hidden.grad, own[0].grad, own[1].grad]  # type: ignore[list-item]


def head_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=draw) for shape in ((5, 6), (11, 6), (11,)))
    return 3 * hidden, weight, bias, torch.tensor([0, 10, IGNORED, 5, 6])


def two_processes(directory: Path) -> None:
    mesh = start(Parallel(data=2), "cpu")
    found: dict[str, Any] = {"refused": ""}
    world, model = DistributedWorld(mesh), small_model(LLAMA)
    found["loss"] = step(world, model)
    found["data"] = gradients(model)
    found["norm"], found["clipped"] = world.clip(model, 0.1), gradients(model)
    found["ddp"] = by_ddp(small_model(LLAMA), dist.get_rank())
    found["sum"] = world.sum([dist.get_rank() + 1.0, 0.25])
    found["any"] = [world.any(dist.get_rank() == 1), world.any(False)]
    try:
        world.share(0, 1)
    except GristmillError as error:
        found["refused"] = str(error)
    mesh = start(Parallel(tensor=2), "cpu")
    group = TensorGroup(mesh.group("tensor"))
    x = integers(ROWS, HIDDEN, seed=9)
    columns = x @ Slice("tensor", 1, (8,)).take(integers(HIDDEN, 8, seed=1), group.rank, 2)
    found["columns"] = group_concatenation(columns)
    found["feed_forward"], found["torch"] = (
        shared_feed_forward(group, x).detach(),
        torch_feed_forward(x).detach().clone(),
    )
    found["cross_entropy"] = [split_cross_entropy(group, softcap) for softcap in (None, 2.0)]
    model = small_model(EVERYTHING)
    DistributedWorld(mesh).wrap(LossModule(model, CausalLM()))
    found["logits"] = model(torch.arange(20)[None]).detach()
    write(directory / str(dist.get_rank()), found)
    stop()


def group_concatenation(own: Tensor) -> Tensor:
    parts = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(parts, own.contiguous())
    return torch.cat(parts, dim=1)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("two")
    together(two_processes, 2, directory)
    return [read(directory / str(rank)) for rank in range(2)]


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-7) for name in expected
    )


def test_workers_gradients_sum_to_that_of_one_process_and_of_torch_ddp(results: list[dict[str, Any]]) -> None:
    model = small_model(LLAMA)
    expected = loss_and_gradients(model, CausalLM(), batches())["loss"]
    for found in results:
        assert found["loss"] == pytest.approx(expected, rel=1e-6)
        assert close(found["data"], gradients(model))
        assert close(found["data"], found["ddp"])


def test_replicas_gradients_are_the_same_bit_by_bit(results: list[dict[str, Any]]) -> None:
    for part in ("data", "clipped"):
        assert all(torch.equal(results[0][part][name], results[1][part][name]) for name in results[0][part])


def test_clipping_is_torchs(results: list[dict[str, Any]]) -> None:
    model = small_model(LLAMA)
    loss_and_gradients(model, CausalLM(), batches())
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert results[0]["norm"] == pytest.approx(float(norm), rel=1e-6)
    assert close(results[0]["clipped"], gradients(model))


def test_sums_run_over_the_shares_and_too_few_batches_are_refused(results: list[dict[str, Any]]) -> None:
    assert results[0]["sum"] == results[1]["sum"] == [3.0, 0.5]
    assert results[0]["any"] == results[1]["any"] == [True, False]
    assert all(r"micro_batches (1) must be at least" in found["refused"] for found in results)


def test_column_parts_concatenate_to_the_product_exactly_for_integers(results: list[dict[str, Any]]) -> None:
    expected = integers(ROWS, HIDDEN, seed=9) @ integers(HIDDEN, 8, seed=1)
    assert all(torch.equal(found["columns"], expected) for found in results)


def test_column_then_row_split_is_the_unsplit_pair_exactly_for_integers(results: list[dict[str, Any]]) -> None:
    expected = feed_forward()(integers(ROWS, HIDDEN, seed=9)).detach()
    for found in results:
        assert torch.equal(found["feed_forward"], expected)
        assert torch.equal(found["feed_forward"], found["torch"])


@pytest.mark.parametrize(("case", "softcap"), [(0, None), (1, 2.0)])
def test_a_split_vocabulary_has_the_loss_and_gradients_of_a_whole_one(
    results: list[dict[str, Any]], case: int, softcap: float | None
) -> None:
    hidden, weight, bias, targets = head_case()
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    expected = reference_cross_entropy_sum(hidden, weight, targets, bias, softcap=softcap)
    (3 * expected).backward()
    parts = [found["cross_entropy"][case] for found in results]
    for loss, grad_hidden, *_ in parts:
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(grad_hidden, hidden.grad)
    for place, leaf in ((2, leaves[1]), (3, leaves[2])):
        torch.testing.assert_close(torch.cat([part[place] for part in parts]), leaf.grad)


def test_logits_of_a_split_model_are_those_of_the_whole(results: list[dict[str, Any]]) -> None:
    expected = small_model(EVERYTHING)(torch.arange(20)[None]).detach()
    assert all(torch.allclose(found["logits"], expected, atol=1e-6) for found in results)

"""What a layout would do, on one process and without memory: shapes, bytes by part, and what travels.

The model is really split and really runs a step, on tensors that have shapes and no values, in a process group that
speaks to nobody. So shapes, saved activations, optimiser state and collectives are counted, not guessed. By formula
come only the sums of gradients over replicas (PyTorch makes those out of sight) and what passes between the stages of a
pipeline.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from gristmill.errors import GristmillError
from gristmill.model.attention.packed import segment_positions
from gristmill.model.config import ModelConfig
from gristmill.model.transformer import Transformer
from gristmill.tokens.batch import PackedBatch
from gristmill.train.config import TrainConfig
from gristmill.train.optimisers import make_optimiser, optimiser_tensors
from gristmill.train.parallel.context import check_context
from gristmill.train.parallel.data import synchronised
from gristmill.train.parallel.layout import DIMENSIONS, Parallel
from gristmill.train.parallel.mesh import Mesh, start, stop
from gristmill.train.parallel.pipeline import MicroBatch, PipelineWorld, Stage, check_pipeline
from gristmill.train.parallel.valueless import Call, Collectives, EveryToken, Kept, ask_no_values, local_part
from gristmill.train.parallel.world import DistributedWorld
from gristmill.train.precision import Precision
from gristmill.train.prepare import prepare_model
from gristmill.train.schedule_simulator import one_forward_one_backward, simulate
from gristmill.train.world import LossModule


@dataclass(frozen=True)
class Traffic:
    """One kind of collective over one dimension of the mesh, in a step."""

    kind: str
    over: str
    processes: int
    calls: int
    payload: int
    """Bytes of the whole tensors, before splitting or after joining."""

    @property
    def sent(self) -> int:
        """Bytes that this process sends in a ring: (n - 1) / n of the payload, twice that to sum and share."""
        if self.kind == "send":
            return self.payload
        return self.payload * (self.processes - 1) // self.processes * (2 if self.kind == "all-reduce" else 1)


@dataclass(frozen=True)
class ProcessPlan:
    """One process: the first of its pipeline stage."""

    rank: int
    stage: int
    shapes: dict[str, tuple[int, ...]]
    """What it holds of each weight."""
    weights: int
    gradients: int
    optimiser: int
    activations: int
    """Bytes kept for the backward pass, of all micro-batches that it holds at a time."""
    traffic: tuple[Traffic, ...]

    @property
    def memory(self) -> int:
        """Bytes of all parts together; what a kernel needs while it runs comes on top."""
        return self.weights + self.gradients + self.optimiser + self.activations


@dataclass(frozen=True)
class DryRun:
    """What `dry_run` found; processes of a stage are alike, so there is one for each stage."""

    layout: Parallel
    parameters: int
    micro_batches: int
    """Of one share, in a step."""
    tokens: int
    """Of a micro-batch."""
    bubble: float
    """Share of the time in which the processes of a pipeline wait (1F1B, stages of equal work)."""
    processes: tuple[ProcessPlan, ...]

    def lines(self, *, shapes: bool = False) -> list[str]:
        """The report as text. shapes: also what each process holds of every weight."""
        sizes = ", ".join(f"{n} {s}" for n, s in zip(DIMENSIONS, self.layout.sizes, strict=True) if s > 1)
        found = [
            f"{self.parameters:,} weights on {math.prod(self.layout.sizes)} processes ({sizes or 'no split'}); "
            f"{self.micro_batches} micro-batches of {self.tokens:,} tokens each"
        ]
        if self.bubble:
            found.append(f"pipeline: {self.bubble:.1%} of the time is waiting")
        for process in self.processes:
            found.append(f"stage {process.stage} (rank {process.rank}): {_bytes(process.memory)}")
            found += [
                f"  {name:<12}{_bytes(getattr(process, name)):>12}"
                for name in ("weights", "gradients", "optimiser", "activations")
            ]
            found += [
                f"  {item.kind} over {item.over} ({item.processes}): {item.calls} calls, {_bytes(item.payload)}, "
                f"{_bytes(item.sent)} sent"
                for item in process.traffic
            ]
            if shapes:
                found += [f"  {name} {list(shape)}" for name, shape in process.shapes.items()]
        return found


def dry_run(
    config: ModelConfig,
    layout: Parallel,
    processes: int,
    training: TrainConfig | None = None,
    *,
    tokens: int = 4096,
    sequence: int = 1024,
) -> DryRun:
    """A step of next-token prediction of a decoder on so many processes, with as many tokens in each micro-batch, in
    sequences of `sequence`. Experts are taken to get equally many tokens.

    Nothing is allocated: any model on any number of processes fits. Raises GristmillError, naming the sizes, for a
    layout that does not fit model, processes or options, for a model that decides by values what it does, and when this
    process is part of a run already.
    """
    training = training or TrainConfig(steps=1)
    layout = layout.resolve(processes)
    layout.check_model(config)
    layout.check_run(training)
    if layout.pipeline > 1:
        check_pipeline(config, layout)
    if layout.context > 1:
        check_context(config)
    micros = _micro_batches(layout, training)
    if tokens % sequence or sequence > config.context or tokens % (layout.context * layout.tensor):
        raise GristmillError(
            f"tokens ({tokens}) must be a multiple of sequence ({sequence}) and of parallel.context times tensor "
            f"({layout.context * layout.tensor}), sequence at most the model's context ({config.context})"
        )
    if dist.is_initialized():
        raise GristmillError("a dry run pretends to be many processes, and this one is part of a run already")
    plans = [_plan(config, layout, training, stage, micros, tokens, sequence) for stage in range(layout.pipeline)]
    with torch.device("meta"):
        parameters = Transformer(config).count_parameters()
    bubble = simulate(one_forward_one_backward(layout.pipeline, micros)).bubble if layout.pipeline > 1 else 0.0
    return DryRun(layout, parameters, micros, tokens, bubble, tuple(plans))


def _micro_batches(layout: Parallel, training: TrainConfig) -> int:
    micros, meets = training.micro_batches // layout.shares, max(layout.shard, layout.expert) > 1
    if training.micro_batches < layout.shares or (meets and training.micro_batches % layout.shares):
        raise GristmillError(
            f"micro_batches ({training.micro_batches}) must be {'a multiple of' if meets else 'at least'} the number "
            f"of data-parallel shares ({layout.shares})"
        )
    if layout.pipeline > micros:
        raise GristmillError(
            f"each share of a step has {micros} micro-batches, fewer than the {layout.pipeline} stages of "
            f"parallel.pipeline: set micro_batches to at least {layout.pipeline * layout.shares}"
        )
    return -(-training.micro_batches // layout.shares)


def _plan(
    config: ModelConfig, layout: Parallel, training: TrainConfig, stage: int, micros: int, tokens: int, sequence: int
) -> ProcessPlan:
    own = replace(layout, data=1)  # replicas do not change what one of them does
    rank, processes = stage * math.prod(own.sizes) // layout.pipeline, math.prod(own.sizes)
    with _alone(rank, processes):
        mesh = start(own, "cpu")
        mesh = _DryMesh(mesh.layout, mesh.device, mesh.devices, mesh.merged)
        try:
            with FakeTensorMode():
                return _stage_plan(config, layout, training, mesh, stage, micros, tokens, sequence)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise GristmillError(f"no dry run for this model: what it computes depends on values ({error})") from error


def _stage_plan(
    config: ModelConfig,
    layout: Parallel,
    training: TrainConfig,
    mesh: Mesh,
    stage: int,
    micros: int,
    tokens: int,
    sequence: int,
) -> ProcessPlan:
    model, precision = Transformer(config), Precision(training.precision, "cpu")
    precision.prepare(model)
    prepare_model(model, replace(training, compile=False))
    world = PipelineWorld(mesh) if layout.pipeline > 1 else DistributedWorld(mesh)
    module = world.wrap(LossModule(model, EveryToken()))
    ask_no_values(model)
    step = _Step(module, precision, tokens, sequence)
    # gradients of the micro-batches before the last do not travel
    before = step.run(now=False)[0] if micros > 1 else Counter[Call]()
    last, kept = step.run(now=True)
    traffic = Counter({call: number * (micros - 1) for call, number in before.items()}) + last
    held = {name: local_part(p) for name, p in model.named_parameters()}
    whole = layout.shard > 1 and micros > 1  # nor are they shards until then
    optimiser = make_optimiser(model, training.optimiser, learning_rate=training.learning_rate, weight_decay=0.0)
    return ProcessPlan(
        rank=stage * math.prod(layout.sizes) // layout.pipeline,
        stage=stage,
        shapes={name: tuple(part.shape) for name, part in held.items()},
        weights=sum(part.nbytes for part in held.values()),
        gradients=sum((p if whole else held[n]).numel() * p.itemsize for n, p in model.named_parameters()),
        optimiser=sum(local_part(state).nbytes for state in optimiser_tensors(model, optimiser).values()),
        activations=kept * min(layout.pipeline - stage, micros),
        traffic=(
            *_collected(traffic, mesh),
            *_gradient_sums(layout, world, held),
            *_between_stages(config, layout, stage, micros, tokens, held),
        ),
    )


class _Step:
    """One micro-batch forward and backward, and what that leaves and moves."""

    def __init__(self, module: nn.Module, precision: Precision, tokens: int, sequence: int) -> None:
        self.module, self.precision = module, precision
        ids = torch.zeros(tokens, dtype=torch.int64)
        lengths = (sequence,) * (tokens // sequence)
        self.batch = PackedBatch(ids, ids, segment_positions(lengths), lengths)

    def run(self, *, now: bool) -> tuple[Counter[Call], int]:
        """Calls of each kind, group and size; and bytes kept for the backward pass."""
        seen, kept = Collectives(), Kept()
        saving = torch.autograd.graph.saved_tensors_hooks(kept.note, lambda saved: saved)
        with seen, synchronised(self.module, now=now):
            with saving, self.precision.forward("cpu"):
                out = self._forward()
            torch.autograd.backward(out, torch.ones_like(out))
        return seen.calls, kept.nbytes

    def _forward(self) -> Tensor:
        if not isinstance(self.module, Stage):
            return torch.stack(list(self.module(self.batch).values())).sum()
        x, model = None, self.module.model
        if not self.module.is_first:
            size = (self.batch.tokens, model.config.hidden_size)
            x = torch.empty(size, dtype=next(model.parameters()).dtype, requires_grad=True)
        return self.module.compute(MicroBatch(self.batch, torch.arange(self.batch.tokens)), x)


@contextmanager
def _alone(rank: int, processes: int) -> Iterator[None]:
    """This process as one of many that do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    dist.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
    try:
        yield
    finally:
        stop()


class _DryMesh(Mesh):
    """A mesh on which no gradients are summed over replicas: DDP does that in C++, where tensors have values."""

    def size(self, name: str) -> int:
        return 1 if name == "replicas" else super().size(name)


def _collected(calls: Counter[Call], mesh: Mesh) -> list[Traffic]:
    """Calls by kind and dimension. A group of one process moves nothing."""
    names = {str(mesh.group(name).group_name): name for name in DIMENSIONS}
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for (kind, group, nbytes), number in calls.items():
        key = kind, names.get(group, group)
        before = found.get(key, (0, 0))
        found[key] = before[0] + number, before[1] + number * nbytes
    sizes = dict(zip(DIMENSIONS, mesh.layout.sizes, strict=True))
    return [Traffic(kind, over, sizes[over], *sums) for (kind, over), sums in sorted(found.items()) if sizes[over] > 1]


def _gradient_sums(layout: Parallel, world: DistributedWorld, held: dict[str, Tensor]) -> list[Traffic]:
    """The sums over replicas, once a step: DDP's, or those of DistributedWorld.sum_remaining."""
    experts = {name for name, part in world.slices.items() if part.over == "expert"}
    data = layout.data or 1
    groups = {
        "tensor": (world.partial, layout.tensor),
        "replicas": (held.keys() - experts, data * layout.expert * layout.context),
        "expert_replicas": (experts, data * layout.context),
    }
    return [
        Traffic("all-reduce", over, processes, 1, sum(held[name].nbytes for name in names))
        for over, (names, processes) in groups.items()
        if processes > 1 and names
    ]


def _between_stages(
    config: ModelConfig, layout: Parallel, stage: int, micros: int, tokens: int, held: dict[str, Tensor]
) -> list[Traffic]:
    """Hidden states to the next stage and their gradients to the one before, and a tied matrix's gradient."""
    if layout.pipeline == 1:
        return []
    nbytes = tokens * config.hidden_size * next(iter(held.values())).itemsize
    neighbours = (stage < layout.pipeline - 1) + (stage > 0)
    found = [Traffic("send", "pipeline", layout.pipeline, neighbours * micros, neighbours * micros * nbytes)]
    if config.tie_word_embeddings and stage in (0, layout.pipeline - 1):
        found.append(Traffic("send", "pipeline", layout.pipeline, 1, held["embed_tokens.weight"].nbytes))
    return found


def _bytes(number: int) -> str:
    """In powers of 1024: '1.25 GiB'."""
    value, units = float(number), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}" if value < 1000 else f"{value:.0f} {units[0]}"

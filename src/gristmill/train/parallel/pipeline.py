"""Pipeline parallelism: consecutive layers per process, and micro-batches that follow each other through them.

The micro-batches are the loader batches of a step. Every process of a pipeline reads the same ones, so each knows who
sees whom, and only hidden states travel. torch.distributed.pipelining runs the schedule.

Source: Huang et al. 2019 (GPipe); Narayanan et al. 2019, 2021 (one forward, one backward).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.utils.checkpoint import checkpoint

from gristmill.errors import GristmillError
from gristmill.model.attention.packed import PackedAttention
from gristmill.model.config import ModelConfig
from gristmill.model.transformer import Transformer
from gristmill.objectives.causal import CausalLM, next_token_loss_sum
from gristmill.objectives.single import TERM
from gristmill.tokens.batch import IGNORED, PackedBatch
from gristmill.train.parallel.layout import Parallel
from gristmill.train.parallel.mesh import Mesh
from gristmill.train.parallel.tensor import split_tensors
from gristmill.train.parallel.vocabulary import VocabularyHead
from gristmill.train.parallel.world import DistributedWorld
from gristmill.train.precision import Precision
from gristmill.train.schedule_simulator import Timeline, gpipe, one_forward_one_backward, simulate
from gristmill.train.world import LossModule

ScheduleName = Literal["1f1b", "gpipe"]
_TIED = "embed_tokens.weight"


@dataclass(frozen=True)
class MicroBatch:
    """A batch of the length that all of a step have, and which of its rows have a target."""

    batch: PackedBatch
    learned: Tensor


class Stage(nn.Module):
    """One process's part of a decoder: its layers, the first stage's embedding, the last stage's norm, head and loss.

    `begin` a step with its micro-batches; then each forward pass takes one by number.
    """

    def __init__(self, model: Transformer, part: int, parts: int) -> None:
        super().__init__()
        self.model, self.layers = model, stage_layers(model.config, parts)[part]
        self.is_first, self.is_last = part == 0, part == parts - 1
        self._micros: Sequence[MicroBatch] = ()
        self._context: Precision | None = None
        self.total = 0.0
        """Summed loss of the micro-batches of the last stage, since `begin`."""

    def begin(self, micros: Sequence[MicroBatch], precision: Precision) -> None:
        """The micro-batches of the step to come."""
        self._micros, self._context, self.total = micros, precision, 0.0

    def forward(self, x: Tensor, number: Tensor) -> Tensor:
        """x: hidden states (tokens, hidden) of the stage before; the first stage does not look at it. Returns hidden
        states, or, of the last stage, the summed loss (1,)."""
        assert self._context is not None, "begin() comes first"
        micro = self._micros[int(number)]
        with self._context.forward(micro.batch.input_ids.device):
            out = self.compute(micro, None if self.is_first else x)
        if self.is_last:
            self.total += float(out.detach())
        return out

    def compute(self, micro: MicroBatch, x: Tensor | None) -> Tensor:
        """The layers of this stage over one micro-batch."""
        model, batch = self.model, micro.batch
        if x is None:
            x = model.embed(batch.input_ids, batch.position_ids)
        cache = PackedAttention(batch.segment_lengths, batch.input_ids.device)
        step = model.step(batch.position_ids, cache, x.dtype)
        for layer in self.layers:
            block = model.layers[model.order[layer]]
            if model.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, step, layer, use_reentrant=False)
            else:
                x = block(x, step, layer)
        assert x is not None
        if not self.is_last:
            return x
        hidden: Tensor = model.norm(x)
        return next_token_loss_sum(model, hidden[micro.learned], batch.target_ids[micro.learned])[None]


class PipelineWorld(DistributedWorld):
    """A mesh whose layout has pipeline stages, perhaps with data, tensor and expert parallelism besides.

    schedule: 1f1b holds at most as many micro-batches as there are stages, gpipe all of a step.
    """

    def __init__(self, mesh: Mesh, schedule: ScheduleName = "1f1b") -> None:
        super().__init__(mesh)
        self.schedule: ScheduleName = schedule
        self.part, self.parts = mesh.rank("pipeline"), mesh.size("pipeline")
        self._elsewhere: set[str] = set()
        self._tied = False
        self._runner: tuple[tuple[int, int], Schedule1F1B | ScheduleGPipe] | None = None
        self._scale = 1.0

    @property
    def _overlaps(self) -> bool:
        return False  # a step's gradients are complete when its schedule is, and are summed then

    def wrap(self, module: LossModule) -> nn.Module:
        """Split the model and keep the layers of this stage, in place; names stay. Raises GristmillError for a model
        or an objective that cannot be split so."""
        model, objective = module.model, module.objective
        if not isinstance(model, Transformer) or not isinstance(objective, CausalLM):
            raise GristmillError(
                f"parallel.pipeline trains decoders on next-token prediction (CausalLM), got {type(model).__name__} "
                f"with {type(objective).__name__}"
            )
        self.layout.check_model(model.config)
        check_pipeline(model.config, self.layout)
        if self.layout.tensor > 1:
            self.slices, self.partial = split_tensors(module, self.mesh)
        if self.layout.expert > 1:
            from gristmill.train.parallel.expert import split_experts

            self.slices |= split_experts(model, self.mesh)
        names = {name for name, _ in model.named_parameters()}
        stage = cut_stage(model, self.part, self.parts)
        own = {name for name, _ in model.named_parameters()}
        self._elsewhere = names - own
        self._tied = model.config.tie_word_embeddings
        self.slices = {name: part for name, part in self.slices.items() if name in own}
        self.partial &= own
        self._model = model
        return stage

    def share(self, first: int, number: int) -> range:
        """See `World`. 1F1B needs as many micro-batches as stages; GristmillError otherwise."""
        own = super().share(first, number)
        if torch.is_grad_enabled() and self.schedule == "1f1b" and len(own) < self.parts:
            raise GristmillError(
                f"each share of a step has {len(own)} micro-batches, fewer than the {self.parts} stages of "
                f"parallel.pipeline: set micro_batches to at least {self.parts * self.data_size}"
            )
        return own

    def timeline(self, micro_batches: int) -> Timeline:
        """A step's schedule on paper: its bubble is the share of time in which processes wait."""
        make = one_forward_one_backward if self.schedule == "1f1b" else gpipe
        return simulate(make(self.parts, micro_batches))

    def backward(
        self, module: nn.Module, batches: Sequence[Any], scales: Mapping[str, float], precision: Precision
    ) -> dict[str, float]:
        """See `World`."""
        assert isinstance(module, Stage)
        longest = max(batch.tokens for batch in batches)
        micros = [micro_batch(batch, longest, module.model.config) for batch in batches]
        module.begin(micros, precision)
        self._scale = scales[TERM]
        numbers = torch.arange(len(micros), device=self.device)
        schedule = self._schedule(module, longest, len(micros), precision)
        given = (numbers,) if module.is_first else ()
        ends: dict[str, Any] = {"target": numbers, "losses": []} if module.is_last else {}
        schedule.step(*given, number=numbers, return_outputs=False, **ends)
        self._sum_tied()
        self.sum_remaining()
        return {TERM: self._from_last(module.total)}

    def _schedule(self, stage: Stage, tokens: int, micros: int, precision: Precision) -> Schedule1F1B | ScheduleGPipe:
        """torch's schedule for such micro-batches; kept, because its stages must first agree on their shapes."""
        if self._runner is not None and self._runner[0] == (tokens, micros):
            return self._runner[1]
        hidden = torch.empty(
            (tokens, stage.model.config.hidden_size),
            dtype=next(stage.parameters()).dtype,
            device=self.device,
            requires_grad=True,
        )
        number = torch.zeros(1, dtype=torch.int64, device=self.device)
        total = torch.zeros(1, device=self.device, requires_grad=True)
        engine = PipelineStage(
            stage,
            self.part,
            self.parts,
            self.device,
            input_args=number if stage.is_first else hidden,
            output_args=total if stage.is_last else hidden,
            group=self.mesh.group("pipeline"),
        )
        make = Schedule1F1B if self.schedule == "1f1b" else ScheduleGPipe
        runner = make(
            engine, micros, loss_fn=lambda total, _: precision.scale(total.sum() * self._scale), scale_grads=False
        )
        self._runner = (tokens, micros), runner
        return runner

    def evaluate(self, module: nn.Module, batch: Any, precision: Precision) -> dict[str, float]:
        """See `World`. One batch goes through all stages."""
        assert isinstance(module, Stage)
        group, config = self.mesh.group("pipeline"), module.model.config
        module.begin([micro_batch(batch, batch.tokens, config)], precision)
        x = torch.empty((batch.tokens, config.hidden_size), dtype=next(module.parameters()).dtype, device=self.device)
        if not module.is_first:
            dist.recv(x, group=group, group_src=self.part - 1)
        out = module(x, torch.zeros(1, dtype=torch.int64))
        if not module.is_last:
            dist.send(out.contiguous(), group=group, group_dst=self.part + 1)
        return {TERM: self._from_last(module.total)}

    def _from_last(self, total: float) -> float:
        told = torch.tensor([total], dtype=torch.float64, device=self.device)
        dist.broadcast(told, group=self.mesh.group("pipeline"), group_src=self.parts - 1)
        return float(told)

    def _sum_tied(self) -> None:
        """The first stage's gradient of a tied matrix and the last one's, added on both; they add the same two numbers,
        so the two copies stay the same."""
        if not self._tied or self.parts == 1 or self.part not in (0, self.parts - 1):
            return
        assert self._model is not None
        weight = dict(self._model.named_parameters())[_TIED]
        own = torch.zeros_like(weight) if weight.grad is None else weight.grad
        other, group, peer = torch.empty_like(own), self.mesh.group("pipeline"), self.parts - 1 - self.part
        # both in one batch: each would else wait for the other
        moves = [
            dist.P2POp(dist.isend, own.contiguous(), group=group, group_peer=peer),
            dist.P2POp(dist.irecv, other, group=group, group_peer=peer),
        ]
        for work in dist.batch_isend_irecv(moves):
            work.wait()
        weight.grad = own + other

    def _copies(self, name: str, parameter: Tensor) -> int:
        tied = self._tied and name == _TIED and self.parts > 1
        return super()._copies(name, parameter) * (2 if tied else 1)

    def read(self, directory: Path, group: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `World`. What belongs to other stages is left out."""
        found = super().read(directory, group, like)
        away = self._elsewhere
        return {n: t for n, t in found.items() if n not in away and n.rpartition(".")[0] not in away}

    def whole(self, model: nn.Module) -> dict[str, Tensor]:
        """See `DistributedWorld.whole`."""
        own, group = super().whole(model), self.mesh.group("pipeline")
        listed: list[Any] = [None] * self.parts
        dist.all_gather_object(listed, [(name, tuple(t.shape), t.dtype) for name, t in own.items()], group=group)
        found: dict[str, Tensor] = {}
        for part, names in enumerate(listed):
            for name, shape, dtype in names:
                tensor = (
                    own[name].contiguous() if part == self.part else torch.empty(shape, dtype=dtype).to(self.device)
                )
                dist.broadcast(tensor, group=group, group_src=part)
                found[name] = tensor
        return found


def stage_layers(config: ModelConfig, parts: int) -> list[range]:
    """The layers of each stage; the first ones have one more where they do not divide."""
    layers = config.num_hidden_layers
    ends = [part * (layers // parts) + min(part, layers % parts) for part in range(parts + 1)]
    return [range(begin, end) for begin, end in pairwise(ends)]


def cut_stage(model: Transformer, part: int, parts: int) -> Stage:
    """Drop from a model what other stages have, in place; the names of the rest stay."""
    stage = Stage(model, part, parts)
    kept = {model.order[layer] for layer in stage.layers}
    for block in range(len(model.layers)):
        if block not in kept:
            model.layers[block] = nn.Identity()
    if not stage.is_first:
        for name in ("embed_positions", "embed_token_types", "embed_norm", "embed_proj"):
            if hasattr(model, name):
                setattr(model, name, nn.Identity())
        if not (stage.is_last and model.config.tie_word_embeddings):
            model.embed_tokens = nn.Identity()  # type: ignore[assignment]
    if not stage.is_last:
        model.norm, model.lm_head = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    elif isinstance(model.lm_head, VocabularyHead):
        model.lm_head.mark()
    return stage


def micro_batch(batch: Any, tokens: int, config: ModelConfig) -> MicroBatch:
    """A batch in the length of the longest of its step. Raises GristmillError for another kind of batch."""
    if not isinstance(batch, PackedBatch):
        raise GristmillError(f"parallel.pipeline reads packed batches, got {type(batch).__name__}")
    longer = batch if batch.tokens == tokens else batch.rounded_up(tokens, config.context)
    return MicroBatch(longer, (longer.target_ids != IGNORED).nonzero().squeeze(1))


def check_pipeline(config: ModelConfig, layout: Parallel) -> None:
    """Raise GristmillError, naming what, for a model or a layout that does not go with pipeline stages."""
    if layout.shard > 1 or layout.context > 1 or layout.sequence:
        name = "shard" if layout.shard > 1 else "context" if layout.context > 1 else "sequence"
        raise GristmillError(f"parallel.pipeline does not go together with parallel.{name}")
    if config.positions.bias is not None:
        raise GristmillError("parallel.pipeline does not split models whose layers share a bias (positions.bias)")
    if config.cross_attention:
        raise GristmillError("parallel.pipeline does not split models with cross-attention")
    ranges = stage_layers(config, layout.pipeline)
    stage_of = {layer: number for number, layers in enumerate(ranges) for layer in layers}
    for layer, entry in enumerate(config.layers):
        for field in ("keys_from", "scores_from", "weights_from"):
            source = getattr(entry, field)
            if source is not None and stage_of[source] != stage_of[layer]:
                raise GristmillError(
                    f"layer {layer} takes {field} from layer {source}, and parallel.pipeline ({layout.pipeline}) puts "
                    "that on another stage"
                )

"""The processes of a run as the training loop sees them.

Each process reads its own share of a step's batches. The loop divides by counts over all of them, so gradients are
summed over the processes, never averaged; then every replica makes the same step and stays the same bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from gristmill.errors import GristmillError
from gristmill.files import atomic_directory
from gristmill.model.transformer import Stack
from gristmill.train.config import TrainConfig
from gristmill.train.parallel.checkpoint import gathered, read_group, write_group
from gristmill.train.parallel.data import replicate, shard_weights, sum_gradients, synchronised
from gristmill.train.parallel.mesh import Mesh
from gristmill.train.parallel.slices import Slice
from gristmill.train.parallel.tensor import split_tensors
from gristmill.train.precision import Precision
from gristmill.train.world import LossModule, World, model_tensors


class DistributedWorld(World):
    """The processes of a mesh. The model given to `wrap` must have the same weights on all of them.

    After `wrap` the model holds what is this process's own: `slices` says which part of which weight that is, and
    `partial` names weights whose gradients are to be summed over the tensor group. Expert and context parallelism
    build on the same two tables. Pipelines are a world of their own (gristmill.train.parallel.pipeline).
    """

    background = False  # all processes write a checkpoint together

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh.device)
        self.mesh, self.layout = mesh, mesh.layout
        self.is_main = mesh.is_main
        self.data_rank, self.data_size = mesh.rank("shares"), mesh.size("shares")
        self.slices: dict[str, Slice] = {}
        self.partial: set[str] = set()
        self._model: nn.Module | None = None

    def check(self, config: TrainConfig) -> None:
        """Raise GristmillError for options of a run that the layout cannot honour."""
        self.layout.check_run(config)

    def wrap(self, module: LossModule) -> nn.Module:
        """Split, shard or replicate; the module to run. Raises GristmillError when the model cannot be split so."""
        for part in module.model.modules():
            if isinstance(part, Stack):
                self.layout.check_model(part.config)
        if self.layout.pipeline > 1:
            raise GristmillError("a layout with parallel.pipeline needs PipelineWorld")
        if self.layout.tensor > 1:
            self.slices, self.partial = split_tensors(module, self.mesh, sequence=self.layout.sequence)
        if self.layout.expert > 1:
            from gristmill.train.parallel.expert import split_experts

            self.slices |= split_experts(module.model, self.mesh)
        if self.layout.context > 1:
            from gristmill.train.parallel.context import split_context

            split_context(module, self.mesh)
        self._model = module.model
        if self.layout.shard > 1:
            return shard_weights(module, self.mesh)
        return replicate(module, self.mesh) if self._overlaps else module

    @property
    def _overlaps(self) -> bool:
        """Whether DDP sums the gradients. It knows one group for all weights, and experts have their own."""
        return self.layout.shard == 1 and self.layout.expert == 1 and self.mesh.size("replicas") > 1

    def share(self, first: int, number: int) -> range:
        """See `World`.

        Where a forward pass is a meeting of all shares (FSDP, experts), each must make as many. Outside training a
        number that does not divide is then measured by every share in full, which leaves the mean as it is; in training
        it is refused with GristmillError, as are fewer batches than shares.
        """
        meets = self.layout.shard > 1 or self.layout.expert > 1
        if not torch.is_grad_enabled():
            whole = meets and number % self.data_size
            return range(first, first + number) if whole else super().share(first, number)
        if number < self.data_size or (meets and number % self.data_size):
            what = "a multiple of" if meets else "at least"
            raise GristmillError(
                f"micro_batches ({number}) must be {what} the number of data-parallel shares ({self.data_size})"
            )
        return super().share(first, number)

    def sum(self, values: Sequence[float]) -> list[float]:
        """See `World`."""
        total = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.mesh.group("shares"))
        return [float(value) for value in total]

    def backward(
        self, module: nn.Module, batches: Sequence[Any], scales: Mapping[str, float], precision: Precision
    ) -> dict[str, float]:
        """See `World`. Gradients travel with the last batch alone."""
        totals = dict.fromkeys(scales, 0.0)
        for number, batch in enumerate(batches, start=1):
            with synchronised(module, now=number == len(batches)):
                for name, value in super().backward(module, [batch], scales, precision).items():
                    totals[name] += value
        self.sum_remaining()
        return totals

    def evaluate(self, module: nn.Module, batch: Any, precision: Precision) -> dict[str, float]:
        """See `World`."""
        found = super().evaluate(module, batch, precision)
        if isinstance(module, FSDPModule):
            module.reshard()  # what is outside the blocks stays whole until a backward pass, which does not come
        return found

    def sum_remaining(self) -> None:
        """Sum the gradients that DDP and FSDP have not."""
        assert self._model is not None, "wrap() comes first"
        named = dict(self._model.named_parameters())
        sum_gradients([named[name] for name in sorted(self.partial)], self.mesh.group("tensor"))
        if self.layout.shard > 1 or self._overlaps:
            return
        experts = {name for name, part in self.slices.items() if part.over == "expert"}
        sum_gradients([p for name, p in named.items() if name not in experts], self.mesh.group("replicas"))
        sum_gradients([named[name] for name in sorted(experts)], self.mesh.group("expert_replicas"))

    def clip(self, model: nn.Module, max_norm: float) -> float:
        """See `World`. Each gradient's square counts once, however many processes hold it."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        gradients = []
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                local = _local(parameter.grad)
                gradients.append(local)
                total += local.float().square().sum() / self._copies(name, parameter)
        dist.all_reduce(total)
        norm = total.sqrt()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.dtype))
        return float(norm)

    def _copies(self, name: str, parameter: Tensor) -> int:
        """How many processes hold the very part of a weight that this one holds."""
        part = self.slices.get(name)
        split = [] if part is None else [part.over]
        split += ["shard"] if isinstance(parameter, DTensor) else []
        return dist.get_world_size() // math.prod([self.layout.pipeline, *map(self.mesh.size, split)])

    @contextmanager
    def directory(self, path: Path) -> Iterator[Path]:
        """See `World`. The processes share a file system."""
        with atomic_directory(path) if self.is_main else nullcontext(path) as own:
            told = [str(own)]
            dist.broadcast_object_list(told, src=0)
            yield Path(told[0])
            self.barrier()  # all have written; a process that failed ends the run before this
        self.barrier()

    def write(self, directory: Path, group: str, tensors: Mapping[str, Tensor]) -> None:
        """See `World`: shards of all processes, in a folder of safetensors files."""
        write_group(directory / group, tensors, self.slices, self.mesh)

    def read(self, directory: Path, group: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `World`. What another number of processes has written fits as well, one process included."""
        known = dict(self._model.named_parameters()) if self._model is not None else {}
        return read_group(directory, group, {**known, **like}, self.slices, self.mesh)

    def whole(self, model: nn.Module) -> dict[str, Tensor]:
        """See `World`."""
        return {n: gathered(t, self.slices.get(n), self.mesh) for n, t in model_tensors(model).items()}

    def any(self, here: bool) -> bool:
        """Whether it is so on any process: a signal does not reach all of them in the same step."""
        flag = torch.tensor(int(here), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def barrier(self) -> None:
        """See `World`."""
        dist.barrier()


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local

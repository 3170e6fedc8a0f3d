"""The processes of a run, as the loop sees them. Here: one process on one device.

Loader batches are dealt to the processes: of the n batches of a step, process r of p takes r, r + p, ... A step reads
the same n batches whatever p is, so a run can go on with another number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gristmill.core import Objective
from gristmill.errors import BrokenCheckpoint
from gristmill.files import atomic_directory
from gristmill.model.formats.safetensors_file import save_tensors
from gristmill.train.config import TrainConfig
from gristmill.train.precision import Precision


class LossModule(nn.Module):
    """A model and its objective as one module: what is compiled, replicated and sharded. batch -> summed losses."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """See `Objective.loss_sums`."""
        return dict(self.objective.loss_sums(self.model, batch))


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tied matrix once, under its first name."""
    found: dict[str, Tensor] = {name: parameter.detach() for name, parameter in model.named_parameters()}
    kept = model.state_dict().keys()
    return found | {name: buffer for name, buffer in model.named_buffers() if name in kept}


class World:
    """One process. Others derive from it: gristmill.train.parallel."""

    is_main = True
    """Whether this process writes logs and shows progress."""
    background = True
    """Whether checkpoints may be written in a thread."""
    data_rank, data_size = 0, 1
    """Which share of the batches this process takes, of how many shares."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def check(self, config: TrainConfig) -> None:
        """Raise GristmillError for options of a run that cannot be honoured here."""

    def wrap(self, module: LossModule) -> nn.Module:
        """The module to run in place of `module`; parameters of the model may be sharded by this."""
        return module

    def share(self, first: int, number: int) -> range:
        """The loader batches, of `number` from `first` on, that this process takes."""
        return range(first + self.data_rank, first + number, self.data_size)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the shares, the same on every process."""
        return list(values)

    def backward(
        self, module: nn.Module, batches: Sequence[Any], scales: Mapping[str, float], precision: Precision
    ) -> dict[str, float]:
        """Add the gradient of the sum over batches and terms of scale * summed loss, over all processes, to the
        parameters; return the summed losses of this process."""
        totals = dict.fromkeys(scales, 0.0)
        for batch in batches:
            with precision.forward(self.device):
                sums = module(batch)
            loss = torch.stack([sums[name] * scale for name, scale in scales.items()]).sum()
            precision.scale(loss).backward()
            for name in scales:  # a term without a target in the whole step has no scale
                totals[name] += float(sums[name].detach())
        return totals

    def evaluate(self, module: nn.Module, batch: Any, precision: Precision) -> dict[str, float]:
        """The summed losses of one batch, of this process."""
        with precision.forward(self.device):
            return {name: float(value) for name, value in module(batch).items()}

    def clip(self, model: nn.Module, max_norm: float) -> float:
        """Scale gradients of a greater global norm down to `max_norm`; the norm before."""
        return float(nn.utils.clip_grad_norm_(model.parameters(), max_norm))

    @contextmanager
    def directory(self, path: Path) -> Iterator[Path]:
        """A temporary directory, the same for all processes, that becomes `path` when all have left the block."""
        with atomic_directory(path) as temporary:
            yield temporary

    def write(self, directory: Path, group: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a group of tensors into a checkpoint's directory."""
        save_tensors(tensors, directory / f"{group}.safetensors")

    def read(self, directory: Path, group: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Read a group back. `like` has the tensors that are expected, as far as they are known: where a process holds
        only shards, it gets its shards. Raises BrokenCheckpoint when a file is missing or damaged."""
        path = directory / f"{group}.safetensors"
        if not path.exists() and (directory / group).is_dir():  # many processes wrote it
            from gristmill.train.parallel.checkpoint import read_whole

            return read_whole(directory / group)
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise BrokenCheckpoint(f"{path}: not readable ({error})") from error

    def whole(self, model: nn.Module) -> dict[str, Tensor]:
        """All weights and persistent buffers by name, each in full: to save the finished model. Every process must
        call it."""
        return model_tensors(model)

    def any(self, here: bool) -> bool:
        """Whether it is so on any process: a signal does not reach all of them in the same step."""
        return here

    def barrier(self) -> None:
        """Wait for the other processes."""

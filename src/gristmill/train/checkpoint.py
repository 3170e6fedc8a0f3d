"""Training checkpoints: weights, optimiser state and position, written atomically as safetensors and JSON.

A checkpoint is a folder `step-N` of named groups of tensors and `position.json`. How a group lies on disk is the
business of the `World`: one file here, shards of many processes elsewhere.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gristmill.errors import BrokenCheckpoint, CheckpointError
from gristmill.files import write_json
from gristmill.model.formats.state import check_shapes
from gristmill.train.optimisers import load_optimiser_tensors, optimiser_tensors
from gristmill.train.world import World, model_tensors

Groups = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Position:
    """Where a run stands. `identity` names the run: a checkpoint of another one is refused."""

    step: int
    """Optimiser steps taken; a skipped one counts."""
    tokens: int
    """Tokens trained on, over all processes."""
    seconds: float
    identity: str
    batches: int = 0
    """Loader batches used: the next step begins with this number."""
    bad_steps: int = 0
    """Steps skipped or rewound so far."""
    facts: dict[str, Any] = field(default_factory=dict)
    """State of callbacks and of the loop, as JSON."""


def save_checkpoint(
    directory: Path,
    groups: Groups,
    position: Position,
    *,
    keep: int,
    keep_every: int | None = None,
    world: World | None = None,
) -> Path:
    """Write `directory/step-N`, then delete all but the newest `keep`. The old ones stand until the new one does.

    Those of steps that `keep_every` divides stay for good. Later ones than this are deleted too: they were damaged, or
    the run would have gone on from them.
    """
    world = world or World()
    path = directory / f"step-{position.step:08d}"
    with world.directory(path) as temporary:
        for name, tensors in groups.items():
            world.write(temporary, name, tensors)
        if world.is_main:
            write_json(temporary / "position.json", {**asdict(position), "groups": list(groups)})
    if world.is_main:
        standing = checkpoints(directory)
        later = standing.index(path) + 1
        for old in standing[:later][:-keep]:
            if keep_every is None or int(old.name[5:]) % keep_every:
                shutil.rmtree(old)
        for damaged in standing[later:]:
            shutil.rmtree(damaged)
    return path


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(directory.glob("step-????????"))


def resume(
    directory: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    *,
    identity: str,
    extra: Mapping[str, Callable[[Mapping[str, Tensor]], None]] | None = None,
    world: World | None = None,
) -> Position | None:
    """Load the newest checkpoint that is whole; None when there is no checkpoint.

    A damaged one is told on stderr and left out. Raises CheckpointError as `load_checkpoint` does, and when all are
    damaged: a run that has got somewhere does not start anew in silence.
    """
    newest: BrokenCheckpoint | None = None
    for path in reversed(checkpoints(directory)):
        try:
            return load_checkpoint(path, model, optimiser, identity=identity, extra=extra, world=world)
        except BrokenCheckpoint as error:
            print(f"warning: {error}; going back to the checkpoint before it", file=sys.stderr)
            newest = newest or error
    if newest is not None:
        raise CheckpointError(f"{newest}, and none before it is whole. Delete {directory} to start anew.")
    return None


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer | None = None,
    *,
    identity: str | None = None,
    extra: Mapping[str, Callable[[Mapping[str, Tensor]], None]] | None = None,
    world: World | None = None,
) -> Position:
    """Put a checkpoint's weights, and optimiser state if asked, into what is given.

    extra: for each further group of tensors what takes it. Raises BrokenCheckpoint when a file is missing or damaged,
    CheckpointError when the run is another (`identity`), keeps other groups (with `optimiser`), or a tensor is missing,
    surplus or of the wrong shape; nothing is changed then.
    """
    world = world or World()
    own = model_tensors(model)
    try:
        facts = json.loads((path / "position.json").read_text(encoding="utf-8"))
        held = set(facts.pop("groups"))
        position = Position(**facts)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BrokenCheckpoint(f"{path}: not a readable checkpoint ({error})") from error
    if identity is not None and position.identity != identity:
        raise CheckpointError(
            f"{path} belongs to a run with other settings (it says {position.identity}, this run is {identity}). "
            "Use another directory, or delete this one to start anew."
        )
    wanted = {"model", "optimiser", *(extra or {})}
    if optimiser is not None and held != wanted:
        raise CheckpointError(
            f"{path} holds {', '.join(sorted(held))}; this run needs {', '.join(sorted(wanted))}. `average` decides "
            "whether there is an average, precision float16 whether there is a scaler: set both as that run had them."
        )
    weights = world.read(path, "model", own)
    state = world.read(path, "optimiser", optimiser_tensors(model, optimiser)) if optimiser is not None else {}
    others = {name: world.read(path, name, {}) for name in extra or {}}
    check_shapes({name: tensor.shape for name, tensor in own.items()}, weights, str(path))
    if optimiser is not None:
        load_optimiser_tensors(model, optimiser, state, where=f"{path}/optimiser")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
    for name, take in (extra or {}).items():
        take(others[name])
    return position


class Keeper:
    """Writes the checkpoints of a run, in a thread while training goes on if asked; one at a time.

    An error of a write in the thread is raised by the next call of any method.
    """

    def __init__(self, save: Callable[..., Path], *, background: bool) -> None:
        self._save, self._background = save, background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, directory: Path, groups: Groups, position: Position, **options: Any) -> None:
        """Take the state as it is now; it is on disk after this, or in the background after `wait`."""
        self.wait()
        if not self._background:
            self._save(directory, groups, position, **options)
            return
        copies = {
            name: {key: t.detach().to("cpu", copy=True) for key, t in group.items()} for name, group in groups.items()
        }
        self._thread = threading.Thread(target=self._run, args=(directory, copies, position), kwargs=options)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written. Raises what the writing raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise what the writing has raised, without waiting for its end."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, directory: Path, groups: Groups, position: Position, **options: Any) -> None:
        try:
            self._save(directory, groups, position, **options)
        except BaseException as error:  # handed to the training thread
            self._error = error

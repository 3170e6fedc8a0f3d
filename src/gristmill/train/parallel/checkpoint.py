"""Checkpoints that all processes write together and any number of them reads.

A group of tensors is a folder of safetensors files, one per process, whose headers say which part of which tensor they
hold (torch.distributed.checkpoint in its Hugging Face form: no pickles), and `shards.json`, which names the files.
Every tensor lies there as the model of one process has it, so the layout may change between writing and reading.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor

from gristmill.errors import BrokenCheckpoint, CheckpointError
from gristmill.files import write_json
from gristmill.train.parallel.mesh import Mesh
from gristmill.train.parallel.slices import Slice

_INDEX = "shards.json"


def write_group(folder: Path, tensors: Mapping[str, Tensor], slices: Mapping[str, Slice], mesh: Mesh) -> None:
    """Write this process's part of a group. All processes call it; `slices` are those of the parameters.

    Raises CheckpointError when a process could not write.
    """
    state = {name: _plain(tensor.detach(), _slice(name, tensor, slices), mesh) for name, tensor in tensors.items()}
    try:
        save(state, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except (CheckpointException, OSError) as error:
        raise CheckpointError(f"{folder}: could not be written ({error})") from error
    dist.barrier()
    if mesh.is_main:
        sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
        write_json(folder / _INDEX, {"files": sizes})


def read_group(
    directory: Path, group: str, like: Mapping[str, Tensor], slices: Mapping[str, Slice], mesh: Mesh
) -> dict[str, Tensor]:
    """This process's part of a group, whether one process has written it or many.

    like: what this process holds, by name; a tensor that is not there, or has another size on disk, comes in full.
    Raises BrokenCheckpoint when a file is missing or damaged.
    """
    if (path := directory / f"{group}.safetensors").is_file():
        found = _guarded(path, lambda: load_file(path))
    else:
        found = _read_shards(directory / group, like, slices, mesh)
    return {name: _placed(name, tensor, like.get(name), slices, mesh) for name, tensor in found.items()}


def read_whole(folder: Path) -> dict[str, Tensor]:
    """All tensors of a group that many processes have written, in full; for one process that needs no others.

    Raises BrokenCheckpoint when a file is missing or damaged.
    """
    return _load(folder, lambda _name, _facts: None, alone=True)


def gathered(tensor: Tensor, part: Slice | None, mesh: Mesh) -> Tensor:
    """The whole of a weight or of its optimiser state, on every process that holds a part. All of them call it."""
    own: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if part is None:
        return own
    group, parts = mesh.group(part.over), mesh.size(part.over)
    lengths = [sum(part.sizes(number, parts)) for number in range(parts)]
    # parts may differ by a row, which a gather does not know
    first = own.movedim(part.dim, 0)
    padded = torch.cat((first, first.new_zeros((max(lengths) - len(first), *first.shape[1:])))).contiguous()
    received = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(received, padded, group=group)
    held = [rows[:length].movedim(0, part.dim) for rows, length in zip(received, lengths, strict=True)]
    return part.join(held)


def _plain(tensor: Tensor, part: Slice | None, mesh: Mesh) -> Tensor:
    """A tensor as it is written: its name and place those of one process's model, each process with some rows."""
    return tensor if part is None else _spread(gathered(tensor, part, mesh), part, mesh)


def _spread(whole: Tensor, part: Slice, mesh: Mesh) -> DTensor:
    """Rows of a whole tensor, dealt to the processes that share it."""
    names = tuple(name for name in mesh.devices.mesh_dim_names or () if name in ("shard", part.over))
    rows: list[Placement] = [Shard(0)] * len(names)
    spread = distribute_tensor(whole, mesh.devices[names], rows, src_data_rank=None)
    # a copy, so that the whole can go
    own = spread.to_local().clone()
    return DTensor.from_local(own, spread.device_mesh, rows, run_check=False, shape=whole.shape, stride=whole.stride())


def _read_shards(
    folder: Path, like: Mapping[str, Tensor], slices: Mapping[str, Slice], mesh: Mesh
) -> dict[str, Tensor]:
    def room(name: str, facts: TensorStorageMetadata) -> Tensor | None:
        own = like.get(name)
        if own is None:
            return None
        part, dtype = _slice(name, own, slices), facts.properties.dtype
        if part is not None:
            return _spread(torch.empty(facts.size, dtype=dtype, device=mesh.device), part, mesh)
        same = isinstance(own, DTensor) and own.shape == facts.size
        return torch.empty_like(own, dtype=dtype) if same else None

    return _load(folder, room)


def _placed(name: str, found: Tensor, like: Tensor | None, slices: Mapping[str, Slice], mesh: Mesh) -> Tensor:
    """What this process holds of a tensor that was read in full or in rows."""
    part = None if like is None else _slice(name, like, slices)
    if part is not None:
        whole = found.full_tensor() if isinstance(found, DTensor) else found
        if whole.ndim > part.dim and whole.shape[part.dim] == sum(part.sections):
            found = part.take(whole, mesh.rank(part.over), mesh.size(part.over))
    if isinstance(like, DTensor) and not isinstance(found, DTensor) and found.shape == like.shape:
        found = distribute_tensor(found.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return found


def _slice(name: str, tensor: Tensor, slices: Mapping[str, Slice]) -> Slice | None:
    """That of a parameter, or of optimiser state of its shape, "<parameter>.<key>"."""
    part = slices.get(name) or slices.get(name.rpartition(".")[0])
    return part if part is not None and tensor.ndim > part.dim else None


def _load(
    folder: Path, room: Callable[[str, TensorStorageMetadata], Tensor | None], *, alone: bool = False
) -> dict[str, Tensor]:
    """Read all tensors of a folder, each into what `room` makes for it, or in full."""

    def read() -> dict[str, Tensor]:
        _check_files(folder)
        reader = HuggingFaceStorageReader(str(folder))
        facts = reader.read_metadata().state_dict_metadata
        state: dict[str, Any] = {}
        for name, fact in facts.items():
            assert isinstance(fact, TensorStorageMetadata)
            made = room(name, fact)
            state[name] = torch.empty(fact.size, dtype=fact.properties.dtype) if made is None else made
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is what `alone` means
            load(state, storage_reader=reader, no_dist=alone)
        return state

    return _guarded(folder, read)


def _check_files(folder: Path) -> None:
    """Raise OSError unless all files stand in the length that they were written in."""
    sizes = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["files"]
    for name, size in sizes.items():
        if (folder / name).stat().st_size != size:
            raise OSError(f"{name} has {(folder / name).stat().st_size} bytes, written were {size}")


def _guarded(path: Path, read: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    try:
        return read()
    except (OSError, ValueError, KeyError, SafetensorError, CheckpointException) as error:
        raise BrokenCheckpoint(f"{path}: not readable ({error})") from error

"""The processes of a run: who talks to whom.

`start` joins the processes that torchrun (or Ray Train) has started: gloo on CPU, nccl on CUDA.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gristmill.errors import GristmillError
from gristmill.train.parallel.layout import DIMENSIONS, Parallel

MERGED: Mapping[str, tuple[str, ...]] = {
    # processes that hold the same weights, experts aside: gradients are summed over them
    "replicas": ("data", "expert", "context"),
    "expert_replicas": ("data", "context"),
    # processes that read different batches: losses and counts are summed over them
    "shares": ("data", "expert", "shard"),
}


@dataclass(frozen=True, eq=False)
class Mesh:
    """Where this process stands. `devices` has the dimensions of DIMENSIONS, for torch's own parts to slice.

    All groups are made by `start`, on all processes at once, because making one is a meeting of all.
    """

    layout: Parallel
    device: torch.device
    devices: DeviceMesh
    merged: Mapping[str, dist.ProcessGroup]

    def group(self, name: str) -> dist.ProcessGroup:
        """Those that differ from this process in a dimension, or in those of MERGED, alone."""
        return self.merged[name] if name in self.merged else self.devices.get_group(name)

    def size(self, name: str) -> int:
        """Processes of a group."""
        return dist.get_world_size(self.group(name))

    def rank(self, name: str) -> int:
        """Place of this process in a group, from 0."""
        return dist.get_rank(self.group(name))

    @property
    def is_main(self) -> bool:
        """Whether this is the first process of all."""
        return dist.get_rank() == 0


def start(layout: Parallel | None = None, device: str | None = None) -> Mesh:
    """Join the other processes. The layout is data parallelism on all of them unless given.

    device: "cpu" or "cuda"; CUDA where there is any. A process of local rank n takes device n. Raises GristmillError
    when the environment is not that of torchrun or would not survive the restarts that it promises, or the layout does
    not fit the number of processes.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.device(device, int(os.environ.get("LOCAL_RANK", "0"))) if device == "cuda" else torch.device(device)
    if not dist.is_initialized():  # Ray Train has done it already
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise GristmillError(
                f"{', '.join(missing)} not set: start the processes with `torchrun --nproc-per-node N ...` "
                "(docs/scale-out.md)"
            )
        layout = (layout or Parallel(data=None)).resolve(int(os.environ["WORLD_SIZE"]))
        _check_restarts()
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    layout = (layout or Parallel(data=None)).resolve(dist.get_world_size())
    if device == "cuda":
        torch.cuda.set_device(place)
    devices = init_device_mesh(device, layout.sizes, mesh_dim_names=DIMENSIONS)
    return Mesh(layout, place, devices, _merged_groups(layout))


def stop() -> None:
    """Leave the others: at the end of a program."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _check_restarts() -> None:
    """Refuse restarts on torchrun's shared store: it keeps the addresses of dead processes, and it is a matter of luck
    whether a restarted one reads those or the new ones."""
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise GristmillError(
            "torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment on every node: "
            "otherwise restarted processes may look for dead ones"
        )


def _merged_groups(layout: Parallel) -> dict[str, dist.ProcessGroup]:
    grid = torch.arange(dist.get_world_size()).view(layout.sizes)
    groups = {}
    for name, dimensions in MERGED.items():
        kept = [DIMENSIONS.index(dimension) for dimension in dimensions]
        order = [*(i for i in range(grid.ndim) if i not in kept), *kept]
        ranks = grid.permute(order).flatten(grid.ndim - len(kept)).flatten(0, -2).tolist()
        mine, _ = dist.new_subgroups_by_enumeration(ranks)
        groups[name] = mine
    return groups

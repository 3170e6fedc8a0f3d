"""Data parallelism: replicas that sum their gradients (DDP), and weights in shards (FSDP2).

Source: Li et al. 2020 (PyTorch Distributed); Rajbhandari et al. 2020 (ZeRO); Zhao et al. 2023 (FSDP).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gristmill.model.block import Block
from gristmill.train.parallel.mesh import Mesh
from gristmill.train.world import LossModule

_BUCKET_BYTES = 25 * 2**20


def replicate(module: LossModule, mesh: Mesh) -> nn.Module:
    """A replica whose gradients are summed with those of the others while the backward pass still runs."""
    group = mesh.group("replicas")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has a new name from torch 2.13 on
        replica = DistributedDataParallel(
            module,
            process_group=group,
            broadcast_buffers=False,
            # a batch need not use every weight: experts without tokens, terms without targets
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
        )
    # DDP's own hook would average; a lambda, because DDP refuses annotations that are strings
    replica.register_comm_hook(group, lambda state, bucket: _sum_bucket(state, bucket))
    return replica


def _sum_bucket(group: dist.ProcessGroup, bucket: Any) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None
    summed: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return summed


def shard_weights(module: LossModule, mesh: Mesh) -> LossModule:
    """Split every weight over the shard group by rows; a block's weights are whole only while it runs.

    Replicas of the shards sum their gradients. What is outside the blocks is sharded with the module itself, so that a
    tied matrix stays one.
    """
    plane = mesh.devices["shard"] if mesh.size("replicas") == 1 else _plane(mesh)
    for part in [*(part for part in module.modules() if isinstance(part, Block)), module]:
        fully_shard(part, mesh=plane)
        assert isinstance(part, FSDPModule)
        part.set_gradient_divide_factor(1.0)  # sums, no means
        part.set_force_sum_reduction_for_comms(True)
    return module


def _plane(mesh: Mesh) -> DeviceMesh:
    groups = [mesh.group("replicas"), mesh.group("shard")]
    held: list[list[int] | None] = [None] * dist.get_world_size(groups[0])
    dist.all_gather_object(held, dist.get_process_group_ranks(groups[1]), group=groups[0])
    return DeviceMesh.from_group(groups, mesh.device.type, torch.tensor(held), mesh_dim_names=("replicas", "shard"))


@contextmanager
def synchronised(module: nn.Module, *, now: bool) -> Iterator[None]:
    """Run forward and backward of one batch inside; gradients travel `now`, or stay to be added to."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(now)
    with module.no_sync() if isinstance(module, DistributedDataParallel) and not now else nullcontext():
        yield


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sum gradients over a group, in place. One that no process has stays absent."""
    if dist.get_world_size(group) == 1 or not parameters:
        return
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX, group=group)
    bucket: list[Tensor] = []
    for parameter, anywhere in zip(parameters, used.tolist(), strict=True):
        if not anywhere:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        if bucket and (bucket[0].dtype != local.dtype or sum(g.nbytes for g in bucket) + local.nbytes > _BUCKET_BYTES):
            _sum_flat(bucket, group)
            bucket = []
        bucket.append(local)
    _sum_flat(bucket, group)


def _sum_flat(gradients: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))

"""Several processes on this machine, joined as torchrun joins them."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def together(work: Callable[..., None], processes: int, *arguments: Any) -> None:
    """Run work(*arguments) in so many processes with torchrun's environment. An exception in one is raised here.

    The processes are forked from a server that has imported torch, so they start at once.
    """
    multiprocessing.set_forkserver_preload(["torch", "gristmill.train.loop", "gristmill.train.parallel"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(
        _enter, (work, processes, port, arguments), nprocs=processes, join=True, start_method="forkserver"
    )


def _enter(rank: int, work: Callable[..., None], processes: int, port: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    work(*arguments)


def write(path: Path, value: Any) -> None:
    """Hand a result of plain values and tensors to the test."""
    torch.save(value, path)


def read(path: Path) -> Any:
    """What `write` has written."""
    return torch.load(path, weights_only=True)

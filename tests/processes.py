"""Child processes for tests that kill them. They are forked from a server that has imported the package once."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "torch._dynamo",
        "gristmill.quickstart.pipeline",
        "gristmill.cli.quickstart",
        "matplotlib.backends.backend_svg",
        "transformers.models.auto.modeling_auto",  # one that is not installed is passed over
        "transformers.models.llama.modeling_llama",
    ]
)


def start(target: Callable[..., object], *arguments: Any, log: Path, threads: int = 1) -> ForkServerProcess:
    """Run `target` in a child; what it prints goes to `log`, its return value is the exit code."""
    process = _FORKS.Process(target=_child, args=(target, arguments, log, threads), daemon=True)
    process.start()
    return process


def finish(process: ForkServerProcess, seconds: float = 120) -> int:
    """Wait for the end and return the exit code; minus the signal's number for a killed one."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"process {process.pid} did not end in {seconds} s")
    return process.exitcode


def _child(target: Callable[..., object], arguments: tuple[Any, ...], log: Path, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(int(target(*arguments) or 0))  # type: ignore[call-overload]

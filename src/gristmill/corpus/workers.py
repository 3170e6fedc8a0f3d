"""Batches made ahead of time by other processes, so that a step does not wait for its data.

Batches are asked for by number and a number fixes its batch, so neither the number of workers nor how far they run
ahead changes what comes. Every worker has a pipe of its own: it ends when the other side closes it or dies, and its own
death shows as the pipe's end. Tensors come back in shared memory.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

import torch
import torch.multiprocessing  # teaches pipes to send tensors

from gristmill.core import Loader
from gristmill.errors import DataError, GristmillError


@dataclass(frozen=True)
class _Answer:
    """What a worker sends: the batch of a number, or what went wrong."""

    number: int
    batch: Any = None
    error: Exception | None = None


class Prefetched:
    """A `Loader` whose batches are prepared by `workers` processes, up to `ahead` beyond the one asked for.

    Use it in a `with` statement: the workers end with it. `stride` is how far the next number asked for lies from the
    last; a wrong guess costs time only. `start_method` is multiprocessing's; by default "fork" on Linux, which shares
    the loader's memory, elsewhere "spawn", for which the loader must pickle. Workers never touch a device.

    `batch` raises DataError where the loader does, RuntimeError with the worker's traceback for a bug in it, and
    GristmillError when a worker died; each names the number of the batch.
    """

    def __init__(
        self, loader: Loader, *, workers: int, ahead: int = 4, stride: int = 1, start_method: str | None = None
    ) -> None:
        for name, value in (("workers", workers), ("ahead", ahead), ("stride", stride)):
            if value < 1:
                raise GristmillError(f"{name} must be at least 1, got {value}. Without workers use the loader itself.")
        self.loader, self.ahead, self.stride = loader, ahead, stride
        context: Any = multiprocessing.get_context(start_method or ("fork" if sys.platform == "linux" else "spawn"))
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._asked: dict[int, int] = {}  # number of a batch -> the worker that was asked for it
        self._arrived: dict[int, _Answer] = {}  # answers to what is still asked for
        for _ in range(workers):
            ours, theirs = context.Pipe()
            self._pipes.append(ours)
            # a forked worker inherits our ends of the pipes so far: it closes them, or would never see us gone
            inherited = tuple(self._pipes) if context.get_start_method() == "fork" else ()
            process = context.Process(target=_serve, args=(loader, theirs, inherited), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)

    @property
    def batches_per_epoch(self) -> int:
        """See `Loader`."""
        return self.loader.batches_per_epoch

    def batch(self, number: int) -> Any:
        """See `Loader`."""
        wanted = range(number, number + (self.ahead + 1) * self.stride, self.stride)
        for other in [other for other in self._asked if other not in wanted]:
            del self._asked[other]  # its answer will come nevertheless, and be passed over
            self._arrived.pop(other, None)
        for other in wanted:
            if other not in self._asked:
                self._ask(other)
        worker = self._asked[number]
        while number not in self._arrived:
            answer = self._receive(worker, number)
            if answer.number in self._asked:
                self._arrived[answer.number] = answer
        del self._asked[number]
        answer = self._arrived.pop(number)
        if answer.error is not None:
            raise answer.error
        return answer.batch

    def close(self) -> None:
        """End the workers and wait for them."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        self._asked.clear()
        self._arrived.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, number: int) -> None:
        """Give the batch to the worker with the least to do."""
        owed = list(self._asked.values())
        worker = min(range(len(self._pipes)), key=owed.count)
        try:
            self._pipes[worker].send(number)
        except OSError as error:
            raise self._dead(worker, number) from error
        self._asked[number] = worker

    def _receive(self, worker: int, number: int) -> _Answer:
        try:
            answer: _Answer = self._pipes[worker].recv()
        except (EOFError, OSError) as error:
            raise self._dead(worker, number) from error
        return answer

    def _dead(self, worker: int, number: int) -> GristmillError:
        process = self._processes[worker]
        if self._pipes[worker].closed:
            return GristmillError(f"batch {number}: the workers are closed; ask inside the with statement")
        process.join(timeout=5)
        code = process.exitcode
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return GristmillError(
            f"batch {number}: a loader worker died ({how}). If memory ran out, use fewer workers or smaller batches."
        )


def _serve(loader: Loader, pipe: Connection, inherited: Sequence[Connection]) -> None:
    """What a worker does: numbers in, batches out, until the pipe ends."""
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the training process closes the pipes in peace
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # the processors belong to training, and forked OpenMP threads must not be used
    try:
        while True:
            number = pipe.recv()
            answer = _answer(loader, number)
            try:
                pipe.send(answer)
            except OSError:
                raise
            except Exception as error:  # the batch does not pickle; nothing has been sent
                pipe.send(_Answer(number, error=RuntimeError(f"batch {number} cannot be sent: {error!r}")))
    except (EOFError, OSError):
        pass  # closed, or the other side is gone


def _answer(loader: Loader, number: int) -> _Answer:
    # Errors are made anew of their text: not all of them pickle.
    try:
        return _Answer(number, loader.batch(number))
    except GristmillError as error:
        return _Answer(number, error=DataError(f"batch {number}: {error}"))
    except Exception:
        return _Answer(number, error=RuntimeError(f"batch {number}: a worker failed\n{traceback.format_exc()}"))

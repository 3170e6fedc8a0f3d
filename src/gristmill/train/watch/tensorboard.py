"""The figures of metrics.jsonl as TensorBoard events."""

from __future__ import annotations

from typing import Any

from gristmill.errors import MissingExtra
from gristmill.train.callbacks import Callback, Run
from gristmill.train.watch.monitors import flat


class TensorBoard(Callback):
    """Writes every number of a step's record, and its alarms as text, to `directory/tensorboard`.

    A run that goes on from a checkpoint hides the events after it. Comes after all monitors. Raises MissingExtra
    when tensorboard is not installed.
    """

    priority = -20

    def __init__(self) -> None:
        _writer_class()
        self._writer: Any = None
        self._step = 0

    def start(self, run: Run) -> None:
        """Open the file of events."""
        if run.world.is_main:
            self._open(run, run.position.step)

    def after_step(self, run: Run) -> None:
        """Write the record."""
        if self._writer is None:
            return
        step = run.position.step
        if step <= self._step:  # the run went back to a checkpoint
            self._open(run, step - 1)
        self._step = step
        for name, value in flat(run.record | {"tokens": run.position.tokens}):
            if value is not None:
                self._writer.add_scalar(name, value, step)
        if alarms := run.record.get("alarms"):
            self._writer.add_text("alarms", "\n\n".join(alarms), step)

    def checkpointed(self, run: Run) -> None:
        """What a checkpoint knows of is on disk."""
        if self._writer is not None:
            self._writer.flush()

    def end(self, run: Run) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self, run: Run, done: int) -> None:
        if self._writer is not None:
            self._writer.close()
        self._step = done
        self._writer = _writer_class()(log_dir=str(run.directory / "tensorboard"), purge_step=done + 1)


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtra("tensorboard", "watch") from error
    return SummaryWriter

"""Run stages in order and remember which are done, so that an interrupted run goes on.

A stage leaves its files first and its record last, both atomically. A stage whose record stands is not run again; one
that was cut off starts again, and training stages go on from their own checkpoints.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gristmill.errors import CheckpointError
from gristmill.files import write_json
from gristmill.train.watch.monitors import peak_memory


@dataclass
class StageRecord:
    """What a stage cost and found; `facts` is plain JSON for the report."""

    name: str
    seconds: float = 0.0
    tokens: int | None = None
    flops: float | None = None
    peak_memory_bytes: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def claim(directory: Path, settings: dict[str, Any]) -> None:
    """Make `directory` the home of a run with these settings, or check that it is.

    Where no stage is done yet, nothing would be lost, and the settings may change. Raises CheckpointError, naming
    those that differ, when a run with others lives there.
    """
    path = directory / "settings.json"  # config.json would make the directory look like a Hugging Face model
    if not path.exists() or not any((directory / "stages").glob("*.json")):
        write_json(path, settings)
        return
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a JSON object of settings ({error})") from error
    differing = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
    if differing:
        changes = ", ".join(f"{key}: {found.get(key)!r} there, {settings.get(key)!r} now" for key in differing)
        raise CheckpointError(
            f"{directory} holds a run with other settings ({changes}). "
            "Choose another --out, or delete it to start anew."
        )


def stage(directory: Path, name: str, work: Callable[[StageRecord], None]) -> StageRecord:
    """Run `work` unless it was done before; returns its record either way. `work` fills in tokens, FLOPs and facts."""
    path = directory / "stages" / f"{name}.json"
    if path.exists():
        print(f"{name}: done before", file=sys.stderr)
        return _read_record(path)
    print(f"{name}:", file=sys.stderr, flush=True)
    record = StageRecord(name)
    _reset_peak_memory()
    started = time.perf_counter()
    work(record)
    # a training stage that resumed has set its own time, that of all attempts
    record.seconds = record.seconds or time.perf_counter() - started
    record.peak_memory_bytes = peak_memory()
    write_json(path, asdict(record))
    return record


def _read_record(path: Path) -> StageRecord:
    try:
        return StageRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not a readable record of a stage ({error}). Delete it to run the stage again."
        ) from error


def _reset_peak_memory() -> None:
    """Start a new high-water mark (Linux; elsewhere the mark of the whole process is reported)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")

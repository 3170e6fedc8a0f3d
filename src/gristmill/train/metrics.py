"""metrics.jsonl: one JSON object per line, appended as training goes; the report is made from it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from gristmill.errors import DataError, GristmillError
from gristmill.files import write_text


class MetricsLog:
    """Appends records to a file. A resumed run first drops the records after its checkpoint, so none stands twice.

    Raises GristmillError when the file cannot be written.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self._path = path
        self._open(resume_step)

    def rewind(self, step: int) -> None:
        """Drop the records after `step`: the run went back to it."""
        self.close()
        self._open(step)

    def _open(self, step: int) -> None:
        kept = [r for r in read_metrics(self._path) if r["step"] <= step] if self._path.exists() and step else []
        write_text(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        self._handle = self._path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it reaches the file at once. Its numbers must be finite: JSON has no others."""
        try:
            self._handle.write(json.dumps(record, allow_nan=False) + "\n")
            self._handle.flush()
        except ValueError as error:
            told = f"{self._path}: the record of step {record.get('step')} is not JSON ({error})"
            raise GristmillError(f"{told}: {record}. Record None in the place of what is not finite.") from error
        except OSError as error:
            raise GristmillError(f"{self._path}: could not be written ({error.strerror or error})") from error

    def close(self) -> None:
        """Close the file. All that was written is in it already."""
        with contextlib.suppress(OSError):  # the rest of a line for which there was no room
            self._handle.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records. A last line cut off by a kill is left out; any other broken line raises DataError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(f"{path} line {number}: not JSON ({error})") from error
    return records

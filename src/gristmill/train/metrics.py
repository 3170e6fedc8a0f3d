"""metrics.jsonl: one JSON object per line, appended as training goes; the report is made from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gristmill.errors import DataError
from gristmill.files import write_text


class MetricsLog:
    """Appends records to a file. A resumed run first drops the records after its checkpoint, so none stands twice."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        kept = [r for r in read_metrics(path) if r["step"] <= resume_step] if path.exists() and resume_step else []
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._handle = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it reaches the file at once."""
        self._handle.write(json.dumps(record, allow_nan=False) + "\n")
        self._handle.flush()

    def close(self) -> None:
        """Close the file."""
        self._handle.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records. A last line cut off by a kill is left out; any other broken line raises DataError."""
    lines = path.read_text(encoding="utf-8").splitlines()
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(f"{path} line {number}: not JSON ({error})") from error
    return records

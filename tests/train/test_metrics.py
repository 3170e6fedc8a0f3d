"""metrics.jsonl: appended, resumed and read."""

from __future__ import annotations

from pathlib import Path

import pytest

from gristmill.errors import DataError
from gristmill.train.metrics import MetricsLog, read_metrics


def fill(path: Path, steps: range, resume_step: int = 0) -> None:
    log = MetricsLog(path, resume_step=resume_step)
    for step in steps:
        log.write({"step": step, "loss": step / 2})
    log.close()


def test_records_after_the_checkpoint_are_dropped_when_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    fill(path, range(1, 9))
    fill(path, range(6, 11), resume_step=5)
    assert [record["step"] for record in read_metrics(path)] == list(range(1, 11))
    fill(path, range(1, 3))
    assert [record["step"] for record in read_metrics(path)] == [1, 2], "a run from the start begins a new file"


def test_a_line_reaches_the_file_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl", resume_step=0)
    log.write({"step": 1})
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1}]
    log.close()


@pytest.mark.parametrize("length", range(1, 12))
def test_a_last_line_cut_by_a_kill_is_dropped(tmp_path: Path, length: int) -> None:
    path = tmp_path / "m.jsonl"
    fill(path, range(1, 4))
    with path.open("a") as handle:
        handle.write('{"step": 44}'[:length])
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    fill(path, range(4, 6), resume_step=3)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"m\.jsonl line 2: not JSON"):
        read_metrics(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"m\.jsonl: cannot be read"):
        read_metrics(tmp_path / "m.jsonl")

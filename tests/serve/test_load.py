"""bench/load.py and bench/serve.py, short and with a tiny model: a loaded server keeps its promises, both report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from serve.tiny import save_tiny_model

BENCH = Path(__file__).parents[2] / "bench"


def report(script: str, *words: object) -> dict[str, Any]:
    """What a bench says of a tiny model, in its last line."""
    command = [sys.executable, str(BENCH / script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_many_clients_some_of_whom_leave_read_slowly_or_send_nonsense(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path)
    found = report("load.py", "--model", model, "--streams", 40, "--seconds", 6, "--tokens", 60)
    assert found["problems"] == []
    assert set(found["ended"]) >= {"stream", "whole", "leave stream", "refused"}
    assert found["gap_ms"]["with slow"]["p50"] > 0


def test_the_price_of_http_is_measured(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path)
    found = report("serve.py", "--model", model, "--streams", 3, "--prompt", 8, "--new", 8, "--rounds", 1, "--first", 1)
    assert found["throughput_ratio"] > 0
    assert set(found["first_ms"]) == {"direct", "http"}

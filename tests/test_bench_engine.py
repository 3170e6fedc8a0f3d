"""bench/engine.py: sides in processes of their own, exactly as many tokens as asked, what is missing named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from engine import helpers

BENCH = Path(__file__).parent.parent / "bench" / "engine.py"


def test_a_quick_run_measures_what_is_there_and_names_what_is_not(tmp_path: Path) -> None:
    model = helpers.save(tmp_path / "model")
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_PYTHON")}
    sides = ["gristmill:float32", "openvino:int8", "gristmill:nonsense"]
    options = ["--models", str(model), "--directory", str(tmp_path), "--threads", "1", "--sides", *sides]
    done = subprocess.run(
        [sys.executable, str(BENCH), "--quick", *options],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["bench"], report["threads"]) == ("engine", 1)
    cases = report[str(model)]["cases"]
    assert cases.keys() == {"1x8", "2x8"}
    for rates in cases.values():
        assert rates.keys() == {"gristmill:float32"}
        ours = rates["gristmill:float32"]
        assert ours["agree"] == 4  # with itself, over all the tokens asked for
        assert min(ours["prefill"], ours["decode"], ours["throughput"]) > 0
    assert "openvino:int8 is left out: GRISTMILL_OPENVINO_PYTHON names no Python" in done.stderr
    assert "gristmill:nonsense is left out" in done.stderr

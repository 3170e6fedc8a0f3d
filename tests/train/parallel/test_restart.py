"""A node that dies is survived: torchrun starts the processes again, and they go on from the last checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from gristmill.train.metrics import read_metrics
from gristmill.train.parallel.checkpoint import read_whole
from train.parallel import restarted
from train.parallel.spawn import together

TESTS = Path(__file__).parents[2]


def launch(directory: Path) -> str:
    """Two processes under torchrun, with one more attempt in reserve; what they wrote to stderr."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, "-m", "train.parallel.restarted", str(directory)],
        env=os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def test_a_killed_process_leaves_the_run_as_it_would_have_been(tmp_path: Path) -> None:
    told = launch(tmp_path / "killed")
    assert "-9" in told, "the process did die"
    together(restarted.run, 2, tmp_path / "whole")
    found, expected = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("killed", "whole"))
    assert [r["step"] for r in found] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "gradient_norm", "learning_rate", "tokens"):
        assert [r[name] for r in found] == [r[name] for r in expected], name
    for group in ("model", "optimiser"):
        end, same_end = (
            read_whole(tmp_path / name / "checkpoints/step-00000006" / group) for name in ("killed", "whole")
        )
        assert all(torch.equal(end[name], same_end[name]) for name in end | same_end), "bit by bit"

"""Killed at any point, the same command goes on and ends with the same models."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

pytest.importorskip("rensa")
pytest.importorskip("matplotlib")

from gristmill.files import exclusive
from gristmill.train.metrics import read_metrics
from processes import finish, start
from quickstart.toy import STAGES, arguments, toy_main, write_corpus

MODELS = ("base/model.safetensors", "export/model.safetensors", "export/tokenizer.json")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "toy.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("whole")
    process = start(toy_main, arguments(directory / "run", corpus), log=directory / "log")
    assert finish(process) == 0, (directory / "log").read_text()
    return directory / "run"


def equal_models(run: Path, whole: Path) -> bool:
    return all((run / name).read_bytes() == (whole / name).read_bytes() for name in MODELS)


def wait_until_it_works(process: BaseProcess, log: Path, stage: str) -> None:
    """Until the stage has begun, or all is over."""
    while process.is_alive() and f"{stage}:" not in (log.read_text() if log.exists() else ""):
        time.sleep(0.005)


def test_killed_in_every_stage_it_ends_with_the_same_models(tmp_path: Path, corpus: Path, whole: Path) -> None:
    """Each attempt gets one stage further and is killed somewhere in it; then the command runs to its end."""
    words, draw, codes = arguments(tmp_path / "run", corpus), random.Random(0), list[int]()
    for number, stage in enumerate(STAGES):
        log = tmp_path / f"log-{number}"
        process = start(toy_main, words, log=log)
        wait_until_it_works(process, log, stage)
        time.sleep(draw.uniform(0.0, 0.3 if stage in ("pretrain", "finetune", "evaluation") else 0.03))
        process.kill()
        codes.append(finish(process))
        assert codes[-1] in (-signal.SIGKILL, 0), log.read_text()
    assert codes.count(-signal.SIGKILL) >= 4
    log = tmp_path / "log"
    assert finish(start(toy_main, words, log=log)) == 0, log.read_text()
    assert equal_models(tmp_path / "run", whole)
    for name in ("pretrain", "finetune"):
        recorded = [
            [r["step"] for r in read_metrics(path / name / "metrics.jsonl")] for path in (tmp_path / "run", whole)
        ]
        assert recorded[0] == recorded[1] == list(range(1, len(recorded[1]) + 1))
    assert not list((tmp_path / "run").rglob("*.tmp"))


@pytest.mark.parametrize("stage", ["finetune", "evaluation"])
def test_killed_between_the_files_of_a_stage_and_its_record(
    tmp_path: Path, corpus: Path, whole: Path, stage: str
) -> None:
    """All that comes before the stage is done, and nothing of what comes after."""
    run, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(whole, run)
    for later in STAGES[STAGES.index(stage) :]:
        (run / "stages" / f"{later}.json").unlink()
        shutil.rmtree(run / later, ignore_errors=True)
    if stage == "finetune":
        shutil.rmtree(run / "export", ignore_errors=True)
    words = arguments(run, corpus)
    assert finish(start(toy_main, words, stage, log=log)) == -signal.SIGKILL, log.read_text()
    assert not (run / "stages" / f"{stage}.json").exists()
    assert finish(start(toy_main, words, log=log)) == 0, log.read_text()
    assert equal_models(run, whole)


def test_ctrl_c_says_how_to_go_on_and_is_code_130(tmp_path: Path, corpus: Path, whole: Path) -> None:
    words, log = arguments(tmp_path / "run", corpus), tmp_path / "log"
    process = start(toy_main, words, log=log)
    wait_until_it_works(process, log, "pretrain")
    metrics = tmp_path / "run" / "pretrain" / "metrics.jsonl"
    while process.is_alive() and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 130
    text = log.read_text()
    assert f"The same command goes on from here ({tmp_path / 'run'})" in text
    assert "Traceback" not in text
    steps = len(metrics.read_text().splitlines())
    checkpoints = sorted((tmp_path / "run" / "pretrain" / "checkpoints").iterdir())
    assert checkpoints[-1].name == f"step-{steps:08d}", "nothing of the work is lost"


def test_two_at_once_in_one_directory_the_second_is_refused(tmp_path: Path, corpus: Path) -> None:
    words, log = arguments(tmp_path / "run", corpus), tmp_path / "log"
    with exclusive(tmp_path / "run"):
        assert finish(start(toy_main, words, log=log)) == 1
    assert "another process is running here" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert not (tmp_path / "run" / "settings.json").exists(), "it has touched nothing"


def test_what_killed_processes_left_half_written_is_removed(tmp_path: Path) -> None:
    places = [tmp_path, *(tmp_path / name for name in ("corpus", "tokens", "stages"))]
    for place in places:
        (place / ".export.123.0123abcd.tmp").mkdir(parents=True)
        (place / ".export.123.0123abcd.tmp" / "model.safetensors").write_text("half")
        (place / ".documents.jsonl.9.ffffffff.tmp").write_text("half")
        (place / ".mine.tmp").write_text("not one of ours")
    with exclusive(tmp_path):
        assert {path.name for place in places for path in place.glob(".*.tmp")} == {".mine.tmp"}


def run_out_of_room(words: list[str], size: int) -> int:
    """Files cannot grow beyond `size` bytes: the writers' own errors, as on a full disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return toy_main(words)


@pytest.mark.parametrize("size", [10_000, 120_000])
def test_a_full_disk_is_one_clear_line_and_leaves_nothing_half_written(tmp_path: Path, corpus: Path, size: int) -> None:
    log = tmp_path / "log"
    words = arguments(tmp_path / "run", corpus)
    assert finish(start(run_out_of_room, words, size, log=log)) == 1, log.read_text()
    last = log.read_text().splitlines()[-1]
    assert last.startswith("gristmill: ")
    assert "could not be written" in last
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert ("checkpoints/step-" in last) == (size == 120_000)
    assert "Traceback" not in log.read_text()

"""A run that was killed, interrupted or damaged ends with the weights of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from gristmill.errors import CheckpointError, GristmillError
from gristmill.train.checkpoint import checkpoints
from gristmill.train.metrics import read_metrics
from processes import finish, start
from train.toy import Hooked, run_and_die, same, slow_run, toy_config, toy_run, weights, wide_run

LAST = "step-00000030"


def final(directory: Path) -> dict[str, Tensor]:
    return load_file(checkpoints(directory / "checkpoints")[-1] / "model.safetensors")


def steps(directory: Path) -> list[int]:
    return [record["step"] for record in read_metrics(directory / "metrics.jsonl")]


def leftovers(directory: Path) -> list[Path]:
    return list(directory.rglob(".*.tmp"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("whole")
    toy_run(directory)
    return directory


def kill_when_it_has_begun(process: BaseProcess, directory: Path, seconds: float) -> None:
    """Kill it so long after its first step."""
    metrics = directory / "metrics.jsonl"
    before = read_bytes(metrics)
    while read_bytes(metrics) == before and process.is_alive():
        time.sleep(0.002)
    time.sleep(seconds)
    process.kill()
    assert finish(process) in (-signal.SIGKILL, 0)


def test_killed_at_random_moments_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    log, draw = tmp_path / "log", random.Random(0)
    for _ in range(5):
        process = start(slow_run, tmp_path / "run", log=log)
        kill_when_it_has_begun(process, tmp_path / "run", draw.uniform(0.0, 0.12))
    assert finish(start(slow_run, tmp_path / "run", log=log)) == 0, log.read_text()
    assert finish(start(slow_run, tmp_path / "whole", log=log)) == 0, log.read_text()
    assert same(final(tmp_path / "run"), final(tmp_path / "whole"))
    assert steps(tmp_path / "run") == list(range(1, 31))


def test_two_threads_are_as_exact(tmp_path: Path) -> None:
    log = tmp_path / "log"
    kill_when_it_has_begun(start(wide_run, tmp_path / "run", log=log, threads=2), tmp_path / "run", 0.05)
    for name in ("run", "whole"):
        assert finish(start(wide_run, tmp_path / name, log=log, threads=2)) == 0, log.read_text()
    assert same(final(tmp_path / "run"), final(tmp_path / "whole"))


def read_bytes(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


@pytest.mark.parametrize("where", ["before", "between", "after"])
def test_killed_around_a_checkpoint_it_loses_nothing_and_leaves_nothing_behind(
    tmp_path: Path, whole: Path, where: str
) -> None:
    assert finish(start(run_and_die, tmp_path / "run", where, log=tmp_path / "log")) == -signal.SIGKILL
    assert steps(tmp_path / "run") == list(range(1, 13)), "the metrics line of step 12 was written before the kill"
    standing = [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")]
    assert standing[-1] == ("step-00000012" if where == "after" else "step-00000008")
    assert len(leftovers(tmp_path / "run")) == (1 if where == "between" else 0)
    model = toy_run(tmp_path / "run")
    assert same(weights(model), final(whole))
    assert steps(tmp_path / "run") == list(range(1, 31))
    assert not leftovers(tmp_path / "run")
    assert len(checkpoints(tmp_path / "run" / "checkpoints")) == 2


def test_a_resumed_run_keeps_its_records_and_its_clock(tmp_path: Path, whole: Path) -> None:
    assert finish(start(run_and_die, tmp_path / "run", "after", log=tmp_path / "log")) == -signal.SIGKILL
    toy_run(tmp_path / "run")
    ours, theirs = (read_metrics(path / "metrics.jsonl") for path in (tmp_path / "run", whole))
    measured = ("step", "loss", "validation_loss", "learning_rate", "gradient_norm", "tokens")
    assert [[r.get(key) for key in measured] for r in ours] == [[r.get(key) for key in measured] for r in theirs]
    seconds = [record["seconds"] for record in ours]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 6, 30])
def test_a_signal_ends_the_step_and_writes_a_checkpoint(
    tmp_path: Path, whole: Path, number: signal.Signals, step: int
) -> None:
    before = signal.getsignal(number)
    stopping = Hooked(lambda call: os.kill(os.getpid(), number) if call == step else None)
    with pytest.raises(KeyboardInterrupt):
        toy_run(tmp_path, objective=stopping)
    assert signal.getsignal(number) is before
    assert checkpoints(tmp_path / "checkpoints")[-1].name == f"step-{step:08d}"
    assert same(weights(toy_run(tmp_path)), final(whole))
    assert steps(tmp_path) == list(range(1, 31))


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    def twice(call: int) -> None:
        if call == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        toy_run(tmp_path, objective=Hooked(twice))
    assert checkpoints(tmp_path / "checkpoints")[-1].name == "step-00000004"


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = weights(toy_run(tmp_path))
    counting = Hooked(lambda _: pytest.fail("it trains"))
    assert same(weights(toy_run(tmp_path, objective=counting)), first)


@pytest.mark.parametrize("name", ["model.safetensors", "optimiser.safetensors", "position.json"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "gone"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    toy_run(tmp_path)
    path = tmp_path / "checkpoints" / LAST / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "emptied" else path.stat().st_size // 2])
    capsys.readouterr()
    assert same(weights(toy_run(tmp_path)), final(whole))
    message = capsys.readouterr().err
    assert "warning" in message
    assert LAST in message
    assert steps(tmp_path) == list(range(1, 31))
    assert same(final(tmp_path), final(whole)), "the damaged one is written again"


def test_when_all_checkpoints_are_damaged_it_does_not_start_anew_in_silence(tmp_path: Path) -> None:
    toy_run(tmp_path)
    for path in (tmp_path / "checkpoints").glob("*/model.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{LAST}.*none before it is whole"):
        toy_run(tmp_path)


def test_a_checkpoint_of_more_steps_than_the_run_has_is_refused(tmp_path: Path) -> None:
    toy_run(tmp_path)
    with pytest.raises(CheckpointError, match="step 30, beyond 10 steps"):
        toy_run(tmp_path, toy_config(steps=10))


def test_a_full_disk_leaves_the_checkpoint_before_whole(tmp_path: Path, whole: Path) -> None:
    log = tmp_path / "log"
    process = start(run_on_a_full_disk, tmp_path / "run", log=log)
    assert finish(process) == 3, log.read_text()
    assert "step-00000012" in log.read_text()
    assert "could not be written" in log.read_text()
    standing = [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")]
    assert standing == ["step-00000004", "step-00000008"]
    assert not leftovers(tmp_path / "run")
    assert same(weights(toy_run(tmp_path / "run")), final(whole))


def run_on_a_full_disk(directory: Path) -> int:
    """Files stop growing in the third checkpoint: the real error of the real writers."""
    import resource

    def fill(call: int) -> None:
        if call == 12:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))

    try:
        toy_run(directory, toy_config(background_checkpoints=False), objective=Hooked(fill))
    except GristmillError as error:
        print(error, flush=True)
        return 3
    return 0


def test_a_full_disk_under_the_metrics_is_a_clear_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert finish(start(run_without_room_for_metrics, tmp_path / "run", log=log)) == 3, log.read_text()
    assert "metrics.jsonl: could not be written" in log.read_text()
    records = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in records[:-1]] == list(range(1, len(records)))


def run_without_room_for_metrics(directory: Path) -> int:
    """The same limit while no checkpoint is due."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        toy_run(directory, toy_config(checkpoint_every=30))
    except GristmillError as error:
        print(error, flush=True)
        return 3
    return 0

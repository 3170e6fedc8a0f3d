"""A checkpoint of any number of processes, in any layout, goes on with any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from gristmill.errors import BrokenCheckpoint, CheckpointError
from gristmill.train.parallel import Parallel, start
from gristmill.train.parallel.checkpoint import read_whole, write_group
from gristmill.train.parallel.mesh import Mesh, stop
from train.parallel.small import LLAMA, curve, small_run
from train.parallel.spawn import read, together, write

STEPS = {"steps": 4, "checkpoint_every": 2, "keep_checkpoints": 3, "average": 0.5, "schedule": "constant"}
FIRST = {"shard_tensor": Parallel(shard=2, tensor=2), "shard": Parallel(data=2, shard=2)}
THEN = {2: Parallel(tensor=2), 1: Parallel()}


def first_half(directory: Path) -> None:
    """Two steps on four processes in each layout; and the run of one process, taken up."""
    for name, layout in FIRST.items():
        small_run(LLAMA, directory / f"{name}_2", start(layout, "cpu"), **STEPS | {"steps": 2})
    mesh = start(Parallel(shard=2, tensor=2), "cpu")
    small_run(LLAMA, directory / "alone", mesh, **STEPS)
    write(directory / f"refused.{dist.get_rank()}", refused(directory / "whole", mesh))
    stop()


def refused(directory: Path, mesh: Mesh) -> str:
    """What a process is told when one of them, not itself, cannot write."""
    blocked = directory / "metrics.jsonl/group"  # a file, so there can be no folder in it
    try:
        write_group(blocked if dist.get_rank() == 2 else directory / "group", {"x": torch.ones(3)}, {}, mesh)
    except CheckpointError as error:
        return str(error)
    return ""


def second_half(directory: Path, number: int) -> None:
    """Two more on fewer."""
    for name in FIRST:
        mesh = start(THEN[number], "cpu")
        weights = small_run(LLAMA, directory / f"{name}_{number}", mesh, **STEPS)
        if mesh.is_main:
            write(directory / f"{name}_{number}.weights", weights)
    stop()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("elastic")
    small_run(LLAMA, directory / "alone", **STEPS | {"steps": 2})
    write(directory / "expected", small_run(LLAMA, directory / "whole", **STEPS))
    together(first_half, 4, directory)
    for name in FIRST:
        shutil.copytree(directory / f"{name}_2", directory / f"{name}_1")
    for number in THEN:
        together(second_half, number, directory, number)
    return directory


def same_curve(found: Path, expected: Path) -> None:
    """Losses and gradient norms of every step, and the held-out loss of the average at the end."""
    for left, right in zip(curve(found), curve(expected), strict=True):
        assert left[:2] == pytest.approx(right[:2], rel=1e-5)
    assert curve(found)[-1] == pytest.approx(curve(expected)[-1], rel=1e-5)


@pytest.mark.parametrize("number", THEN)
@pytest.mark.parametrize("name", FIRST)
def test_four_processes_are_continued_by_fewer(runs: Path, name: str, number: int) -> None:
    same_curve(runs / f"{name}_{number}", runs / "whole")
    weights, whole = read(runs / f"{name}_{number}.weights"), read(runs / "expected")
    assert all(torch.allclose(weights[key], whole[key], atol=1e-5) for key in whole)


def test_one_process_is_continued_by_four(runs: Path) -> None:
    same_curve(runs / "alone", runs / "whole")


@pytest.mark.parametrize("group", ["model", "optimiser", "average"])
def test_on_disk_every_tensor_is_that_of_one_process(runs: Path, group: str) -> None:
    expected = load_file(runs / "whole/checkpoints/step-00000002" / f"{group}.safetensors")
    for name in FIRST:
        folder = runs / f"{name}_2/checkpoints/step-00000002" / group
        found = read_whole(folder)
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[key], expected[key], atol=1e-5) for key in expected)
        assert not list(folder.glob("*.metadata")), "no pickles"
        sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
        assert len(sizes) == 4
        assert max(sizes) < 0.5 * sum(sizes), "each process writes its part"


def test_when_one_process_cannot_write_all_are_told(runs: Path) -> None:
    assert all("could not be written" in read(runs / f"refused.{rank}") for rank in range(4))


@pytest.mark.parametrize("harm", ["remove", "cut", "garble", "index"])
def test_a_damaged_group_is_told_as_such(runs: Path, tmp_path: Path, harm: str) -> None:
    source = runs / "shard_2/checkpoints/step-00000002/model"
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    if harm == "remove":
        victim.unlink()
    elif harm == "cut":
        victim.write_bytes(victim.read_bytes()[:-8])
    elif harm == "garble":
        victim.write_bytes(b"\xff" * victim.stat().st_size)
    else:
        (tmp_path / "shards.json").write_text("{")
    with pytest.raises(BrokenCheckpoint, match=str(tmp_path)):
        read_whole(tmp_path)

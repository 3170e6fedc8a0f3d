"""Every layout trains as one process does: four processes, many layouts, one start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gristmill.train.parallel import Parallel, start
from gristmill.train.parallel.mesh import stop
from train.parallel.small import EVERYTHING, LLAMA, curve, small_run
from train.parallel.spawn import read, together, write

LAYOUTS = {
    "data": (LLAMA, Parallel(data=4)),
    "shard": (LLAMA, Parallel(shard=4)),
    "data_shard": (EVERYTHING, Parallel(data=2, shard=2)),
    "data_tensor": (EVERYTHING, Parallel(data=2, tensor=2)),
    "tensor": (EVERYTHING, Parallel(tensor=4, sequence=True)),
    "shard_tensor": (LLAMA, Parallel(shard=2, tensor=2)),
    "shard_sequence": (LLAMA, Parallel(shard=2, tensor=2, sequence=True)),
}


def run_all(directory: Path) -> None:
    for name, (config, layout) in LAYOUTS.items():
        mesh = start(layout, "cpu")
        # computing activations again must meet the same collectives
        weights = small_run(config, directory / name, mesh, checkpoint_activations=layout.sequence)
        write(directory / f"{name}.{dist.get_rank()}", weights)
    stop()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    together(run_all, 4, directory)
    for name, config in (("llama", LLAMA), ("everything", EVERYTHING)):
        write(directory / name, small_run(config, directory / f"{name}_run"))
    return directory


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_norms_and_weights_are_those_of_one_process(runs: Path, name: str) -> None:
    alone = "llama" if LAYOUTS[name][0] is LLAMA else "everything"
    for found, expected in zip(curve(runs / name), curve(runs / f"{alone}_run"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    weights, expected = read(runs / f"{name}.0"), read(runs / alone)
    assert weights.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(
            weights[key], expected[key], rtol=0, atol=1e-5, msg=lambda told, k=key: f"{k} {told}"
        )


@pytest.mark.parametrize("name", LAYOUTS)
def test_replicas_are_the_same_bit_by_bit(runs: Path, name: str) -> None:
    first, *others = (read(runs / f"{name}.{rank}") for rank in range(4))
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)

"""Worker processes change when a batch is made, never which it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gristmill.corpus.loader import PackedLoader
from gristmill.corpus.shards import TokenDataset, TokenList, write_shards
from gristmill.corpus.workers import Prefetched
from gristmill.errors import DataError, GristmillError
from gristmill.tokens.batch import PackedBatch


def documents() -> list[tuple[np.ndarray, None]]:
    generator = np.random.default_rng(0)
    return [(generator.integers(0, 50, length), None) for length in generator.integers(2, 40, 120)]


def loader() -> PackedLoader:
    return PackedLoader(TokenList(documents(), vocab_size=50), row_length=48, rows_per_batch=3, seed=2)


def same(left: PackedBatch, right: PackedBatch) -> bool:
    return torch.equal(left.input_ids, right.input_ids) and left.segment_lengths == right.segment_lengths


class Failing:
    """Batch 3 is broken, 5 is a bug, 7 kills its process, 9 does not pickle."""

    batches_per_epoch = 100

    def batch(self, number: int) -> object:
        if number == 3:
            raise DataError("document 12: token id 99 is outside the vocabulary")
        if number == 5:
            raise KeyError("oops")
        if number == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return (lambda: None) if number == 9 else number


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_loaders_batches_in_any_order(workers: int) -> None:
    plain = loader()
    numbers = [*range(12), 40, 41, 3, 2, 4, 1, 5, 10**6, 0, 2, 4, 4]
    with Prefetched(loader(), workers=workers, ahead=3) as ahead:
        assert ahead.batches_per_epoch == plain.batches_per_epoch
        for number in numbers:
            assert same(ahead.batch(number), plain.batch(number))


def test_a_share_of_the_batches_is_not_prepared_in_vain(tmp_path: Path) -> None:
    log = tmp_path / "numbers"

    class Logged:
        batches_per_epoch = 9

        def batch(self, number: int) -> int:
            with log.open("a") as file:
                file.write(f"{number}\n")
            return number

    with Prefetched(Logged(), workers=2, ahead=2, stride=4) as ahead:
        assert [ahead.batch(number) for number in range(1, 30, 4)] == list(range(1, 30, 4))
    assert {int(line) % 4 for line in log.read_text().split()} == {1}


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    with Prefetched(loader(), workers=1) as ahead:
        ahead.batch(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_errors_name_the_batch_and_workers_go_on() -> None:
    with Prefetched(Failing(), workers=2, ahead=1) as ahead:
        with pytest.raises(DataError, match=r"^batch 3: document 12: token id 99"):
            ahead.batch(3)
        assert ahead.batch(4) == 4
        with pytest.raises(RuntimeError, match=r"(?s)batch 5: .*in batch.*KeyError: 'oops'"):
            ahead.batch(5)
        with pytest.raises(RuntimeError, match="batch 9 cannot be sent"):
            ahead.batch(9)
        assert ahead.batch(10) == 10


def test_a_dead_worker_is_reported_at_once() -> None:
    with Prefetched(Failing(), workers=2, ahead=1) as ahead:
        with pytest.raises(GristmillError, match=r"batch 7: a loader worker died \(killed by SIGKILL\)"):
            ahead.batch(7)
        processes = ahead._processes
    assert not any(process.is_alive() for process in processes)
    with pytest.raises(GristmillError, match="batch 0: the workers are closed"):
        ahead.batch(0)


def test_settings_are_refused_by_name() -> None:
    with pytest.raises(GristmillError, match="workers must be at least 1, got 0"):
        Prefetched(Failing(), workers=0)
    with pytest.raises(GristmillError, match="stride"):
        Prefetched(Failing(), workers=1, stride=0)


def test_shards_are_mapped_again_by_a_spawned_worker(tmp_path: Path) -> None:
    dataset = write_shards(documents(), tmp_path / "s", vocab_size=50, tokenizer_hash="h", eos_token_id=None)
    plain = PackedLoader(dataset, row_length=48, rows_per_batch=3, seed=2)
    with Prefetched(plain, workers=1, start_method="forkserver") as ahead:
        assert same(ahead.batch(5), plain.batch(5))
    callable_, arguments = dataset.__reduce__()
    assert callable_(*arguments).fingerprint == dataset.fingerprint
    assert isinstance(dataset, TokenDataset)


PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv[1])
from corpus.test_workers import loader
from gristmill.corpus.workers import Prefetched
with Prefetched(loader(), workers=2) as ahead:
    ahead.batch(0)
    print(*(process.pid for process in ahead._processes), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(how: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parents[1])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    if how == signal.SIGINT:
        os.killpg(parent.pid, how)  # as a terminal sends it: to the parent and its workers alike
    else:
        parent.send_signal(how)
    _, complaints = parent.communicate(timeout=30)
    assert complaints.count("Traceback") <= 1  # that of the parent alone
    deadline = time.monotonic() + 10
    while alive := [pid for pid in workers if _running(pid)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.02)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False

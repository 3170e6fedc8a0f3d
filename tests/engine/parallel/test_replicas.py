"""Several workers answer as one would, whoever of them dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from engine import helpers
from gristmill.core import RequestOutput, SamplingParams
from gristmill.engine.llm import LLM
from gristmill.engine.parallel.replicas import ReplicatedLLM
from gristmill.engine.scheduling.balance import PrefixAware, RoundRobin
from gristmill.errors import CheckpointError, GristmillError, RequestError

OPTIONS = {"kv_cache_tokens": 512, "max_num_seqs": 2, "fast_kernels": False}
PROMPTS = ["The river", *(helpers.prompt(5 + 3 * seed, seed) for seed in range(7))]
SAMPLED = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=1.0, max_tokens=80, ignore_eos=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pair(saved: Path) -> ReplicatedLLM:  # type: ignore[misc]
    with ReplicatedLLM(saved, 2, threads=1, in_flight=3, **OPTIONS) as llm:
        yield llm


def told(outputs: list[RequestOutput]) -> list[tuple[str | None, list[int], str, str | None]]:
    return [(o.prompt, c.token_ids, c.text, c.finish_reason) for o in outputs for c in o.outputs]


def test_answers_are_those_of_one_process_in_order(saved: Path, pair: ReplicatedLLM) -> None:
    alone = LLM(saved, **OPTIONS)
    assert told(pair.generate(PROMPTS, SAMPLED)) == told(alone.generate(PROMPTS, SAMPLED))
    assert told(pair.generate("The river", SAMPLED)) == told(alone.generate("The river", SAMPLED))
    assert sum(pair.served) == len(PROMPTS) + 1
    assert min(pair.served) > 0, "a worker was idle beside a queue"


def test_a_refused_prompt_is_an_error_and_leaves_nothing_behind(pair: ReplicatedLLM) -> None:
    for _ in range(2):
        with pytest.raises(RequestError) as refused:
            pair.generate([PROMPTS[0], helpers.prompt(200), PROMPTS[1]], SamplingParams(max_tokens=4))
        assert refused.value.field == "prompt"
    assert len(pair.generate(PROMPTS[:3], SAMPLED)) == 3


def test_the_policy_decides_who_answers(pair: ReplicatedLLM) -> None:
    before = list(pair.served)
    pair.balancer = RoundRobin()
    pair.generate(PROMPTS[:4], SAMPLED)
    assert [now - then for now, then in zip(pair.served, before, strict=True)] == [2, 2]
    pair.balancer, before = PrefixAware(), list(pair.served)
    shared = helpers.prompt(60, seed=9)
    for last in range(4):
        pair.generate([[*shared, 5 + last]], SamplingParams(max_tokens=1, ignore_eos=True))
    assert sorted(now - then for now, then in zip(pair.served, before, strict=True)) == [0, 4]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_requests_of_a_lost_worker_are_answered_by_another(saved: Path, how: signal.Signals) -> None:
    expected = told(LLM(saved, **OPTIONS).generate(PROMPTS, LONG))
    with ReplicatedLLM(saved, 2, threads=1, patience=3.0, **OPTIONS) as llm:
        # before it can answer: all that it was given comes back
        threading.Thread(target=_keep, args=(llm.process_ids[0], how), daemon=True).start()
        time.sleep(0.1)
        assert told(llm.generate(PROMPTS, LONG)) == expected
        assert llm.num_live == 1
        assert llm.served[0] == 0
        assert llm.retried > 0
        if how is signal.SIGKILL:
            threading.Thread(target=_kill_all, args=(llm,), daemon=True).start()
            with pytest.raises(GristmillError, match="all 2 workers are gone"):
                _generate_on(llm)


def test_a_request_that_takes_its_workers_along_is_answered_with_the_error(saved: Path) -> None:
    deadly = _Deadly()
    with ReplicatedLLM(saved, 3, threads=1, balancer=deadly, **OPTIONS) as llm:
        deadly.victims = list(llm.process_ids[:2])
        (output,) = llm.generate([PROMPTS[1]], SAMPLED)
        assert output.outputs[0].finish_reason == "error"
        assert "died each of the 2 times" in str(output.outputs[0].error)
        assert llm.generate([PROMPTS[1]], SAMPLED)[0].outputs[0].finish_reason == "length"


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises((GristmillError, CheckpointError), match="nowhere"):
        ReplicatedLLM(tmp_path / "nowhere", 1, threads=1)
    with pytest.raises(RequestError, match="at least 1"):
        ReplicatedLLM(tmp_path, 0)


class _Deadly:
    """Takes the first worker that is believed to live, and sees to it that it is stopped before it can answer."""

    def __init__(self) -> None:
        self.victims: list[int] = []

    def choose(self, load: object, workers: list[object]) -> int:
        if self.victims:
            process = self.victims.pop(0)
            os.kill(process, signal.SIGSTOP)
            threading.Timer(0.2, os.kill, (process, signal.SIGKILL)).start()
        return 0


def _keep(process: int, how: signal.Signals) -> None:
    """Again and again, lest something wakes it."""
    with suppress(ProcessLookupError):
        while True:
            os.kill(process, how)
            time.sleep(0.02)


def _kill_all(llm: ReplicatedLLM) -> None:
    time.sleep(0.3)
    os.kill(llm.process_ids[1], signal.SIGKILL)


def _generate_on(llm: ReplicatedLLM) -> None:
    for _ in range(1000):
        llm.generate(PROMPTS, LONG)

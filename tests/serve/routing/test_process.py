"""Workers in processes answer as one engine would; who dies takes its own requests along and comes back."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gristmill.core import RequestOutput, SamplingParams
from gristmill.engine.async_engine import EngineClosed, RequestStream
from gristmill.engine.llm import LLM
from gristmill.engine.request import Standing
from gristmill.engine.scheduling.balance import Load, PrefixAware, Worker
from gristmill.errors import GristmillError, RequestError
from gristmill.serve.routing.feed import WorkerDied
from gristmill.serve.routing.process import EngineProcess
from gristmill.serve.routing.routed import RoutedEngine, RoutedModel
from gristmill.serve.routing.start import start_workers
from serve.running import wait_for
from serve.tiny import save_tiny_model

OPTIONS = {"fast_kernels": False, "max_num_seqs": 8}
SAMPLED = SamplingParams(temperature=1.0, seed=3, max_tokens=20, n=2, logprobs=2, ignore_eos=True)
LONG = SamplingParams(temperature=1.0, seed=1, n=8, max_tokens=240, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(directory: Path) -> Iterator[RoutedModel]:
    model = start_workers(str(directory), OPTIONS, workers=2, name="tiny", threads=1)
    yield model
    model.engine.close()


async def read(stream: RequestStream) -> RequestOutput:
    last = None
    async with stream:
        async for output in stream:
            last = output
    assert last is not None
    return last


def pid(model: RoutedModel, number: int) -> int:
    return model.engine.replicas[number].about.process_id


class Spy:
    """Notes who was chosen."""

    def __init__(self) -> None:
        self.chosen: list[int] = []

    def choose(self, load: Load, workers: Sequence[Worker]) -> int:
        self.chosen.append(PrefixAware().choose(load, workers))
        return self.chosen[-1]


async def kill_and_recover(model: RoutedModel) -> None:
    """Kill the first of two workers in the middle of a stream."""
    engine, spy = model.engine, Spy()
    engine.balancer = spy
    victim, before = engine.replicas[0], pid(model, 0)
    lost = await engine.submit("lost", LONG)
    await anext(lost)
    os.kill(before, signal.SIGSTOP)  # or it might be done before it is killed
    kept = await engine.submit("kept", LONG)
    assert spy.chosen == [0, 1]
    os.kill(before, signal.SIGKILL)
    with pytest.raises(WorkerDied) as died:
        await read(lost)
    assert (died.value.status_code, died.value.code) == (503, "worker_died")
    assert not victim.is_ready
    assert engine.is_ready
    await read(await engine.submit("meanwhile", SAMPLED))
    assert (await read(kept)).finished
    while not victim.is_ready:
        await asyncio.sleep(0.05)
    assert (victim.restarts, pid(model, 0) != before) == (1, True)
    spy.chosen.clear()
    await read(await engine.submit("again", SAMPLED))
    assert spy.chosen == [0]


def test_answers_are_those_of_an_engine_in_this_process(directory: Path, model: RoutedModel) -> None:
    prompts = [f"prompt {number}" for number in range(6)]
    alone = LLM(directory, **OPTIONS)

    async def main() -> list[RequestOutput]:
        streams = [await model.engine.submit(prompt, SAMPLED) for prompt in prompts]
        assert all(load.outstanding > 0 for load in model.engine.loads), "a worker was idle beside a queue"
        return await asyncio.gather(*map(read, streams))

    for here, there in zip(alone.generate(prompts, SAMPLED), asyncio.run(main()), strict=True):
        for one, other in zip(here.outputs, there.outputs, strict=True):
            assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
            assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-3)
            assert other.logprobs is not None
            assert len(other.logprobs) == len(other.token_ids)
        assert here.prompt_token_ids == there.prompt_token_ids
    assert [load.outstanding for load in model.engine.loads] == [0.0, 0.0]
    np.testing.assert_allclose(alone.embed(["one", "two"]), model.embed(["one", "two"]), atol=1e-5)
    assert alone.score_many([("a", "b")]) == model.score_many([("a", "b")])


def test_a_refusal_is_the_engines_own_and_leaves_nothing_behind(model: RoutedModel) -> None:
    async def main() -> None:
        with pytest.raises(RequestError) as refused:
            await model.engine.submit("x" * 400, SAMPLED)
        assert (refused.value.field, refused.value.code) == ("prompt", "context_length_exceeded")
        stream = await model.engine.submit("x", LONG, "twice")
        with pytest.raises(RequestError, match="already running"):
            await model.engine.submit("x", LONG, "twice")
        stream.leave()
        with pytest.raises(RequestError):
            await model.engine.run(lambda: model.embed(["x" * 400]))

    asyncio.run(main())
    assert [load.outstanding for load in model.engine.loads] == [0.0, 0.0]


def test_leaving_frees_the_worker_at_once(model: RoutedModel) -> None:
    async def main() -> None:
        for _ in range(3):
            stream = await model.engine.submit("x", LONG)
            await anext(stream)
            stream.leave()
        streams = [await model.engine.submit("y", SamplingParams(max_tokens=1)) for _ in range(4)]
        await asyncio.gather(*map(read, streams))

    asyncio.run(main())
    assert [load.outstanding for load in model.engine.loads] == [0.0, 0.0]


def test_prompts_that_begin_alike_meet_their_cache(model: RoutedModel) -> None:
    shared, engine = list(range(10, 110)), model.engine
    engine.balancer = spy = Spy()

    async def cached(last: int, salt: str | None = None) -> int:
        standing = Standing(cache_salt=salt)
        stream = await engine.submit([*shared, last], SamplingParams(max_tokens=1), standing=standing)
        return (await read(stream)).num_cached_tokens

    async def main() -> None:
        assert await cached(1) == 0
        engine.loads[0].outstanding += 3.0  # less than the six blocks that it knows
        assert await cached(2) == 96
        assert await cached(3, "another tenant") == 0
        engine.loads[0].outstanding -= 3.0

    asyncio.run(main())
    assert spy.chosen == [0, 0, 1]


def test_a_killed_worker_fails_its_own_streams_and_comes_back(model: RoutedModel) -> None:
    asyncio.run(asyncio.wait_for(kill_and_recover(model), 120))
    assert [load.outstanding for load in model.engine.loads] == [0.0, 0.0]


def test_a_hung_worker_is_ended_and_comes_back(directory: Path) -> None:
    replica = EngineProcess(str(directory), OPTIONS, threads=1, patience=3.0)
    engine = RoutedEngine([replica])

    async def main() -> None:
        await read(await engine.submit("x", SAMPLED))
        os.kill(replica.about.process_id, signal.SIGSTOP)
        with pytest.raises(WorkerDied):
            await engine.submit("x", SAMPLED)
        assert not engine.is_ready
        await asyncio.to_thread(wait_for, lambda: engine.is_ready, 60)
        await read(await engine.submit("x", SAMPLED))

    try:
        asyncio.run(asyncio.wait_for(main(), 120))
    finally:
        engine.close()


def test_closing_lets_running_requests_finish_or_says_so(directory: Path) -> None:
    model = start_workers(str(directory), OPTIONS, workers=1, threads=1)

    async def main() -> None:
        short = await model.engine.submit("x", SAMPLED)
        closing = asyncio.create_task(asyncio.to_thread(model.engine.close, drain_seconds=60))
        assert (await read(short)).finished
        await closing
        with pytest.raises(EngineClosed):
            await model.engine.submit("x", SAMPLED)

    asyncio.run(main())
    model = start_workers(str(directory), OPTIONS, workers=1, threads=1)

    async def cut() -> None:
        stream = await model.engine.submit("x", LONG)
        await asyncio.to_thread(model.engine.close)
        with pytest.raises(EngineClosed):
            await read(stream)

    asyncio.run(cut())


def test_a_worker_that_cannot_begin_says_why(tmp_path: Path) -> None:
    with pytest.raises(GristmillError, match="nowhere"):
        start_workers(str(tmp_path / "nowhere"), {}, workers=1, threads=1)
    with pytest.raises(RequestError, match="at least 1"):
        start_workers(str(tmp_path), {}, workers=0)


def test_a_worker_that_cannot_be_started_says_why(directory: Path) -> None:
    with pytest.raises(GristmillError, match="pickle"):
        start_workers(str(directory), {"policy": lambda: None}, workers=1, threads=1)


def test_calls_that_hang_keep_nobody_from_closing() -> None:
    class Stuck:
        about, is_ready = SimpleNamespace(tokenizer=None, max_model_len=8, seats=1), True

        def __init__(self) -> None:
            self.ended = threading.Event()

        def call(self, name: str) -> None:
            self.ended.wait(20)
            raise WorkerDied

        def close(self) -> None:
            self.ended.set()

    engine = RoutedEngine([Stuck()])  # type: ignore[list-item]

    async def main() -> None:
        calls = [asyncio.ensure_future(engine.run(lambda: engine.call("embed"))) for _ in range(40)]
        await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await asyncio.to_thread(engine.close)
        assert {type(each) for each in await asyncio.gather(*calls, return_exceptions=True)} == {WorkerDied}

    asyncio.run(main())

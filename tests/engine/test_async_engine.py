"""AsyncEngine on a scripted engine: what callers see, and what the engine is left with."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.core import RequestOutput, SamplingParams
from gristmill.engine.async_engine import CROWD, AsyncEngine, EngineClosed, EngineFailure
from gristmill.errors import RequestError
from serve.running import wait_for
from serve.scripted_engine import ScriptedEngine

ALL = SamplingParams(max_tokens=None)


@pytest.fixture
def scripted() -> Iterator[ScriptedEngine]:
    engine = ScriptedEngine(lambda prompt: f"You said {prompt}.", max_model_len=2000)
    yield engine
    engine.gate.set()


@contextlib.contextmanager
def running(engine: ScriptedEngine) -> Iterator[AsyncEngine]:
    shared = AsyncEngine(engine)
    try:
        yield shared
    finally:
        engine.gate.set()
        shared.close()


async def last(shared: AsyncEngine, prompt: str, params: SamplingParams = ALL) -> RequestOutput:
    outputs = [output async for output in shared.generate(prompt, params)]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return outputs[-1]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


def test_many_callers_get_their_own_answers_and_one_thread_owns_the_engine(scripted: ScriptedEngine) -> None:
    async def main(shared: AsyncEngine) -> list[RequestOutput]:
        return await asyncio.gather(*(last(shared, f"number {i}") for i in range(40)))

    with running(scripted) as shared:
        results = asyncio.run(main(shared))
        again = asyncio.run(main(shared))  # another event loop on the same engine
    for outputs in (results, again):
        assert [o.outputs[0].text for o in outputs] == [f"You said number {i}." for i in range(40)]
    assert scripted.threads == {"engine"}
    assert not scripted.live
    assert not scripted.aborted


def test_a_slow_reader_gets_the_newest_output_and_stalls_nobody(scripted: ScriptedEngine) -> None:
    async def main(shared: AsyncEngine) -> list[RequestOutput]:
        slow = await shared.submit("slow", ALL)
        seen = [await anext(slow)]
        await last(shared, "another, and much longer than the slow one")
        seen += [output async for output in slow]
        return seen

    with running(scripted) as shared:
        seen = asyncio.run(main(shared))
    assert len(seen) == 2  # all between the first and the finished one was replaced while it waited
    assert seen[-1].finished
    assert seen[-1].outputs[0].text == "You said slow."


@pytest.mark.parametrize(("callers", "pause", "held"), [(CROWD, 1000.0, True), (CROWD, 0.0, False), (2, 1000.0, False)])
def test_in_a_crowd_outputs_come_in_larger_pieces(
    scripted: ScriptedEngine, callers: int, pause: float, held: bool
) -> None:
    async def texts(shared: AsyncEngine, number: int) -> list[str]:
        return [output.outputs[0].text async for output in shared.generate(f"number {number}", ALL)]

    async def main(shared: AsyncEngine) -> list[list[str]]:
        scripted.gate.clear()
        tasks = [asyncio.create_task(texts(shared, number)) for number in range(callers)]
        await until(lambda: len(scripted.added) + shared._commands.qsize() == callers)
        scripted.gate.set()  # from the second step on they are all in it
        return await asyncio.gather(*tasks)

    scripted.step_seconds = 0.01
    shared = AsyncEngine(scripted, pause=pause)
    seen = asyncio.run(main(shared))
    shared.close()
    for number, found in enumerate(seen):
        assert found[-1] == f"You said number {number}."
        assert len(found[0]) <= 3  # the first token is not held back
        assert (len(found) <= 3) == held


def test_leaving_the_iterator_early_frees_the_request(scripted: ScriptedEngine) -> None:
    async def main(shared: AsyncEngine) -> None:
        async with aclosing(shared.generate("x" * 900, ALL, "left")) as outputs:  # type: ignore[type-var]
            async for _ in outputs:
                break
        await until(lambda: scripted.aborted == ["left"])

    with running(scripted) as shared:
        asyncio.run(main(shared))
    assert not scripted.live


def test_who_reads_a_request_that_another_ends_is_told(scripted: ScriptedEngine) -> None:
    async def main(shared: AsyncEngine) -> None:
        scripted.gate.clear()
        stream = await shared.submit("x", ALL, "ended")
        shared.abort("ended")
        scripted.gate.set()
        with pytest.raises(EngineClosed, match="aborted"):
            async with asyncio.timeout(10):
                _ = [output async for output in stream]

    with running(scripted) as shared:
        asyncio.run(main(shared))
    assert scripted.aborted == ["ended"]


def test_of_two_closings_the_sooner_one_counts(scripted: ScriptedEngine) -> None:
    async def main(shared: AsyncEngine) -> None:
        scripted.gate.clear()
        steps, step = threading.Event(), scripted.step
        scripted.step = lambda: (steps.set(), step())[1]  # type: ignore[method-assign]
        stream = await shared.submit("x" * 900, ALL)
        await until(steps.is_set)
        closings = [asyncio.create_task(asyncio.to_thread(shared.close, drain_seconds=each)) for each in (0.0, 600.0)]
        await until(lambda: shared._commands.qsize() == 2)
        scripted.step_seconds = 0.002
        scripted.gate.set()
        with pytest.raises(EngineClosed):
            _ = [output async for output in stream]
        await asyncio.gather(*closings)

    with running(scripted) as shared:
        asyncio.run(main(shared))


def test_cancelling_a_task_frees_its_request_and_no_other(scripted: ScriptedEngine) -> None:
    async def main(shared: AsyncEngine) -> str:
        scripted.step_seconds = 0.002
        doomed = asyncio.create_task(last(shared, "doomed " * 100))
        other = asyncio.create_task(last(shared, "other"))
        await until(lambda: len(scripted.added) == 2)
        doomed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        text = (await other).outputs[0].text
        await until(lambda: len(scripted.aborted) == 1)
        return text

    with running(scripted) as shared:
        assert asyncio.run(main(shared)) == "You said other."
    assert not scripted.live


def test_cancelling_before_admission_leaves_nothing_behind(scripted: ScriptedEngine) -> None:
    async def main(shared: AsyncEngine) -> None:
        scripted.gate.clear()
        first = asyncio.create_task(last(shared, "first"))  # its step holds the thread
        await until(lambda: bool(scripted.live))
        late = asyncio.create_task(last(shared, "late"))
        await asyncio.sleep(0.02)
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)
        scripted.gate.set()
        await first

    with running(scripted) as shared:
        asyncio.run(main(shared))
    assert not scripted.live
    assert len(scripted.aborted) == 1


def test_a_refused_request_raises_where_it_was_made(scripted: ScriptedEngine) -> None:
    async def main(shared: AsyncEngine) -> None:
        with pytest.raises(RequestError) as caught:
            await last(shared, "x" * 3000)
        assert caught.value.code == "context_length_exceeded"
        assert (await last(shared, "short")).finished

    with running(scripted) as shared:
        asyncio.run(main(shared))


def test_an_id_in_use_is_refused_and_its_owner_is_not_disturbed(scripted: ScriptedEngine) -> None:
    async def main(shared: AsyncEngine) -> None:
        scripted.gate.clear()
        stream = await shared.submit("owner", ALL, "same")
        second = asyncio.create_task(shared.submit("second", ALL, "same"))
        await asyncio.sleep(0.01)
        scripted.gate.set()
        with pytest.raises(RequestError):
            await second
        outputs = [output async for output in stream]
        assert outputs[-1].outputs[0].text == "You said owner."

    with running(scripted) as shared:
        asyncio.run(main(shared))


def test_a_failing_step_ends_the_waiting_requests_and_the_thread_lives_on(scripted: ScriptedEngine) -> None:
    async def main(shared: AsyncEngine) -> None:
        scripted.gate.clear()
        tasks = [asyncio.create_task(last(shared, f"{i}")) for i in range(3)]
        await until(lambda: len(scripted.live) >= 1)
        scripted.fail_with = ValueError("broken kernel")
        scripted.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        failures = [result for result in results if isinstance(result, EngineFailure)]
        assert failures
        assert all(isinstance(failure.__cause__, ValueError) for failure in failures)
        assert len({id(failure) for failure in failures}) == len(failures)
        assert (await last(shared, "after")).outputs[0].text == "You said after."

    with running(scripted) as shared:
        asyncio.run(main(shared))
    assert not scripted.live


def test_a_request_that_the_engine_forgets_ends_with_an_error(scripted: ScriptedEngine) -> None:
    async def main(shared: AsyncEngine) -> None:
        scripted.gate.clear()
        task = asyncio.create_task(last(shared, "forgotten"))
        await until(lambda: bool(scripted.live))
        scripted.live.clear()
        scripted.gate.set()
        with pytest.raises(EngineFailure):
            await task

    with running(scripted) as shared:
        asyncio.run(main(shared))


def test_close_ends_running_requests_and_refuses_new_ones(scripted: ScriptedEngine) -> None:
    async def main(shared: AsyncEngine) -> None:
        scripted.step_seconds = 0.002
        task = asyncio.create_task(last(shared, "x" * 900))
        await until(lambda: bool(scripted.live))
        await asyncio.to_thread(shared.close)
        with pytest.raises(EngineClosed):
            await task
        with pytest.raises(EngineClosed):
            await shared.submit("late", ALL)
        assert not shared.is_running

    with running(scripted) as shared:
        asyncio.run(main(shared))
    assert not scripted.live


def test_close_can_let_running_requests_finish(scripted: ScriptedEngine) -> None:
    async def main(shared: AsyncEngine) -> None:
        scripted.step_seconds = 0.002
        task = asyncio.create_task(last(shared, "to the end"))
        await until(lambda: bool(scripted.live))
        closing = asyncio.create_task(asyncio.to_thread(shared.close, drain_seconds=10))
        assert (await task).outputs[0].text == "You said to the end."
        await closing

    with running(scripted) as shared:
        asyncio.run(main(shared))
    assert not scripted.aborted


def test_a_loop_that_ended_without_reading_does_not_hold_the_engine(scripted: ScriptedEngine) -> None:
    async def main(shared: AsyncEngine) -> None:
        await shared.submit("x" * 900, ALL, "orphan")  # and never read or closed

    with running(scripted) as shared:
        scripted.step_seconds = 0.001
        asyncio.run(main(shared))
        wait_for(lambda: scripted.aborted == ["orphan"])


def test_the_thread_sleeps_when_there_is_nothing_to_do(scripted: ScriptedEngine) -> None:
    steps = 0
    step = scripted.step

    def counted() -> list[RequestOutput]:
        nonlocal steps
        steps += 1
        return step()

    scripted.step = counted  # type: ignore[method-assign]
    with running(scripted) as shared:
        output = asyncio.run(last(shared, "once"))
        after = steps
        threading.Event().wait(0.05)
        assert steps == after == len(output.outputs[0].token_ids)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), min_size=1, max_size=8))
def test_any_mix_of_finishing_and_leaving_ends_with_nothing_held(plan: list[tuple[int, int]]) -> None:
    """Each request reads at most so many outputs, then leaves; those that read on are answered in full."""
    engine = ScriptedEngine(lambda prompt: "." * int(prompt), max_model_len=100)

    async def one(shared: AsyncEngine, length: int, reads: int) -> None:
        count = 0
        async with await shared.submit(str(length), ALL) as stream:
            text = ""
            async for output in stream:
                assert output.outputs[0].text.startswith(text)
                text = output.outputs[0].text
                count += 1
                if count == reads:
                    return
            assert text == "." * length

    async def main(shared: AsyncEngine) -> None:
        await asyncio.gather(*(one(shared, length, reads) for length, reads in plan))

    with running(engine) as shared:
        asyncio.run(main(shared))
    assert not engine.live

"""What runs in a worker's process: items in order, errors among them, and an engine that is left clean."""

from __future__ import annotations

import asyncio
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest

from gristmill.core import RequestOutput, SamplingParams
from gristmill.errors import RequestError
from gristmill.serve.routing.worker import Work, Worker, _serve
from serve.running import wait_for
from serve.tiny import save_tiny_model

LONG = SamplingParams(max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    directory: Path = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    return Worker(str(directory), {"fast_kernels": False}, 1)


def work(prompt: str, params: SamplingParams = LONG) -> Work:
    return Work(request_id=prompt, prompt=prompt, params=params)


def test_admission_then_outputs_then_the_end(worker: Worker) -> None:
    async def main() -> list[object]:
        return [item async for item in worker.answer(work("x", SamplingParams(max_tokens=5, ignore_eos=True)))]

    admitted, *outputs = asyncio.run(main())
    assert admitted is None
    assert all(isinstance(output, RequestOutput) for output in outputs)
    assert outputs[-1].finished  # type: ignore[attr-defined]
    assert sum(len(output.outputs[0].token_ids) for output in outputs) == 5  # type: ignore[attr-defined]


def test_a_refusal_is_the_only_item_and_travels(worker: Worker) -> None:
    async def main() -> list[object]:
        return [item async for item in worker.answer(work("x" * 400))]

    (refusal,) = asyncio.run(main())
    there = pickle.loads(pickle.dumps(refusal))
    assert isinstance(there, RequestError)
    assert (there.field, there.code, str(there)) == ("prompt", "context_length_exceeded", str(refusal))


def test_leaving_and_aborting_free_the_engine(worker: Worker) -> None:
    async def idle() -> None:
        while await worker._engine.run(worker._llm.engine.has_unfinished):
            await asyncio.sleep(0.01)

    async def main() -> None:
        answer = worker.answer(work("left"))
        assert await anext(answer) is None
        await answer.aclose()  # type: ignore[attr-defined]
        await idle()
        answer = worker.answer(work("aborted"))
        assert await anext(answer) is None
        await worker.abort("aborted")
        await idle()
        worker._llm.engine.check_integrity()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_calls_reach_the_model_and_what_they_raise_is_an_answer(worker: Worker) -> None:
    async def main() -> tuple[object, object]:
        return await worker.call("embed", (["a", "b"],)), await worker.call("embed", (["x" * 400],))

    vectors, error = asyncio.run(main())
    assert vectors.shape == (2, 32)  # type: ignore[attr-defined]
    assert isinstance(error, RequestError)
    worker.check_health()


def test_a_request_that_is_ended_before_it_begins_or_after_leaves_nothing(worker: Worker) -> None:
    async def main() -> None:
        loop, read, done = asyncio.get_running_loop(), threading.Event(), threading.Event()
        inbox: list[Any] = [work("early"), "early", work("late"), work("last", SamplingParams(max_tokens=1)), "late"]
        sent: list[Any] = []

        class Connection:
            def send(self, message: Any) -> None:
                sent.append(message)

            def recv(self) -> Any:
                if len(inbox) == 5:
                    loop.call_soon_threadsafe(read.wait, 20)  # the loop takes "early" and its end at one go
                elif len(inbox) == 3:
                    read.set()
                elif len(inbox) == 1:
                    wait_for(lambda: any(item[0] == "late" for item in sent[1:]))
                elif not inbox:
                    assert done.wait(20)
                    raise EOFError
                return inbox.pop(0)

        serving = asyncio.create_task(_serve(Connection(), worker))  # type: ignore[arg-type]
        async with asyncio.timeout(20):
            while not any(getattr(item, "finished", False) for _, item in sent[1:]):
                await asyncio.sleep(0.005)
            while len(asyncio.all_tasks()) > 2:  # this one and the one that serves
                await asyncio.sleep(0.005)
        assert not worker._llm.engine.has_unfinished()
        done.set()
        await serving
        assert {name for name, _ in sent[1:]} == {"late", "last"}
        assert not any(getattr(item, "finished", False) for name, item in sent[1:] if name == "late")

    asyncio.run(main())

"""What runs in a worker's process: items in order, errors among them, and an engine that is left clean."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path

import pytest

from gristmill.core import RequestOutput, SamplingParams
from gristmill.errors import RequestError
from gristmill.serve.routing.worker import Work, Worker
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

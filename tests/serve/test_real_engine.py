"""The server on the real engine: it says what the engine says, and leaves it clean."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gristmill import LLM, SamplingParams
from gristmill.serve.app import create_app
from serve.running import running, wait_for
from serve.tiny import save_tiny_model

PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def expected(llm: LLM) -> dict[str, list[str]]:
    """What the engine answers in process, before the server owns it."""
    params = SamplingParams(temperature=1, seed=7, n=2, max_tokens=24, stop_token_ids=llm.renderer.stop_token_ids)
    answers = {}
    for text in ("one", "two", "three", "four"):
        (output,) = llm.chat([{"role": "user", "content": text}], params)
        answers[text] = [choice.text for choice in output.outputs]
    return answers


@pytest.fixture(scope="module")
def url(llm: LLM, expected: dict[str, list[str]]) -> Iterator[str]:
    with running(create_app(llm)) as url:
        yield url


def request(llm: LLM, text: str, **fields: object) -> dict[str, object]:
    return {"model": llm.model_name, "messages": [{"role": "user", "content": text}], "max_tokens": 24, **fields}


def test_answers_are_the_engines_own_streamed_or_not_alone_or_together(
    llm: LLM, url: str, expected: dict[str, list[str]]
) -> None:
    openai = pytest.importorskip("openai")

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=60) as client:

            async def whole(text: str) -> list[str]:
                answer = await client.chat.completions.create(**request(llm, text, seed=7, n=2))
                return [choice.message.content for choice in answer.choices]

            async def streamed(text: str) -> list[str]:
                texts = ["", ""]
                async for chunk in await client.chat.completions.create(**request(llm, text, seed=7, n=2, stream=True)):
                    texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
                return texts

            assert await whole("one") == expected["one"]
            calls = [call(text) for text in expected for call in (whole, streamed)]
            assert await asyncio.gather(*calls) == [expected[text] for text in expected for _ in range(2)]

    asyncio.run(main())


def test_temperature_zero_is_greedy(llm: LLM, url: str) -> None:
    bodies = [request(llm, "x", temperature=0, seed=seed) for seed in (1, 2, 3)]
    answers = [httpx.post(f"{url}{PATH}", json=body, timeout=60).json()["choices"] for body in bodies]
    assert answers[0] == answers[1] == answers[2]


def test_the_context_is_a_limit_that_is_told(llm: LLM, url: str) -> None:
    for fields, param in [
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages"),
        ({"max_tokens": 250}, "max_tokens"),
        ({"max_tokens": None, "max_completion_tokens": 250}, "max_completion_tokens"),
    ]:
        answer = httpx.post(f"{url}{PATH}", json=request(llm, "x") | fields, timeout=60)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
        assert answer.json()["error"]["code"] == "context_length_exceeded"
    filled = httpx.post(f"{url}{PATH}", json=request(llm, "x", max_tokens=None, ignore_eos=True), timeout=60).json()
    assert filled["usage"]["total_tokens"] == llm.max_model_len
    assert filled["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("field", ["stop_token_ids", "logit_bias"])
def test_tokens_outside_the_vocabulary_are_refused(llm: LLM, url: str, field: str) -> None:
    value = [999] if field == "stop_token_ids" else {"999": 1}
    answer = httpx.post(f"{url}{PATH}", json=request(llm, "x", **{field: value}), timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


def test_random_leavers_and_bad_requests_leave_no_block_behind(llm: LLM, url: str) -> None:
    """Sixty clients: some read all, some leave at a random moment, some are refused."""
    choose = random.Random(0)
    free = llm.engine.pool.num_free

    async def one(client: httpx.AsyncClient, number: int) -> None:
        if number % 5 == 0:
            assert (await client.post(PATH, json=request(llm, "x", web_search_options={}))).status_code == 400
            return
        body = request(llm, f"client {number}", stream=True, max_tokens=100, ignore_eos=True, n=choose.randint(1, 3))
        lines = choose.randint(1, 60) if number % 2 else None
        async with client.stream("POST", PATH, json=body) as response:
            assert response.status_code == 200
            last = ""
            async for line in response.aiter_lines():
                last = line or last
                lines = None if lines is None else lines - 1
                if lines == 0:
                    return
            assert last == "data: [DONE]"

    async def main() -> None:
        limits = httpx.Limits(max_connections=60)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            await asyncio.gather(*(one(client, number) for number in range(60)))

    asyncio.run(main())
    wait_for(lambda: not llm.engine.has_unfinished())
    assert llm.engine.pool.num_free == free
    llm.engine.check_integrity()


@pytest.mark.asset
@pytest.mark.peer
def test_the_openai_client_chats_with_smollm2() -> None:
    import openai

    llm = LLM("smollm2-135m", dtype="float32")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    params = SamplingParams(temperature=0, max_tokens=24)
    direct = llm.chat(messages, params)[0].outputs[0]  # type: ignore[arg-type]
    assert "Paris" in direct.text
    with running(create_app(llm)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        arguments = {"model": "smollm2-135m", "messages": messages, "temperature": 0, "max_tokens": 24}
        whole = client.chat.completions.create(**arguments)
        streamed = client.chat.completions.create(**arguments, stream=True)
        assert whole.choices[0].message.content == direct.text
        assert whole.choices[0].finish_reason == direct.finish_reason
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == direct.text
        assert whole.usage.completion_tokens == len(direct.token_ids)


def test_the_model_directory_is_its_name(llm: LLM, url: str) -> None:
    assert Path(llm.model_name).is_dir()
    assert httpx.get(f"{url}/v1/models/{llm.model_name}").json()["id"] == llm.model_name

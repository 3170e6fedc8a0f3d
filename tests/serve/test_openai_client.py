"""The official client against a running server: what it sends is understood, what it gets it can read."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

openai = pytest.importorskip("openai")

from serve.conftest import Served
from serve.running import wait_for

pytestmark = pytest.mark.peer

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["scripted", "second"]
    assert client.models.retrieve("second").object == "model"


def test_a_whole_answer(client: openai.OpenAI, served: Served) -> None:
    answer = client.chat.completions.create(model="scripted", messages=HI)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == "scripted"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "Hello there."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(served.engine.tokenizer.encode(served.engine.prompts[answer.id]))
    assert answer.usage.completion_tokens == len("Hello there.") + 1  # and the end of the turn
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id.startswith("req_")


def test_the_conversation_is_rendered_by_the_chat_template(client: openai.OpenAI, served: Served) -> None:
    parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    first = client.chat.completions.create(model="scripted", messages=messages)
    # The answer goes back as the client holds it, with whatever null fields came along.
    answer = client.chat.completions.create(
        model="scripted", messages=[*messages, first.choices[0].message, {"role": "user", "content": "More?"}]
    )
    assert served.engine.prompts[answer.id] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\ntwo parts<|im_end|>\n"
        "<|im_start|>assistant\nHello there.<|im_end|>\n<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("text", ["Hello there.", "Grüße 🌾, 你好!", ""])
def test_a_stream_adds_up_to_the_whole_answer(client: openai.OpenAI, served: Served, text: str) -> None:
    served.engine.script = lambda prompt: text
    with client.chat.completions.create(model="scripted", messages=HI, stream=True) as stream:
        chunks = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == len({chunk.created for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert all("\ufffd" not in (chunk.choices[0].delta.content or "") for chunk in chunks)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_last_in_a_stream_that_asks_for_it(client: openai.OpenAI) -> None:
    arguments = {"model": "scripted", "messages": HI, "max_tokens": 5}
    whole = client.chat.completions.create(**arguments)
    chunks = list(client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks[:-1])
    assert chunks[-2].choices[0].finish_reason == "length"


def test_several_choices(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="scripted", messages=HI, n=3)
    expected = ["Hello there.", "Hello there. (1)", "Hello there. (2)"]
    assert [choice.message.content for choice in whole.choices] == expected
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    texts, reasons = [""] * 3, []
    for chunk in client.chat.completions.create(model="scripted", messages=HI, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        reasons += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
    assert texts == expected
    assert reasons == ["stop"] * 3


@pytest.mark.parametrize("stop", [" there", ["nowhere", "the"]])
def test_stop_strings(client: openai.OpenAI, stop: str | list[str]) -> None:
    whole = client.chat.completions.create(model="scripted", messages=HI, stop=stop)
    streamed = client.chat.completions.create(model="scripted", messages=HI, stop=stop, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert whole.choices[0].message.content.strip() == text.strip() == "Hello"
    assert whole.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_length(client: openai.OpenAI, name: str) -> None:
    answer = client.chat.completions.create(model="scripted", messages=HI, **{name: 4})
    assert answer.choices[0].message.content == "Hell"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 4


def test_logprobs(client: openai.OpenAI, served: Served) -> None:
    served.engine.script = lambda prompt: "aé"
    arguments = {"model": "scripted", "messages": HI, "logprobs": True, "top_logprobs": 3}
    places = client.chat.completions.create(**arguments).choices[0].logprobs.content
    assert bytes(b for place in places[:-1] for b in place.bytes) == "aé".encode()
    assert places[0].token == "a"
    for place in places:
        assert [top.logprob for top in place.top_logprobs] == [-1.0, -2.0, -3.0]
        assert place.logprob == -2.0
        assert place.top_logprobs[1].bytes == place.bytes
    streamed = [
        place
        for chunk in client.chat.completions.create(**arguments, stream=True)
        for place in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert streamed == places
    only = client.chat.completions.create(model="scripted", messages=HI, logprobs=True).choices[0].logprobs.content
    assert all(place.top_logprobs == [] and place.logprob == -2.0 for place in only)


def test_errors_are_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="scripted", messages=HI, web_search_options={})
    assert caught.value.param == "web_search_options"
    assert caught.value.code == "unsupported_parameter"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="Did you mean temperature") as caught:
        client.chat.completions.create(model="scripted", messages=HI, extra_body={"temprature": 1})
    assert caught.value.param == "temprature"
    with pytest.raises(openai.NotFoundError, match="Did you mean scripted") as missing:
        client.chat.completions.create(model="scriptd", messages=HI)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": "x" * 600}])
    assert long.value.code == "context_length_exceeded"
    assert long.value.param == "messages"


def test_every_field_of_the_client_is_applied_or_refused_by_name(client: openai.OpenAI, served: Served) -> None:
    """Fields that a newer client may bring are refused too: unknown names are."""
    from openai.types.chat import completion_create_params

    known = completion_create_params.CompletionCreateParamsBase.__annotations__
    schema = served.http.get("/openapi.json").json()["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    for name in set(known) - set(schema):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="scripted", messages=HI, extra_body={name: {"a": 1}})
        assert caught.value.param == name
        if name in ("tools", "functions", "reasoning_effort"):
            assert "not supported" in caught.value.message


def test_an_error_on_the_way_ends_the_stream_with_an_exception(client: openai.OpenAI, served: Served) -> None:
    served.engine.gate.clear()
    with client.chat.completions.create(model="scripted", messages=HI, stream=True) as stream:
        assert next(iter(stream)).choices[0].delta.role == "assistant"
        served.engine.fail_with = ValueError("the kernel's secret")
        served.engine.gate.set()
        with pytest.raises(openai.APIError) as caught:
            list(stream)
    assert "secret" not in str(caught.value)
    assert client.chat.completions.create(model="scripted", messages=HI).choices[0].finish_reason == "stop"


def test_a_failing_step_is_a_500_without_its_reason(client: openai.OpenAI, served: Served) -> None:
    served.engine.fail_with = ValueError("the kernel's secret")
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="scripted", messages=HI)
    assert "secret" not in str(caught.value)
    assert caught.value.body["type"] == "server_error"


def test_closing_a_stream_early_frees_the_request(client: openai.OpenAI, served: Served) -> None:
    served.engine.script = lambda prompt: "on and on " * 30
    served.engine.step_seconds = 0.005
    with client.chat.completions.create(model="scripted", messages=HI, stream=True) as stream:
        request_id = next(iter(stream)).id
    wait_for(lambda: served.engine.aborted == [request_id])
    assert not served.engine.live


def test_the_async_client_streams_many_at_once(served: Served) -> None:
    served.engine.script = lambda prompt: prompt.split("user\n")[1].split("<|im_end|>")[0].upper()

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=20) as client:

            async def one(text: str) -> str:
                messages = [{"role": "user", "content": text}]
                if text.endswith("0"):
                    whole = await client.chat.completions.create(model="second", messages=messages)
                    return whole.choices[0].message.content
                stream = await client.chat.completions.create(model="second", messages=messages, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one(f"request {i}") for i in range(20)))

    assert asyncio.run(main()) == [f"REQUEST {i}" for i in range(20)]

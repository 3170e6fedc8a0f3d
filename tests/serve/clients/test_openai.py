"""The official client's helpers: what it parses, loops over, uploads and sends back is understood."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator

import pytest

openai = pytest.importorskip("openai")

from pydantic import BaseModel, Field

from gristmill import LLM
from gristmill.serve.app import create_app
from serve.clients.conftest import AFTER_CALL, CITY, HELLO, Place
from serve.running import running

pytestmark = pytest.mark.peer

HI = [{"role": "user", "content": "Hi"}]
JSON = [{"role": "user", "content": "JSON, please"}]
SUM = [{"role": "user", "content": "What is 2 + 3?"}]


class City(BaseModel):
    """A city."""

    city: str
    millions: int


class add(BaseModel):  # its name is the tool's
    """Add two numbers."""

    a: int
    b: int


@pytest.fixture(scope="module")
def client(place: Place) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{place.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the client's own, of what it parsed
def test_structured_outputs(client: openai.OpenAI) -> None:
    whole = client.chat.completions.parse(model="scripted", messages=JSON, response_format=City)
    with client.chat.completions.stream(model="scripted", messages=JSON, response_format=City) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        streamed = stream.get_final_completion()
    for answer in (whole, streamed):
        assert answer.choices[0].message.parsed == City(**CITY)
        again = [*JSON, answer.choices[0].message, *HI]  # with what the client made of it
        assert client.chat.completions.create(model="scripted", messages=again).choices[0].message.content == HELLO
    assert json.loads("".join(deltas)) == CITY


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_loop(client: openai.OpenAI, streamed: bool) -> None:
    tools, messages = [openai.pydantic_function_tool(add)], list(SUM)
    if streamed:
        with client.chat.completions.stream(model="scripted", messages=messages, tools=tools) as stream:
            called = stream.until_done().get_final_completion().choices[0]
    else:
        called = client.chat.completions.parse(model="scripted", messages=messages, tools=tools).choices[0]
    assert called.finish_reason == "tool_calls"
    (call,) = called.message.tool_calls
    assert call.function.parsed_arguments == add(a=2, b=3)
    messages += [called.message, {"role": "tool", "tool_call_id": call.id, "content": "5"}]
    answer = client.chat.completions.create(model="scripted", messages=messages, tools=tools).choices[0]
    assert (answer.finish_reason, answer.message.content) == ("stop", AFTER_CALL)


def test_many_at_once_through_the_asynchronous_client(place: Place) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{place.url}/v1", api_key="none", timeout=60) as client:

            async def streamed() -> str:
                chunks = await client.chat.completions.create(model="scripted", messages=HI, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            return await asyncio.gather(*(streamed() for _ in range(20)))

    assert asyncio.run(main()) == [HELLO] * 20


def test_completions_score_what_they_echo(client: openai.OpenAI, place: Place) -> None:
    arguments = {"model": place.llm.model_name, "prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 0}
    (choice,) = client.completions.create(**arguments).choices
    assert choice.text == "abc"
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.text_offset == [0, 1, 2]
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])


def test_embeddings_are_the_same_in_both_encodings(client: openai.OpenAI, place: Place) -> None:
    coded = client.embeddings.create(model=place.llm.model_name, input=["a", "bc"]).data
    plain = client.embeddings.create(model=place.llm.model_name, input=["a", "bc"], encoding_format="float").data
    for one, other in zip(coded, plain, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
        assert sum(value * value for value in one.embedding) == pytest.approx(1, abs=1e-5)


def test_responses(client: openai.OpenAI) -> None:
    first = client.responses.create(model="scripted", input="Hi")
    assert (first.status, first.output_text) == ("completed", HELLO)
    turn = {"role": "user", "content": "JSON, please"}
    assert client.responses.parse(model="scripted", input=[turn], text_format=City).output_parsed == City(**CITY)
    again = client.responses.create(model="scripted", input=[{"role": "user", "content": "Hi"}, *first.output, *HI])
    assert again.output_text == HELLO
    with client.responses.stream(model="scripted", input="Hi") as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == stream.get_final_response().output_text == HELLO


def test_a_batch_of_a_file(client: openai.OpenAI) -> None:
    body = {"model": "scripted", "messages": HI}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    wrong = {**line, "custom_id": "b", "body": {**body, "temperature": 9}}
    content = "\n".join(json.dumps(each) for each in (line, wrong)).encode()
    file = client.files.create(file=("lines.jsonl", content), purpose="batch")
    assert client.files.content(file.id).read() == content
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"for": "a test"}
    )
    deadline = time.monotonic() + 30
    while (batch := client.batches.retrieve(batch.id)).status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 1, 1)
    (answer,) = map(json.loads, client.files.content(batch.output_file_id).text.splitlines())
    assert answer["custom_id"] == "a"
    assert answer["response"]["body"]["choices"][0]["message"]["content"] == HELLO
    (failure,) = map(json.loads, client.files.content(batch.error_file_id).text.splitlines())
    assert (failure["custom_id"], failure["response"]["status_code"]) == ("b", 400)
    assert {found.id for found in client.batches.list()} >= {batch.id}
    assert client.files.delete(file.id).deleted


@pytest.mark.asset
def test_smollm2_answers_in_the_form_that_is_asked_for() -> None:
    class Answer(BaseModel):
        capital: str = Field(max_length=20)
        sure: bool

    llm = LLM("smollm2-135m")
    question = [{"role": "user", "content": "What is the capital of France? Answer as JSON."}]
    with running(create_app(llm)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120) as client:
        fields = {"model": "smollm2-135m", "messages": question, "temperature": 0, "max_tokens": 100}
        parsed = client.chat.completions.parse(**fields, response_format=Answer).choices[0].message.parsed
        assert parsed is not None
        tool = openai.pydantic_function_tool(Answer)
        for choice in ("required", {"type": "function", "function": {"name": "Answer"}}):
            called = client.chat.completions.parse(**fields, tools=[tool], tool_choice=choice).choices[0]
            assert isinstance(called.message.tool_calls[0].function.parsed_arguments, Answer)

"""The official client against /v1/responses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from serve.keeping import keeping
from serve.running import running
from serve.scripted_engine import ScriptedEngine

openai = pytest.importorskip("openai")
types = pytest.importorskip("openai.types.responses")

pytestmark = pytest.mark.peer


class City(BaseModel):
    """What the model is asked for."""

    name: str
    people: int


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    """What the model says."""
    return ScriptedEngine(max_model_len=8192)


@pytest.fixture(scope="module")
def client(engine: ScriptedEngine) -> Iterator[Any]:
    """The client of a running server."""
    with (
        running(keeping(engine)) as url,
        openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20, _strict_response_validation=True
        ) as client,
    ):
        yield client


@pytest.fixture(autouse=True)
def _script(engine: ScriptedEngine) -> Iterator[None]:
    script = engine.script
    yield
    engine.script = script


def test_a_whole_response(client: Any) -> None:
    response = client.responses.create(model="scripted", input="Hi", instructions="Be kind.", metadata={"a": "b"})
    assert response.output_text == "Hello there."
    assert response.status == "completed"
    assert response.error is None
    assert response.usage.output_tokens == len("Hello there.") + 1
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert client.responses.retrieve(response.id) == response
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_what_it_said_goes_back_as_the_client_holds_it(client: Any, engine: ScriptedEngine) -> None:
    conversation: list[Any] = [{"role": "user", "content": "Hi"}]
    response = client.responses.create(
        model="scripted", input=conversation, include=["message.output_text.logprobs"], store=False
    )
    conversation += response.output
    client.responses.create(model="scripted", input=[*conversation, {"role": "user", "content": "More?"}])
    assert list(engine.prompts.values())[-1] == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello there.<|im_end|>\n"
        "<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_stream_of_typed_events(client: Any) -> None:
    events = list(client.responses.create(model="scripted", input="Hi", stream=True))
    assert [event.type.removeprefix("response.") for event in events if "delta" not in event.type] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    for event in events:  # to the letter of the client's own types
        type(event).model_validate_json(event.model_dump_json(exclude_unset=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "Hello there."
    assert events[-1].response.output_text == "Hello there."


def test_the_client_gathers_a_stream(client: Any) -> None:
    with client.responses.stream(model="scripted", input="Hi") as stream:
        deltas = [event for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert deltas[-1].snapshot == final.output_text == "Hello there."


def test_parsed_answers(client: Any, engine: ScriptedEngine) -> None:
    engine.script = lambda prompt: '{"name": "Ulm", "people": 126000}'
    response = client.responses.parse(model="scripted", input="A city?", text_format=City)
    assert response.output_parsed == City(name="Ulm", people=126_000)
    params = list(engine.added.values())[-1]
    assert params.structured is not None
    assert params.structured.json_schema is not None
    assert set(params.structured.json_schema["properties"]) == {"name", "people"}
    with client.responses.stream(model="scripted", input="A city?", text_format=City) as stream:
        assert stream.get_final_response().output_parsed == City(name="Ulm", people=126_000)


def test_errors_are_the_clients_own(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model="scripted", input="Hi", reasoning={"summary": "auto"})
    assert error.value.param == "reasoning.summary"


LOOK = {
    "type": "function",
    "name": "look",
    "description": "Looks a city up.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}
CALLS = """Let me see.
<tool_call>
{"name": "look", "arguments": {"city": "Ulm"}}
</tool_call>
<tool_call>
{"name": "look", "arguments": {"city": "Bonn"}}
</tool_call>"""


def test_tools_there_and_back(client: Any, engine: ScriptedEngine) -> None:
    engine.script = lambda prompt: "Both are there." if "126000" in prompt else CALLS
    conversation: list[Any] = [{"role": "user", "content": "How large?"}]
    first = client.responses.create(model="scripted", input=conversation, tools=[LOOK])
    assert [item.type for item in first.output] == ["message", "function_call", "function_call"]
    calls = first.output[1:]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [
        ("look", {"city": "Ulm"}),
        ("look", {"city": "Bonn"}),
    ]
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "126000"} for call in calls]
    by_id = client.responses.create(model="scripted", input=results, previous_response_id=first.id, tools=[LOOK])
    prompt = list(engine.prompts.values())[-1]
    whole = client.responses.create(model="scripted", input=[*conversation, *first.output, *results], tools=[LOOK])
    assert list(engine.prompts.values())[-1] == prompt
    assert prompt.index("Ulm", prompt.index("How large?")) < prompt.index("Bonn") < prompt.index("126000")
    assert by_id.output_text == whole.output_text == "Both are there."


def test_streamed_calls(client: Any, engine: ScriptedEngine) -> None:
    engine.script = lambda prompt: CALLS
    with client.responses.stream(model="scripted", input="How large?", tools=[LOOK]) as stream:
        deltas = [event for event in stream if event.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    for place, city in ((1, "Ulm"), (2, "Bonn")):
        pieces = [event.delta for event in deltas if event.output_index == place]
        assert len(pieces) > 1
        assert json.loads("".join(pieces)) == json.loads(final.output[place].arguments) == {"city": city}


def test_reasoning_is_an_item_of_its_own(client: Any, engine: ScriptedEngine) -> None:
    engine.script = lambda prompt: "<think>\nHm.\n</think>\n\nYes."
    response = client.responses.create(model="thinker", input="Is it?")
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].content[0].text.strip() == "Hm."
    assert response.output_text == "Yes."
    assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens
    events = list(client.responses.create(model="thinker", input="Is it?", stream=True))
    thought = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert thought == response.output[0].content[0].text == events[-1].response.output[0].content[0].text
    client.responses.create(model="thinker", input="Sure?", previous_response_id=response.id)
    assert "<think>\nHm.\n</think>\n\nYes.<|im_end|>" in list(engine.prompts.values())[-1]
    client.responses.create(model="thinker", input="Is it?", reasoning={"effort": "minimal"})
    assert list(engine.added.values())[-1].thinking_budget == 128
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model="scripted", input="Is it?", reasoning={"effort": "low"})
    assert error.value.param == "reasoning.effort"

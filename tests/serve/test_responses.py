"""/v1/responses: what items become, what events add up to, and what the official client makes of both."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.serve.answering.responses import Assembly, items_of, messages_of, new_response
from gristmill.serve.api.responses import Memory
from gristmill.serve.errors import ApiError
from gristmill.serve.wire.answers import Usage
from gristmill.serve.wire.responses import OutputItem, Response, ResponseEvent, ResponseRequest
from gristmill.tokens.answer.reader import CallArguments, CallBegan, Content, Event, Reasoning
from serve.keeping import keeping
from serve.running import running, wait_for
from serve.scripted_engine import ScriptedEngine

USAGE = Usage(prompt_tokens=3, completion_tokens=2, total_tokens=5)


def asked(**fields: Any) -> ResponseRequest:
    """A valid request with these fields."""
    return ResponseRequest.model_validate({"model": "scripted", "input": "Hi", **fields})


def told(pieces: Sequence[Sequence[Event]], reason: Any = "stop") -> tuple[Response, list[ResponseEvent]]:
    """A response and the events that it came in."""
    assembly = Assembly(new_response(asked(), "scripted"))
    events = [each.model_copy(deep=True) for each in assembly.begin()]
    for piece in pieces:
        events += [each.model_copy(deep=True) for each in assembly.take(piece)]
    events += [each.model_copy(deep=True) for each in assembly.finish(reason, USAGE)]
    return assembly.response, events


def added_up(events: Sequence[ResponseEvent]) -> list[OutputItem]:
    """The items that a client has who trusts the events of additions and differences alone."""
    items: list[OutputItem] = []
    for each in events:
        if each.type == "response.output_item.added":
            assert each.item is not None
            assert each.output_index == len(items)
            assert each.item.status == "in_progress"
            items.append(each.item.model_copy(deep=True))
            continue
        if each.output_index is None:
            continue
        item = items[each.output_index]
        assert each.output_index == len(items) - 1, "items grow one after the other"
        assert each.item_id in (item.id, None)
        if each.type == "response.content_part.added":
            assert item.content is not None
            assert each.part is not None
            assert each.content_index == len(item.content) == 0
            item.content.append(each.part.model_copy())
        elif each.type == "response.function_call_arguments.delta":
            item.arguments = (item.arguments or "") + (each.delta or "")
        elif each.type in ("response.output_text.delta", "response.reasoning_text.delta"):
            assert item.content is not None
            item.content[0].text += each.delta or ""
        elif each.type == "response.output_item.done":
            assert each.item is not None
            item.status = each.item.status
            assert item == each.item
        elif each.type == "response.function_call_arguments.done":
            assert each.arguments == item.arguments
        else:
            assert item.content is not None
            assert (each.part.text if each.part else each.text) == item.content[0].text
    return items


pieces_of_text = st.text("ab \n", min_size=1, max_size=4)


@st.composite
def answers(draw: st.DrawFn) -> list[list[Event]]:
    """Events in an order in which a reader tells them, cut anywhere."""
    events: list[Event] = [Reasoning(text) for text in draw(st.lists(pieces_of_text, max_size=3))]
    calls = 0
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            events.append(CallBegan(calls, f"call_{calls}", "look"))
            events += [CallArguments(calls, text) for text in draw(st.lists(pieces_of_text, max_size=3))]
            calls += 1
        else:
            events += [Content(text) for text in draw(st.lists(pieces_of_text, min_size=1, max_size=3))]
    cuts = sorted(draw(st.lists(st.integers(0, len(events)), max_size=4)))
    return [events[a:b] for a, b in zip([0, *cuts], [*cuts, len(events)], strict=True)]


@given(answers(), st.sampled_from(["stop", "length"]))
def test_the_events_add_up_to_the_response(pieces: list[list[Event]], reason: str) -> None:
    response, events = told(pieces, reason)
    assert [each.sequence_number for each in events] == list(range(len(events)))
    assert [each.type for each in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == f"response.{response.status}"
    assert events[-1].response == response
    assert added_up(events) == response.output
    flat = [each for piece in pieces for each in piece]
    for kind, event_type in (("reasoning", Reasoning), ("function_call", CallArguments)):
        here = "".join(
            item.arguments or "" if kind == "function_call" else item.content[0].text  # type: ignore[index]
            for item in response.output
            if item.type == kind
        )
        assert here == "".join(each.text for each in flat if isinstance(each, event_type))
    said = "".join(item.content[0].text for item in response.output if item.type == "message" and item.content)
    written = "".join(each.text for each in flat if isinstance(each, Content))
    assert "".join(said.split()) == "".join(written.split())
    if all(isinstance(each, Content) for each in flat):
        assert said == written
    assert [item.call_id for item in response.output if item.type == "function_call"] == [
        each.id for each in flat if isinstance(each, CallBegan)
    ]
    assert not any(
        item.type == "message" and item.content and not item.content[0].text.strip() for item in response.output[1:]
    )


def test_white_space_between_items_is_no_message() -> None:
    calls: list[Event] = [Reasoning("Hm."), Content("\n\n"), CallBegan(0, "c0", "f"), CallArguments(0, "{}")]
    response, _ = told([calls, [Content("\n"), CallBegan(1, "c1", "f"), Content("\n")], [Content(" Done. ")]])
    assert [item.type for item in response.output] == ["reasoning", "function_call", "function_call", "message"]
    assert response.output[-1].content is not None
    assert response.output[-1].content[0].text == "Done. "
    alone, _ = told([[Content(" \n")], [Content(" ")]])
    assert alone.output[0].content is not None
    assert alone.output[0].content[0].text == " \n "


@pytest.mark.parametrize(
    ("reason", "status", "why", "last"),
    [
        ("stop", "completed", None, "completed"),
        ("tool_calls", "completed", None, "completed"),
        ("length", "incomplete", "max_output_tokens", "incomplete"),
        ("content_filter", "incomplete", "content_filter", "incomplete"),
    ],
)
def test_how_a_response_ends(reason: str, status: str, why: str | None, last: str) -> None:
    response, _ = told([[Reasoning("Hm."), Content("He")]], reason)
    assert response.status == status
    assert (response.incomplete_details.reason if response.incomplete_details else None) == why
    assert [item.status for item in response.output] == ["completed", last]


def test_items_become_messages() -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    items = [
        {
            "role": "developer",
            "content": [{"type": "input_text", "text": "Be "}, {"type": "input_text", "text": "kind."}],
        },
        {"role": "user", "content": "Hi"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "One", "annotations": []}],
        },
        call,
        {**call, "call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
        {"role": "assistant", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "system", "content": "Later."},
        {"type": "reasoning", "summary": []},
    ]
    function = {"name": "f", "arguments": "{}"}
    calls = [{"id": name, "type": "function", "function": function} for name in ("c1", "c2")]
    assert messages_of(items_of(asked(input=items)), "Rules.") == [
        {"role": "system", "content": "Rules.\n\nBe kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "reasoning_content": "Hm.", "content": "One", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "assistant", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "system", "content": "Later."},
        {"role": "assistant", "reasoning_content": "", "content": ""},
    ]


def test_memory_holds_the_latest_and_each_owner_sees_theirs() -> None:
    memory = Memory(max_bytes=10_000)
    responses = [new_response(asked(), "scripted") for _ in range(20)]
    for response in responses:
        memory.keep("ann", response, items_of(asked(input="x" * 500)))
        assert 0 < memory.bytes <= 10_000
    assert Response.model_validate_json(memory.find("ann", responses[-1].id).response) == responses[-1]
    for owner, name in (("ann", responses[0].id), ("bob", responses[-1].id)):
        with pytest.raises(ApiError) as error:
            memory.find(owner, name)
        assert error.value.status_code == 404
    for response in responses[::-1]:
        try:
            memory.delete("ann", response.id)
        except ApiError:
            break
    assert memory.bytes == 0
    memory.keep("ann", responses[0], items_of(asked(input="x" * 10_000)))  # the conversation counts too
    with pytest.raises(ApiError):
        memory.find("ann", responses[0].id)


def test_memory_takes_what_it_counts_and_gives_back_what_it_took() -> None:
    said = {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}
    call = {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"}
    found = {"type": "function_call_output", "call_id": "c", "output": "5"}
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}], "summary": []}
    memory = Memory()
    tracemalloc.start()
    try:
        for _ in range(200):
            answer, items = told([[Content("Well.")]])[0], items_of(asked(input=[said, call, found, thought]))
            memory.keep("ann", answer, items)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert taken < 2 * memory.bytes
    *asked_for, last = memory.find("ann", answer.id).items
    assert asked_for == items
    assert last.model_dump(exclude_unset=True) == answer.output[0].model_dump(exclude_unset=True)


class Kept:
    """A running server and the engine behind it."""

    def __init__(self, url: str, engine: ScriptedEngine) -> None:
        self.url, self.engine = url, engine
        self.http = httpx.Client(base_url=url, timeout=20)

    def post(self, **fields: Any) -> httpx.Response:
        """The answer to a valid request with these fields."""
        return self.http.post("/v1/responses", json={"model": "scripted", "input": "Hi", **fields})

    def last_prompt(self) -> str:
        """What the model was asked last."""
        return list(self.engine.prompts.values())[-1]


@pytest.fixture(scope="module")
def _kept() -> Iterator[Kept]:
    engine = ScriptedEngine()
    with running(keeping(engine)) as url:
        kept = Kept(url, engine)
        yield kept
        kept.http.close()


@pytest.fixture
def kept(_kept: Kept) -> Iterator[Kept]:
    """The server with its engine as it was at first."""
    script = _kept.engine.script
    yield _kept
    _kept.engine.script = script
    _kept.engine.gate.set()


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, whose lines agree with their data."""
    events = []
    for block in response.text.split("\n\n")[:-1]:
        kind, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {events[-1]['type']}"
    return events


def test_a_stream_ends_with_what_a_whole_answer_is(kept: Kept) -> None:
    whole = kept.post().json()
    streamed = kept.post(stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = [ResponseEvent.model_validate(each) for each in events_of(streamed)]
    last = events[-1].response
    assert last is not None
    assert added_up(events) == last.output
    assert len([each for each in events if each.type == "response.output_text.delta"]) > 3
    mine, theirs = Response.model_validate(whole).model_dump(), last.model_dump()
    for either in (mine, theirs):
        for item in (either, *either["output"]):
            item["id"] = "the same"
        either["created_at"] = either["completed_at"] = 0
    assert mine == theirs
    assert whole["output"][0]["content"][0]["text"] == "Hello there."


def test_a_conversation_goes_on_from_a_stored_response(kept: Kept) -> None:
    first = kept.post(instructions="Be brief.").json()
    second = kept.post(input="More?", previous_response_id=first["id"], stream=True)
    name = events_of(second)[-1]["response"]["id"]
    third = kept.post(input="And?", previous_response_id=name)
    assert third.json()["previous_response_id"] == name
    assert kept.last_prompt() == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello there.<|im_end|>\n"
        "<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\nHello there.<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert kept.http.get(f"/v1/responses/{first['id']}").json() == first
    assert kept.http.delete(f"/v1/responses/{first['id']}").json()["deleted"] is True
    for gone in (
        kept.http.get(f"/v1/responses/{first['id']}"),
        kept.http.delete(f"/v1/responses/{first['id']}"),
        kept.post(previous_response_id=first["id"]),
        kept.post(previous_response_id=kept.post(store=False).json()["id"]),
    ):
        assert gone.status_code == 404
        assert gone.json()["error"]["code"] == "response_not_found"
    assert kept.http.get(f"/v1/responses/{name}?stream=true").status_code == 400


def test_fields_reach_the_engine(kept: Kept) -> None:
    kept.engine.added.clear()
    answer = kept.post(max_output_tokens=5, temperature=0.5, top_p=0.25, priority=7, metadata={"a": "b"}).json()
    ((name, params),) = kept.engine.added.items()
    assert (params.max_tokens, params.temperature, params.top_p) == (5, 0.5, 0.25)
    standing = kept.engine.standings[name]
    assert standing is not None
    assert standing.priority == 7
    assert (answer["max_output_tokens"], answer["temperature"], answer["top_p"]) == (5, 0.5, 0.25)
    assert answer["metadata"] == {"a": "b"}
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["usage"]["output_tokens"] == 5
    kept.engine.added.clear()
    kept.post(text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}})
    (params,) = kept.engine.added.values()
    assert params.structured is not None
    assert params.structured.json_schema == {"type": "object"}


def test_a_router_chooses_the_model(kept: Kept) -> None:
    chosen = kept.post(model="auto")
    assert chosen.json()["model"] == "scripted"
    body = {"model": "auto", "messages": [{"role": "user", "content": "Hi"}]}
    told = [
        name for name in kept.http.post("/v1/chat/completions", json=body).headers if name not in kept.post().headers
    ]
    assert told
    assert all(name in chosen.headers for name in told)


def test_log_probabilities_come_with_the_text(kept: Kept) -> None:
    wanted = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    (part,) = kept.post(**wanted).json()["output"][0]["content"]
    assert "".join(place["token"] for place in part["logprobs"]).startswith("Hello there.")
    assert all(len(place["top_logprobs"]) == 2 for place in part["logprobs"])
    events = events_of(kept.post(**wanted, stream=True))
    deltas = [place for each in events if each["type"] == "response.output_text.delta" for place in each["logprobs"]]
    done = next(each for each in events if each["type"] == "response.output_text.done")
    assert done["logprobs"] == part["logprobs"]
    assert deltas == part["logprobs"][: len(deltas)]
    assert len(part["logprobs"]) - len(deltas) <= 1  # the end of the turn has no text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"type": ["message"], "content": "x"}]}, "input[0]"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": "x", "phase": "commentary"}]}, "input[0].phase"),
        ({"input": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}]}]}, "input[0].summary"),
        ({"input": "x" * 600}, "input"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"n": 2}, "n"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"model": "other"}, "model"),
    ],
)
def test_what_is_refused_is_named(kept: Kept, fields: dict[str, Any], param: str) -> None:
    answer = kept.post(**fields)
    assert answer.status_code == (404 if param == "model" else 400), answer.text
    assert answer.json()["error"]["param"] == param, answer.text


def test_every_field_of_the_interface_is_known(kept: Kept) -> None:
    params = pytest.importorskip("openai.types.responses.response_create_params")
    theirs = {*params.ResponseCreateParamsBase.__annotations__, "stream"}
    ours = {*ResponseRequest.model_fields, *ResponseRequest.REFUSED}
    assert ours - theirs == {"priority"}
    assert {"stream_options", "store", "conversation"} <= theirs & ours


def test_a_failing_engine_ends_the_stream_with_a_failure(kept: Kept) -> None:
    kept.engine.gate.clear()
    with kept.http.stream("POST", "/v1/responses", json={"model": "scripted", "input": "Hi", "stream": True}) as answer:
        wait_for(lambda: kept.engine.live)
        kept.engine.fail_with = RuntimeError("broken")
        kept.engine.gate.set()
        answer.read()
        events = events_of(answer)
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["status"] == "failed"
    assert events[-1]["response"]["error"]["code"] == "server_error"
    assert "broken" not in json.dumps(events[-1])
    assert kept.http.get(f"/v1/responses/{events[-1]['response']['id']}").status_code == 404


def test_a_client_that_leaves_frees_the_engine(kept: Kept) -> None:
    kept.engine.step_seconds = 0.02
    kept.engine.script = lambda prompt: "long " * 60
    with kept.http.stream("POST", "/v1/responses", json={"model": "scripted", "input": "Hi", "stream": True}) as answer:
        next(answer.iter_lines())
    wait_for(lambda: not kept.engine.live)
    kept.engine.step_seconds = 0.0
    assert kept.engine.aborted

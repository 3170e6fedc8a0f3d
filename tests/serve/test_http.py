"""What no well-behaved client sends, and what happens when one leaves."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from collections.abc import MutableMapping
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gristmill.errors import GristmillError
from gristmill.serve.app import create_app
from gristmill.serve.wire.answers import ChatCompletion, ChatCompletionChunk
from gristmill.serve.wire.chat import ChatCompletionRequest
from gristmill.serve.wire.models import ErrorBody
from serve.conftest import Served
from serve.running import running, wait_for
from serve.scripted_engine import ScriptedEngine, ScriptedLLM

PATH = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


def error_of(response: httpx.Response, status: int = 400) -> dict[str, str | None]:
    """The error of an answer, whose shape is checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"].startswith("req_")
    body = ErrorBody.model_validate_json(response.content, extra="forbid").error
    assert "Traceback" not in body.message
    return body.model_dump()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "\xff"}',
        b"[" * 50_000,
        b'{"a":' * 9_000 + b"1" + b"}" * 9_000,
        b'{"model": "scripted", "messages": [], "n": ' + b"9" * 9_000 + b"}",
    ],
    ids=lambda raw: repr(raw[:12]),
)
def test_bodies_that_are_no_requests(served: Served, raw: bytes) -> None:
    error_of(served.http.post(PATH, content=raw, headers=JSON))
    assert not served.engine.added


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "0"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": 10**30}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 4, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"min_tokens": 9, "max_tokens": 4}, "min_tokens"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"stop": "\ud800"}, "stop"),
        ({"user": "\udfff"}, "user"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usge": True}}, "stream_options.include_usge"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"modalities": ["audio"]}, "modalities[0]"),
        ({"store": True}, "store"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
        ({"messages": [{"role": "user", "content": "x", "name": "n"}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, "messages"),
        ({"model": 4}, "model"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named(served: Served, fields: dict[str, object], param: str) -> None:
    body = json.dumps(served.body(**fields))
    error = error_of(served.http.post(PATH, content=body, headers=JSON))
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["code"]
    assert not served.engine.added


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_have(served: Served, number: str) -> None:
    body = json.dumps(served.body(temperature=12345)).replace("12345", number)
    assert error_of(served.http.post(PATH, content=body, headers=JSON))["param"] == "temperature"


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [1] * 3000},
        {"messages": [{"role": "user", "content": [1] * 3000}]},
        {"bad_words": [1] * 3000},
        {"logit_bias": {f"x{number}": 1 for number in range(3000)}},
        {"metadata": {f"x{number}": 1 for number in range(3000)}},
        {"chat_template_kwargs": {"x": [float("nan")] * 3000}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_not_all_of_a_thousand_faults_are_gathered(served: Served, fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as found:
        ChatCompletionRequest.model_validate(served.body(**fields))
    assert found.value.error_count() == 1
    answer = served.http.post("/v1/chat/completions", content=json.dumps(served.body(**fields)), headers=JSON)
    assert answer.json()["error"]["param"].startswith(next(iter(fields)))


def test_a_field_name_that_cannot_be_sent_back(served: Served) -> None:
    body = json.dumps(served.body(**{"\ud800": 1}))
    error_of(served.http.post(PATH, content=body, headers=JSON))


def test_a_known_field_that_is_refused_may_be_null(served: Served) -> None:
    assert served.chat(tools=None, reasoning_effort=None).status_code == 200
    assert error_of(served.chat(temprature=None))["param"] == "temprature"


def test_other_content_types_are_refused_so_that_no_web_page_can_post_here(served: Served) -> None:
    body = json.dumps(served.body())
    error_of(served.http.post(PATH, content=body, headers={"content-type": "text/plain"}))
    error_of(served.http.post(PATH, content=body))
    answer = served.http.options(PATH, headers={"origin": "http://else.where", "access-control-request-method": "POST"})
    assert "access-control-allow-origin" not in answer.headers


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(alphabet=st.characters(exclude_categories=[]), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
_names = st.sampled_from(sorted({*ChatCompletionRequest.model_fields, *ChatCompletionRequest.REFUSED}))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(_names | st.text(max_size=4), _json, max_size=4))
def test_no_body_makes_the_server_fail(served: Served, fields: dict[str, object]) -> None:
    response = served.http.post(PATH, content=json.dumps(served.body(**fields)), headers=JSON)
    if response.status_code != 200:
        error_of(response, 404 if response.status_code == 404 else 400)


def test_a_body_over_the_limit(served: Served) -> None:
    big = json.dumps(served.body(user="x" * 200_000)).encode()
    assert error_of(served.http.post(PATH, content=big, headers=JSON), 413)["code"] == "request_too_large"
    pieces = (big[i : i + 5_000] for i in range(0, len(big), 5_000))  # chunked, so without a declared length
    assert error_of(served.http.post(PATH, content=pieces, headers=JSON), 413)["code"] == "request_too_large"
    assert served.chat().status_code == 200


def test_unknown_paths_and_methods(served: Served) -> None:
    assert error_of(served.http.get("/v1/engines"), 404)["code"] == "not_found"
    assert error_of(served.http.get(PATH), 405)["code"] == "method_not_allowed"
    assert error_of(served.http.get("/v1/models/none/such"), 404)["code"] == "model_not_found"


def test_answers_have_exactly_the_documented_fields(served: Served) -> None:
    fields = {"logprobs": True, "top_logprobs": 2, "n": 2}
    ChatCompletion.model_validate_json(served.chat(**fields).content, extra="forbid")
    response = served.chat(**fields, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        ChatCompletionChunk.model_validate_json(event.removeprefix("data: "), extra="forbid")
    choice = served.chat().json()["choices"][0]
    assert choice.keys() == {"index", "message", "logprobs", "finish_reason"}
    assert choice["logprobs"] is None
    first = json.loads(served.chat(stream=True).text.split("\n\n")[0].removeprefix("data: "))
    assert first.keys() == {"id", "object", "created", "model", "choices"}
    assert first["choices"][0]["finish_reason"] is None


def test_impossible_tokens_have_a_finite_logprob(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from gristmill.core import Logprob

    monkeypatch.setattr(served.engine, "_places", lambda token, count: {token: Logprob(-float("inf"), 9, "x")})
    content = served.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert {place["logprob"] for place in content} == {-9999.0}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_request_at_once(served: Served, stream: bool) -> None:
    served.engine.gate.clear()  # not one token will be sent
    port = int(served.url.rsplit(":", 1)[1])
    body = json.dumps(served.body(stream=stream)).encode()
    with socket.create_connection(("127.0.0.1", port)) as client:
        head = (
            f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        client.sendall(head.encode() + body)
        wait_for(lambda: served.engine.live)
    wait_for(lambda: served.http.get("/v1/engine").json()["open_requests"] == 1)  # the question itself
    served.engine.gate.set()
    wait_for(lambda: len(served.engine.aborted) == 1)
    assert not served.engine.live


def test_a_reader_that_stops_reading_does_not_stall_another() -> None:
    """Below HTTP, where a reader that does not read is a `send` that does not return."""
    engine = ScriptedEngine()
    app = create_app(ScriptedLLM(engine))
    body = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}], "stream": True}

    async def call(reads: asyncio.Event) -> str:
        """Post the body; take the answer while `reads` is set."""
        inbox: asyncio.Queue[dict[str, object]] = asyncio.Queue()
        inbox.put_nowait({"type": "http.request", "body": json.dumps(body).encode()})
        sent: list[bytes] = []

        async def send(message: MutableMapping[str, Any]) -> None:
            await reads.wait()
            sent.append(message.get("body", b""))

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": PATH, "headers": headers, "query_string": b""}
        await app(scope, inbox.get, send)
        return b"".join(sent).decode()

    async def main() -> None:
        async with app.router.lifespan_context(app), asyncio.timeout(20):
            slow_reads, quick_reads = asyncio.Event(), asyncio.Event()
            slow = asyncio.create_task(call(slow_reads))
            while not engine.added:
                await asyncio.sleep(0.001)
            quick_reads.set()
            assert (await call(quick_reads)).endswith("data: [DONE]\n\n")
            while engine.live:  # the slow one's answer is generated, and waits for its reader
                await asyncio.sleep(0.001)
            assert not slow.done()
            slow_reads.set()
            events = [json.loads(line[6:]) for line in (await slow).split("\n\n") if line.startswith("data: {")]
            contents = [event["choices"][0]["delta"].get("content") for event in events]
            assert contents == ["", "Hello there.", None]  # in one piece, as it was all there when it was read

    asyncio.run(main())
    assert not engine.aborted


def test_a_request_that_is_cut_off_as_its_stream_begins_leaves_nothing() -> None:
    engine = ScriptedEngine()
    engine.gate.clear()
    app = create_app(ScriptedLLM(engine))
    body = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    sent: list[object] = []

    async def main() -> None:
        unread: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": json.dumps(body).encode()}]
        begins, go = asyncio.Event(), asyncio.Event()

        async def receive() -> MutableMapping[str, Any]:
            if unread:
                return unread.pop()
            try:
                await asyncio.Event().wait()
            finally:  # nobody need watch for the client's leaving any more: the answer is there
                begins.set()
                await go.wait()
            raise AssertionError

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": PATH, "headers": headers, "query_string": b""}
        async with app.router.lifespan_context(app), asyncio.timeout(20):
            request = asyncio.create_task(app(scope, receive, send))
            await begins.wait()
            assert engine.live
            request.cancel()
            await asyncio.wait({request})
            go.set()
            engine.gate.set()
            while engine.live:
                await asyncio.sleep(0.001)

    asyncio.run(main())
    assert not sent
    assert len(engine.aborted) == 1


def test_health_and_closing() -> None:
    engine = ScriptedEngine(lambda prompt: "x" * 300)
    engine.step_seconds = 0.01
    with httpx.Client(timeout=20) as http:
        with running(create_app(ScriptedLLM(engine))) as url:
            assert http.get(f"{url}/health").json() == {"status": "ok"}
            texts: list[str] = []
            body = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
            reader = threading.Thread(
                target=lambda: texts.append(httpx.post(f"{url}{PATH}", json=body, timeout=20).text)
            )
            reader.start()
            wait_for(lambda: engine.live)
        reader.join(10)
    assert json.loads(texts[0].split("\n\n")[-2].removeprefix("data: "))["error"]["code"] == "server_closing"
    assert not engine.live


def test_closing_lets_a_short_answer_finish() -> None:
    engine = ScriptedEngine()
    engine.step_seconds = 0.02
    with running(create_app(ScriptedLLM(engine)), drain_seconds=10) as url:
        answers: list[httpx.Response] = []
        body = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}]}
        reader = threading.Thread(target=lambda: answers.append(httpx.post(f"{url}{PATH}", json=body, timeout=20)))
        reader.start()
        wait_for(lambda: engine.live)
    reader.join(10)
    assert answers[0].json()["choices"][0]["message"]["content"] == "Hello there."


def test_the_log_has_ids_and_no_prompts(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="gristmill"):
        answer = served.http.post(f"{PATH}?token=pw", json=served.body(user="secret"), headers={"authorization": "pw"})
        assert answer.status_code == 200
        wait_for(lambda: answer.headers["x-request-id"] in caplog.text)
        served.engine.fail_with = ValueError("broken")
        failed = served.chat(messages=[{"role": "user", "content": "secret"}])
        wait_for(lambda: f"{failed.headers['x-request-id']} failed" in caplog.text)
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("gristmill"))
    assert "secret" not in ours
    assert "pw" not in ours
    assert "POST '/v1/chat/completions' 200" in ours


def test_the_page_and_its_files(served: Served) -> None:
    page = served.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for name, kind in [("app.js", "text/javascript"), ("style.css", "text/css"), ("icon.svg", "image/svg+xml")]:
        answer = served.http.get(f"/static/{name}")
        assert answer.headers["content-type"].split(";")[0] == kind
        assert answer.headers["x-content-type-options"] == "nosniff"
    for outside in ("..%2fapp.py", "%2e%2e/app.py", "none.js", "/etc/passwd"):
        assert served.http.get(f"/static/{outside}").status_code == 404


def test_two_models_of_one_name_are_refused() -> None:
    llm = ScriptedLLM(ScriptedEngine())
    with pytest.raises(GristmillError, match="name of its own"):
        create_app([llm, llm])


@pytest.mark.parametrize("schema", [{"type": "\ud800"}, {"\udfff": {}}, {"enum": [["\ud800"]]}], ids=repr)
def test_half_a_surrogate_pair_deep_in_a_schema_is_told(served: Served, schema: dict[str, object]) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    body = json.dumps(served.body(tools=[tool]))
    error = error_of(served.http.post(PATH, content=body, headers=JSON))
    assert error["param"] == "tools[0].function.parameters"

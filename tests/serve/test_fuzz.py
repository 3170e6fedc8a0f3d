"""Bodies that nobody should send, to every route: each is refused in OpenAI's shape, and the server goes on."""

from __future__ import annotations

import copy
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill import LLM
from gristmill.serve.app import create_app
from serve.running import running
from serve.tiny import save_tiny_model

JSON = {"content-type": "application/json"}
MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}}
SAMPLING = {"temperature": 0.5, "top_p": 0.9, "seed": 1, "n": 2, "stop": ["x"], "logit_bias": {"5": 1}, "max_tokens": 4}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        **SAMPLING,
        "messages": MESSAGES,
        "tools": [TOOL],
        "tool_choice": "none",
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "metadata": {"a": "b"},
    },
    "/v1/completions": {**SAMPLING, "prompt": ["ab", "cd"], "echo": True, "logprobs": 1},
    "/v1/responses": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
        "tools": [{"type": "function", "name": "f", "description": "d", "parameters": SCHEMA, "strict": True}],
        "tool_choice": "none",
        "max_output_tokens": 4,
        "temperature": 0.5,
    },
    "/v1/embeddings": {"input": [[1, 2], [3]], "encoding_format": "float"},
    "/v1/rerank": {"query": "a", "documents": ["b", {"text": "c"}], "top_n": 1},
    "/v1/score": {"text_1": "a", "text_2": ["b"]},
    "/v1/classify": {"input": ["a"]},
    "/tokenize": {"messages": MESSAGES, "add_generation_prompt": True},
    "/detokenize": {"tokens": [1, 2]},
    "/v1/models/load": {"name": "x"},
    "/v1/load_lora_adapter": {"lora_name": "x", "lora_path": "/nowhere"},
}
"""Of each route a body with a value in many places; the model is added."""

DEEP = 100_000
NOT_JSON = {
    "nothing": b"",
    "half": b'{"model": "m", "messages": [',
    "not a number": b'{"model": NaN}',
    "infinity": b'{"model": "m", "temperature": -Infinity}',
    "too large a number": b'{"model": "m", "temperature": 1e999}',
    "digits": b'{"model": "m", "max_tokens": ' + b"9" * 10_000 + b"}",
    "deep lists": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"model":' * DEEP + b"1" + b"}" * DEEP,
    "deep and open": b'{"messages":' + b"[" * DEEP,
    "no UTF-8": b'{"model": "\xff\xfe"}',
    "UTF-16": '{"model": "m"}'.encode("utf-16"),
    "half a pair": b'{"model": "\\ud800", "\\udfff": "\\ud800"}',
    "zero byte": b'{"model": "\\u0000"}\x00',
    "null": b"null",
    "list": b"[]",
    "string": b'"model"',
    "names": b"{" + b",".join(b'"%d":1' % i for i in range(50_000)) + b"}",
    "numbers": b'{"model": "m", "prompt": [' + b"1," * 500_000 + b"1]}",
    "ten megabytes": b'{"model": "' + b"x" * 10_000_000 + b'"}',
}


@dataclass
class Target:
    """A server on a real, tiny engine."""

    http: httpx.Client
    model: str
    port: int

    def refused(self, answer: httpx.Response) -> str:
        """The message of a refusal, which has OpenAI's shape."""
        assert 400 <= answer.status_code < 500, answer.text[:500]
        assert answer.headers["content-type"] == "application/json"
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        return error["message"]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    llm = LLM(save_tiny_model(tmp_path_factory.mktemp("tiny")))
    with running(create_app(llm)) as url, httpx.Client(base_url=url, timeout=30) as http:
        yield Target(http, llm.model_name, int(url.rpartition(":")[2]))
        assert http.get("/health").status_code == 200
        assert not llm.engine.has_unfinished()
        llm.engine.check_integrity()


@pytest.mark.parametrize("raw", NOT_JSON.values(), ids=list(NOT_JSON))
@pytest.mark.parametrize("path", BODIES)
def test_no_route_takes_a_body_that_is_no_request(target: Target, path: str, raw: bytes) -> None:
    message = target.refused(target.http.post(path, content=raw, headers=JSON))
    assert len(message) < 2000


@pytest.mark.parametrize("path", BODIES)
def test_the_bodies_that_are_spoilt_below_are_understood(target: Target, path: str) -> None:
    answer = target.http.post(path, json={"model": target.model, **BODIES[path]})
    unfit = ("unsupported_model", "not_reloadable", "load_failed", "context_length_exceeded")  # for this server
    assert answer.status_code == 200 or answer.json()["error"]["code"] in unfit, answer.text


@pytest.mark.parametrize("path", BODIES)
def test_a_name_given_twice_is_not_settled_in_silence(target: Target, path: str) -> None:
    twice = json.dumps({"model": "x", **BODIES[path]})[:-1] + f', "model": {json.dumps(target.model)}}}'
    assert "twice" in target.refused(target.http.post(path, content=twice, headers=JSON))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5) | st.sampled_from([[], {}, "", 10**300, "\ud800", "x" * 5000, [0] * 3000, -1, 2**31, 2**63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in a body, itself left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in [(*path, key), *places(inner, (*path, key))]]


@given(st.data())
@settings(max_examples=100)
def test_a_wrong_value_anywhere_is_answered(target: Target, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(list(BODIES)))
    body = copy.deepcopy({"model": target.model, **BODIES[path]})
    *way, last = data.draw(st.sampled_from(places(body)))
    holder: Any = body
    for key in way:
        holder = holder[key]
    holder[last] = data.draw(JUNK)
    answer = target.http.post(path, content=json.dumps(body), headers=JSON)
    if answer.status_code != 200:
        target.refused(answer)


@pytest.mark.parametrize(
    "form",
    [
        {"regex": "((a*)*)*b" * 20},
        {"regex": "(a{1,1000}){1,1000}"},
        {"regex": "["},
        {"json": {"$ref": "#"}},
        {"json": {"type": "string", "minLength": 10**9}},
        {"json": {"type": "array", "minItems": 10**9, "items": {"type": "integer"}}},
        {"json": {"allOf": [{"type": "string", "pattern": "^(a|b)*$"}, {"enum": ["c"]}]}},
        {"grammar": "start: start start | start"},
        {"grammar": "start: " + "(" * 2000 + '"a"' + ")" * 2000},
    ],
)
def test_a_form_that_is_dear_or_impossible_does_not_hang_the_server(target: Target, form: dict[str, Any]) -> None:
    body = {"model": target.model, "prompt": "a", "max_tokens": 4, "structured_outputs": form}
    answer = target.http.post("/v1/completions", json=body, timeout=60)
    if answer.status_code != 200:
        target.refused(answer)


def test_many_idle_connections_do_not_keep_the_server_from_others(target: Target) -> None:
    idle = [socket.create_connection(("127.0.0.1", target.port)) for _ in range(300)]
    for number, each in enumerate(idle):
        each.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{"[: number % 60])
    try:
        body = {"model": target.model, "prompt": "a", "max_tokens": 2}
        assert target.http.post("/v1/completions", json=body).status_code == 200
    finally:
        for each in idle:
            each.close()

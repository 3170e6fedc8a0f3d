"""Each field of the completion requests reaches the engine, or the answer, or is told to have no effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from gristmill.core import SamplingParams, StructuredOutput
from gristmill.engine.request import Standing
from gristmill.serve.fields import TABLES, all_tables
from gristmill.serve.wire.base import Closed
from gristmill.serve.wire.chat import ChatCompletionRequest
from gristmill.serve.wire.completions import CompletionRequest
from serve.conftest import Served

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
# What to send, and what the engine must then be asked for.
SAMPLING: dict[str, tuple[Any, dict[str, Any]]] = {
    "min_tokens": (3, {"min_tokens": 3}),
    "n": (2, {"n": 2}),
    "seed": (-5, {"seed": -5}),
    "temperature": (0, {"temperature": 0}),
    "top_p": (0.5, {"top_p": 0.5}),
    "top_k": (3, {"top_k": 3}),
    "min_p": (0.1, {"min_p": 0.1}),
    "typical_p": (0.9, {"typical_p": 0.9}),
    "epsilon_cutoff": (0.01, {"epsilon_cutoff": 0.01}),
    "eta_cutoff": (0.01, {"eta_cutoff": 0.01}),
    "top_n_sigma": (1.5, {"top_n_sigma": 1.5}),
    "temperature_last": (True, {"temperature_last": True}),
    "presence_penalty": (-1.5, {"presence_penalty": -1.5}),
    "frequency_penalty": (1.5, {"frequency_penalty": 1.5}),
    "repetition_penalty": (1.2, {"repetition_penalty": 1.2}),
    "no_repeat_ngram_size": (3, {"no_repeat_ngram_size": 3}),
    "logit_bias": ({"7": -100, "8": 0.5}, {"logit_bias": {7: -100, 8: 0.5}}),
    "bad_words": (["x", [5, 6]], {"bad_words": ["x", [5, 6]]}),
    "stop": ("end", {"stop": "end"}),
    "include_stop_str_in_output": (True, {"include_stop_str_in_output": True}),
    "length_decay": ([2, 1.1], {"length_decay": (2, 1.1)}),
    "max_time": (60.5, {"max_time": 60.5}),
    "max_flops": (1e15, {"max_flops": 1e15}),
    "stop_below_probability": (0.1, {"stop_below_probability": 0.1}),
    "repetition_stop": ([2, 3], {"repetition_stop": (2, 3)}),
    "skip_special_tokens": (False, {"skip_special_tokens": False}),
    "prompt_logprobs": (2, {"prompt_logprobs": 2}),
    "structured_outputs": ({"regex": "[a-z]+"}, {"structured": StructuredOutput(regex="[a-z]+")}),
}
CHAT = {
    **SAMPLING,
    "max_completion_tokens": (7, {"max_tokens": 7}),
    "max_tokens": (7, {"max_tokens": 7}),
    "stop_token_ids": ([5, 6], {"stop_token_ids": (5, 6, 257)}),
    "ignore_eos": (True, {"ignore_eos": True, "stop_token_ids": None}),
    "logprobs": (True, {"logprobs": 0}),
    "response_format": (
        {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
        {"structured": StructuredOutput(json_schema=SCHEMA)},
    ),
}
COMPLETION = {
    **SAMPLING,
    "max_tokens": (7, {"max_tokens": 7}),
    "stop_token_ids": ([5, 6], {"stop_token_ids": [5, 6]}),
    "ignore_eos": (True, {"ignore_eos": True}),
    "logprobs": (3, {"logprobs": 3}),
    "best_of": (2, {"n": 2, "logprobs": 0}),
}
# Fields that shape the prompt, the answer or the order of requests, with the test that says how.
SHOWN = {
    ChatCompletionRequest: {
        "model": "test_openai_client.py::test_a_whole_answer",
        "messages": "test_openai_client.py::test_the_conversation_is_rendered_by_the_chat_template",
        "top_logprobs": "test_openai_client.py::test_logprobs",
        "stream": "test_openai_client.py::test_a_stream_adds_up_to_the_whole_answer",
        "stream_options": "test_openai_client.py::test_usage_comes_last_in_a_stream_that_asks_for_it",
        "priority": "test_fields.py::test_where_a_request_stands",
        "cache_salt": "test_fields.py::test_where_a_request_stands",
        "tools": "test_tools.py::test_a_call_is_taken_out_of_the_answer",
        "tool_choice": "test_tools.py::test_tool_choice",
        "parallel_tool_calls": "test_tools.py::test_parallel_calls_can_be_forbidden",
        "reasoning_effort": "test_reasoning.py::test_an_effort_is_a_budget",
        "thinking_budget": "test_reasoning.py::test_thinking_fields_reach_the_engine",
        "min_thinking_tokens": "test_reasoning.py::test_thinking_fields_reach_the_engine",
        "think_waits": "test_reasoning.py::test_thinking_fields_reach_the_engine",
        "think_wait": "test_reasoning.py::test_thinking_fields_reach_the_engine",
        "include_reasoning": "test_reasoning.py::test_reasoning_can_be_left_out",
        "continue_final_message": "test_reasoning.py::test_an_answer_can_be_begun",
        "chat_template_kwargs": "test_reasoning.py::test_template_options_reach_the_template",
        "return_token_ids": "test_completions.py::test_token_ids_can_be_asked_for",
    },
    CompletionRequest: {
        "model": "test_completions.py::test_equals_the_engine",
        "prompt": "test_completions.py::test_equals_the_engine",
        "stream": "test_completions.py::test_a_stream_adds_up_to_the_whole_answer",
        "stream_options": "test_completions.py::test_a_stream_adds_up_to_the_whole_answer",
        "echo": "test_completions.py::test_echo_scores_the_prompt",
        "priority": "test_fields.py::test_where_a_request_stands",
        "cache_salt": "test_fields.py::test_where_a_request_stands",
        "add_special_tokens": "test_completions.py::test_the_start_token_can_be_left_out",
        "return_token_ids": "test_completions.py::test_token_ids_can_be_asked_for",
        "thinking_budget": "test_completions.py::test_thinking_fields_reach_the_engine",
        "min_thinking_tokens": "test_completions.py::test_thinking_fields_reach_the_engine",
        "think_waits": "test_completions.py::test_thinking_fields_reach_the_engine",
        "think_wait": "test_completions.py::test_thinking_fields_reach_the_engine",
    },
}
# Fields whose accepted values say what happens anyway; test_http.py refuses the others.
ONLY = {"modalities": ["text"], "store": False, "service_tier": "auto"}
LABELS = {"user": "me", "safety_identifier": "me", "metadata": {"job": "7"}, "prompt_cache_key": "me"}

ROUTES = [
    (ChatCompletionRequest, "/v1/chat/completions", CHAT, {"messages": [{"role": "user", "content": "Hi"}]}),
    (CompletionRequest, "/v1/completions", COMPLETION, {"prompt": "Hi"}),
]
PLAIN = {
    ChatCompletionRequest: SamplingParams(max_tokens=None, stop_token_ids=(257,)),  # 257 ends a turn of the template
    CompletionRequest: SamplingParams(max_tokens=16),
}
routes = pytest.mark.parametrize(("body", "path", "table", "required"), ROUTES, ids=[route[1] for route in ROUTES])


def post(served: Served, path: str, required: dict[str, Any], **fields: Any) -> httpx.Response:
    return served.http.post(path, json={"model": "scripted", **required, **fields})


@routes
def test_the_tables_above_cover_the_published_schema(
    served: Served, body: type[Closed], path: str, table: dict[str, Any], required: dict[str, Any]
) -> None:
    schema = served.http.get("/openapi.json").json()["components"]["schemas"][body.__name__]
    labels = {name for name in {**ONLY, **LABELS} if name in schema["properties"]}
    assert schema["properties"].keys() == {*table, *SHOWN[body], *labels}
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"model", *required}
    without_effect = {name for name, field in schema["properties"].items() if field.get("x-effect") == "none"}
    assert without_effect == labels - {"modalities"}
    assert not body.REFUSED.keys() & schema["properties"].keys()
    for place in SHOWN[body].values():
        file, test = place.split("::")
        assert f"def {test}(" in (Path(__file__).parent / file).read_text(encoding="utf-8"), place


@routes
def test_fields_for_the_engine_reach_it_and_change_nothing_else(
    served: Served, body: type[Closed], path: str, table: dict[str, Any], required: dict[str, Any]
) -> None:
    assert post(served, path, required).status_code == 200
    (plain,) = served.engine.added.values()
    assert plain == PLAIN[body]
    for name, (value, expected) in table.items():
        served.engine.added.clear()
        answer = post(served, path, required, **{name: value})
        assert answer.status_code == 200, (name, answer.text)
        (params,) = served.engine.added.values()
        assert params == SamplingParams(**{**vars(plain), **expected}), name
        assert params != plain, name


@routes
def test_every_sampling_parameter_can_be_asked_for_or_is_refused(
    served: Served, body: type[Closed], path: str, table: dict[str, Any], required: dict[str, Any]
) -> None:
    offered = {name for _, expected in table.values() for name in expected} | set(body.model_fields)
    for name in set(vars(SamplingParams())) - offered:  # unknown to the server, so refused by name
        answer = post(served, path, required, **{name: 1})
        assert answer.status_code == 400, name
        assert answer.json()["error"]["param"] == name


@routes
def test_labels_and_fixed_fields_change_nothing(
    served: Served, body: type[Closed], path: str, table: dict[str, Any], required: dict[str, Any]
) -> None:
    for name, value in {**ONLY, **LABELS}.items():
        if name not in body.model_fields:
            continue
        served.engine.added.clear()
        assert post(served, path, required, **{name: value}).status_code == 200, name
        (params,) = served.engine.added.values()
        assert params == PLAIN[body], name


@routes
def test_null_is_the_default_for_every_optional_field(
    served: Served, body: type[Closed], path: str, table: dict[str, Any], required: dict[str, Any]
) -> None:
    optional = {name: None for name, field in body.model_fields.items() if not field.is_required()}
    refused = dict.fromkeys(body.REFUSED)
    assert post(served, path, required, **optional, **refused).status_code == 200
    (params,) = served.engine.added.values()
    assert params == PLAIN[body]


@routes
def test_each_refused_field_is_told_with_its_reason(
    served: Served, body: type[Closed], path: str, table: dict[str, Any], required: dict[str, Any]
) -> None:
    for name, reason in body.REFUSED.items():
        error = post(served, path, required, **{name: [1]}).json()["error"]
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")
        assert reason in error["message"]


@routes
def test_where_a_request_stands(
    served: Served, body: type[Closed], path: str, table: dict[str, Any], required: dict[str, Any]
) -> None:
    served.engine.standings.clear()
    assert post(served, path, required, priority=-3, cache_salt="mine").status_code == 200
    assert list(served.engine.standings.values()) == [Standing(priority=-3, cache_salt="mine")]


def test_every_body_of_the_published_interface_is_closed(served: Served) -> None:
    """No route reads a body that would ignore a field."""
    document = served.http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]

    def check(schema: dict[str, Any], where: str) -> None:
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            if name not in seen:
                seen.add(name)
                check(schemas[name], name)
            return
        if "properties" in schema:
            assert schema.get("additionalProperties") is False, where
        for key in ("anyOf", "oneOf", "allOf"):
            for branch in schema.get(key, ()):
                check(branch, where)
        for name, inner in schema.get("properties", {}).items():
            check(inner, f"{where}.{name}")
        if isinstance(schema.get("items"), dict):
            check(schema["items"], f"{where}[]")

    seen: set[str] = set()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                if kind == "application/json":
                    check(content["schema"], f"{method} {path}")
    assert {"ChatCompletionRequest", "CompletionRequest", "UserMessage", "LoadRequest", "EmbeddingRequest"} <= seen


def test_the_documented_tables_are_the_schemas() -> None:
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    assert all_tables() in text, "docs/api.md is behind: paste what `python -m gristmill.serve.fields` prints"
    assert {body for _, body in TABLES} >= {ChatCompletionRequest, CompletionRequest}

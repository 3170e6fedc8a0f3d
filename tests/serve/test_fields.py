"""Each field of the request schema reaches the engine, or the answer, or is told to have no effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gristmill.core import SamplingParams
from gristmill.serve.fields import fields_table
from gristmill.serve.request import REFUSED, ChatCompletionRequest
from serve.conftest import Served

# What to send, and what the engine must then be asked for.
TO_THE_ENGINE: dict[str, tuple[Any, dict[str, Any]]] = {
    "max_completion_tokens": (7, {"max_tokens": 7}),
    "max_tokens": (7, {"max_tokens": 7}),
    "min_tokens": (3, {"min_tokens": 3}),
    "n": (2, {"n": 2}),
    "seed": (-5, {"seed": -5}),
    "temperature": (0, {"temperature": 0}),
    "top_p": (0.5, {"top_p": 0.5}),
    "top_k": (3, {"top_k": 3}),
    "min_p": (0.1, {"min_p": 0.1}),
    "presence_penalty": (-1.5, {"presence_penalty": -1.5}),
    "frequency_penalty": (1.5, {"frequency_penalty": 1.5}),
    "repetition_penalty": (1.2, {"repetition_penalty": 1.2}),
    "logit_bias": ({"7": -100, "8": 0.5}, {"logit_bias": {7: -100, 8: 0.5}}),
    "stop": ("end", {"stop": "end"}),
    "stop_token_ids": ([5, 6], {"stop_token_ids": [5, 6, 257]}),
    "include_stop_str_in_output": (True, {"include_stop_str_in_output": True}),
    "ignore_eos": (True, {"ignore_eos": True, "stop_token_ids": None}),
    "skip_special_tokens": (False, {"skip_special_tokens": False}),
    "logprobs": (True, {"logprobs": 0}),
}
# Fields that shape the answer, with the test that says how.
IN_THE_ANSWER = {
    "model": "test_openai_client.py::test_a_whole_answer",
    "messages": "test_openai_client.py::test_the_conversation_is_rendered_by_the_chat_template",
    "top_logprobs": "test_openai_client.py::test_logprobs",
    "stream": "test_openai_client.py::test_a_stream_adds_up_to_the_whole_answer",
    "stream_options": "test_openai_client.py::test_usage_comes_last_in_a_stream_that_asks_for_it",
}
# Fields whose accepted values say what happens anyway; test_http.py refuses the others.
ONLY = {"response_format": {"type": "text"}, "modalities": ["text"], "store": False, "service_tier": "auto"}
LABELS = {"user": "me", "safety_identifier": "me", "metadata": {"job": "7"}}


def test_the_tables_above_cover_the_published_schema(served: Served) -> None:
    schema = served.http.get("/openapi.json").json()["components"]["schemas"]["ChatCompletionRequest"]
    assert schema["properties"].keys() == {*TO_THE_ENGINE, *IN_THE_ANSWER, *ONLY, *LABELS}
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["model", "messages"]
    without_effect = {name for name, field in schema["properties"].items() if field.get("x-effect") == "none"}
    assert without_effect == {*LABELS, "store", "service_tier"}
    assert not REFUSED.keys() & schema["properties"].keys()
    for place in IN_THE_ANSWER.values():
        file, test = place.split("::")
        assert f"def {test}(" in (Path(__file__).parent / file).read_text(encoding="utf-8")


def test_fields_for_the_engine_reach_it_and_change_nothing_else(served: Served) -> None:
    assert served.chat().status_code == 200
    (plain,) = served.engine.added.values()
    assert plain == SamplingParams(max_tokens=None, stop_token_ids=[257])  # 257 ends a turn of the template
    for name, (value, expected) in TO_THE_ENGINE.items():
        served.engine.added.clear()
        assert served.chat(**{name: value}).status_code == 200, name
        (params,) = served.engine.added.values()
        assert params == SamplingParams(**{**vars(plain), **expected}), name
        assert params != plain, name


def test_every_sampling_parameter_can_be_asked_for_or_is_refused(served: Served) -> None:
    offered = {name for _, expected in TO_THE_ENGINE.values() for name in expected}
    left = set(vars(SamplingParams())) - offered
    assert {"prompt_logprobs"} <= left & REFUSED.keys()
    for name in left - REFUSED.keys():  # unknown to the server, so refused by name
        answer = served.chat(**{name: 1})
        assert answer.status_code == 400, name
        assert answer.json()["error"]["param"] == name


def test_labels_and_fixed_fields_change_nothing(served: Served) -> None:
    for name, value in {**ONLY, **LABELS}.items():
        served.engine.added.clear()
        assert served.chat(**{name: value}).status_code == 200, name
        (params,) = served.engine.added.values()
        assert params == SamplingParams(max_tokens=None, stop_token_ids=[257]), name


def test_null_is_the_default_for_every_optional_field(served: Served) -> None:
    optional = {name: None for name, field in ChatCompletionRequest.model_fields.items() if not field.is_required()}
    assert served.chat(**optional).status_code == 200
    (params,) = served.engine.added.values()
    assert params == SamplingParams(max_tokens=None, stop_token_ids=[257])


def test_each_refused_field_is_told_with_its_reason(served: Served) -> None:
    for name, reason in REFUSED.items():
        error = served.chat(**{name: [1]}).json()["error"]
        assert error["param"] == name
        assert reason in error["message"]


def test_the_documented_table_is_the_schema() -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    assert fields_table() in text, "docs/serving.md is behind: paste what `python -m gristmill.serve.fields` prints"

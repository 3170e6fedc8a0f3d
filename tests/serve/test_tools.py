"""Tool calls: asked for, taken out of the answer whole or streamed, and answered."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serve.conftest import Served
from serve.test_reasoning import deltas_of, gathered

HI = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def calls_in(deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls of a stream, put together as clients do."""
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        for piece in delta.get("tool_calls") or ():
            if piece["index"] == len(calls):
                calls.append({"id": piece["id"], "name": piece["function"]["name"], "arguments": ""})
            calls[piece["index"]]["arguments"] += piece["function"].get("arguments") or ""
    return calls


def test_a_call_is_taken_out_of_the_answer(caller: Served) -> None:
    caller.engine.script = lambda prompt: "Let me see. " + call("weather", city='Caf\u00e9 "}" \\ Ost')
    choice = caller.chat(tools=[WEATHER]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"].strip() == "Let me see."
    (made,) = choice["message"]["tool_calls"]
    assert (made["type"], made["function"]["name"]) == ("function", "weather")
    assert json.loads(made["function"]["arguments"]) == {"city": 'Caf\u00e9 "}" \\ Ost'}
    (prompt,) = caller.engine.prompts.values()
    assert "Tells the weather." in prompt
    assert '"city"' in prompt


def test_a_stream_of_calls_adds_up(caller: Served) -> None:
    caller.engine.step_seconds = 0.003
    caller.engine.script = lambda prompt: call("weather", city="Bern") + "\n" + call("clock")
    deltas = deltas_of(caller.chat(tools=[WEATHER, CLOCK], stream=True).text)
    whole = caller.chat(tools=[WEATHER, CLOCK]).json()["choices"][0]["message"]
    assert whole["content"] is None
    streamed = calls_in(deltas)
    assert [made["name"] for made in streamed] == ["weather", "clock"]
    assert [json.loads(made["arguments"]) for made in streamed] == [{"city": "Bern"}, {}]
    assert [made["arguments"] for made in streamed] == [m["function"]["arguments"] for m in whole["tool_calls"]]
    assert len({made["id"] for made in streamed}) == 2
    assert gathered(deltas, "content").strip() == ""
    pieces = [p for d in deltas for p in d.get("tool_calls") or () if p["function"].get("arguments")]
    assert len(pieces) > 3  # arguments come as they are written


def test_without_tools_a_call_is_text(caller: Served) -> None:
    text = call("weather", city="Bern")
    caller.engine.script = lambda prompt: text
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        choice = caller.chat(**fields).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")


def test_a_malformed_call_is_content(caller: Served) -> None:
    caller.engine.script = lambda prompt: '<tool_call>\n{"nam": 1}\n</tool_call> sorry'
    choice = caller.chat(tools=[WEATHER]).json()["choices"][0]
    assert choice["message"]["content"] == '<tool_call>\n{"nam": 1}\n</tool_call> sorry'
    assert choice["finish_reason"] == "stop"


def test_results_go_back_to_the_model(caller: Served) -> None:
    made = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    conversation = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "call_1", "content": "17 degrees"},
    ]
    assert caller.chat(messages=conversation, tools=[WEATHER]).status_code == 200
    (prompt,) = caller.engine.prompts.values()
    assert "17 degrees" in prompt
    assert '"Bern"' in prompt


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "clock"}}])
def test_tool_choice(caller: Served, choice: Any) -> None:
    caller.engine.script = lambda prompt: call("clock")
    answer = caller.chat(tools=[WEATHER, CLOCK], tool_choice=choice)
    assert answer.status_code == 200, answer.text
    (params,) = caller.engine.added.values()
    assert params.structured is not None
    grammar = str(params.structured)
    assert "clock" in grammar
    assert ("weather" in grammar) == (choice == "required")
    assert answer.json()["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "clock"


def test_parallel_calls_can_be_forbidden(caller: Served) -> None:
    bodies = [{"tool_choice": "required", "parallel_tool_calls": parallel} for parallel in (True, False)]
    for body in bodies:
        assert caller.chat(tools=[WEATHER], **body).status_code == 200
    several, one = (params.structured for params in caller.engine.added.values())
    assert several != one


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "clock"}}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls"),
        ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [*HI, {"role": "tool", "tool_call_id": "none", "content": "x"}]}, "messages"),
    ],
    ids=str,
)
def test_wrong_requests_are_told(caller: Served, fields: dict[str, Any], param: str) -> None:
    answer = caller.chat(**fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param

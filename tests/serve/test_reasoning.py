"""Reasoning: told from the answer, whole or streamed, limited, and shown or not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gristmill.serve.answering.reading import _SpecialTokens
from gristmill.serve.wire.chat import THINKING_TOKENS
from serve.conftest import Served

HI = [{"role": "user", "content": "Hi"}]


def deltas_of(text: str) -> list[dict[str, Any]]:
    """The deltas of a streamed answer's only choice."""
    events = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    return [event["choices"][0]["delta"] for event in events if event["choices"]]


def gathered(deltas: list[dict[str, Any]], field: str) -> str:
    return "".join(delta.get(field) or "" for delta in deltas)


def test_reasoning_is_told_from_the_answer(thinker: Served) -> None:
    answer = thinker.chat().json()
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm, a", "Yes.")
    # <think>, line break, five letters, line break, </think>
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 9
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_stream_tells_them_apart_token_by_token(thinker: Served) -> None:
    thinker.engine.step_seconds = 0.01
    deltas = deltas_of(thinker.chat(stream=True).text)
    assert (gathered(deltas, "reasoning_content"), gathered(deltas, "content")) == ("Hm, a", "Yes.")
    kinds = ["reasoning_content" in delta for delta in deltas if delta.get("content") or "reasoning_content" in delta]
    assert kinds == sorted(kinds, reverse=True)
    assert len(kinds) > 3


def test_reasoning_can_be_left_out(thinker: Served) -> None:
    message = thinker.chat(include_reasoning=False).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Yes.", "refusal": None}
    deltas = deltas_of(thinker.chat(include_reasoning=False, stream=True).text)
    assert not any("reasoning_content" in delta for delta in deltas)
    assert gathered(deltas, "content") == "Yes."


def test_an_answer_that_is_cut_off_in_its_reasoning_has_no_content(thinker: Served) -> None:
    choice = thinker.chat(max_tokens=5).json()["choices"][0]
    assert choice["message"]["reasoning_content"] == "Hm,"
    assert choice["message"]["content"] == ""
    assert choice["finish_reason"] == "length"


def test_an_effort_is_a_budget(thinker: Served) -> None:
    for effort in (*THINKING_TOKENS, "xhigh"):
        thinker.engine.added.clear()
        assert thinker.chat(reasoning_effort=effort).status_code == 200
        (params,) = thinker.engine.added.values()
        assert params.thinking_budget == THINKING_TOKENS.get(effort)
    error = thinker.chat(reasoning_effort="low", thinking_budget=5).json()["error"]
    assert error["param"] == "reasoning_effort"


def test_thinking_fields_reach_the_engine(thinker: Served) -> None:
    fields = {"thinking_budget": 50, "min_thinking_tokens": 2, "think_waits": 1, "think_wait": "."}
    # a budget counts from the beginning of the reasoning, which the prompt therefore opens
    thinker.engine.script = lambda prompt: "Hm.</think>Yes." if prompt.endswith("assistant\n<think>") else prompt
    answer = thinker.chat(**fields).json()["choices"][0]["message"]
    assert (answer["reasoning_content"], answer["content"]) == ("Hm.", "Yes.")
    (params,) = thinker.engine.added.values()
    assert {name: getattr(params, name) for name in fields} == fields
    assert params.think_end == "</think>"


def test_stop_strings_and_formats_count_after_the_reasoning(thinker: Served) -> None:
    schema = {"type": "json_object"}
    assert thinker.chat(stop="Hm", response_format=schema).status_code == 200
    assert thinker.chat(stop="Hm", response_format=schema, thinking_budget=5).status_code == 200
    free, opened = thinker.engine.added.values()
    for params, opening in [(free, "<think>"), (opened, "")]:
        assert params.stop_outside == (opening, "</think>")
        assert params.structured is not None
        assert params.structured.outside == (opening, "</think>")


def test_a_model_that_does_not_reason_says_so(served: Served) -> None:
    for field, value in [("reasoning_effort", "low"), ("thinking_budget", 5), ("think_waits", 1)]:
        error = served.chat(**{field: value}).json()["error"]
        assert error["param"] == field
        assert "does not reason" in error["message"]
    assert served.chat(reasoning_effort="none").status_code == 200


def test_template_options_reach_the_template(thinker: Served) -> None:
    assert thinker.chat(chat_template_kwargs={"enable_thinking": False}).status_code == 200
    (prompt,) = thinker.engine.prompts.values()
    assert prompt.endswith("<think>\n\n</think>\n\n")
    error = thinker.chat(chat_template_kwargs={"enable_thnking": False}).json()["error"]
    assert "enable_thinking" in error["message"]


def test_an_answer_can_be_begun(thinker: Served) -> None:
    begun = [*HI, {"role": "assistant", "content": "Well, no"}]
    thinker.engine.script = lambda prompt: "ne." if prompt.endswith("assistant\nWell, no") else "?"
    answer = thinker.chat(messages=begun, continue_final_message=True).json()
    assert answer["choices"][0]["message"]["content"] == "ne."
    error = thinker.chat(continue_final_message=True).json()["error"]
    assert (error["param"], error["code"]) == ("messages", "invalid_messages")


def test_special_tokens_are_dropped_unless_asked_for(thinker: Served) -> None:
    thinker.engine.script = lambda prompt: "a<|im_start|>b"
    assert thinker.chat().json()["choices"][0]["message"]["content"] == "ab"
    assert gathered(deltas_of(thinker.chat(stream=True).text), "content") == "ab"
    shown = thinker.chat(skip_special_tokens=False).json()["choices"][0]["message"]["content"]
    assert shown.startswith("a<|im_start|>b")


@pytest.mark.parametrize("stream", [False, True])
def test_a_forbidden_phrase_ends_the_answer(stream: bool) -> None:
    import httpx

    from gristmill.serve.app import create_app
    from serve.running import running
    from serve.scripted_engine import ScriptedEngine, ScriptedLLM

    app = create_app(ScriptedLLM(ScriptedEngine(lambda prompt: "All fine, secret plan.")), forbidden=["secret"])
    with running(app) as url:
        body = {"model": "scripted", "messages": HI, "stream": stream}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body)
        if stream:
            assert gathered(deltas_of(answer.text), "content") == "All fine, "
            assert '"finish_reason":"content_filter"' in answer.text
        else:
            choice = answer.json()["choices"][0]
            assert (choice["message"]["content"], choice["finish_reason"]) == ("All fine, ", "content_filter")


@pytest.mark.parametrize("width", [1, 2, 3, 50])
def test_special_tokens_are_dropped_from_pieces_of_any_length(width: int) -> None:
    drop = _SpecialTokens([*(f"<|extra_{number}|>" for number in range(1000)), "<|end|>", "[E]"]).drop
    text = "a<|extra_7|> <b|[E][E <|extra_1000|><|end|><|en"
    pieces = [drop(text[start : start + width], last=False) for start in range(0, len(text), width)]
    assert "".join([*pieces, drop("", last=True)]) == "a <b|[E <|extra_1000|><|en"

"""A tool choice holds the answer to calls that the model's own parser reads, with arguments of their schema."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from engine.constraints.steps import asked, constraints, generate, random_logits
from gristmill.core import SamplingParams, StructuredOutput
from gristmill.engine.constraints.calls import after_reasoning, calls_form
from gristmill.engine.constraints.closing import byte_tokenizer
from gristmill.engine.constraints.form import form_of
from gristmill.errors import RequestError
from gristmill.tokens.answer.formats import AnswerFormat, CallStyle
from gristmill.tokens.answer.parser import AnswerParser
from gristmill.tokens.answer.reader import CallArguments, CallBegan, Content, Reasoning


def tool(name: str, properties: dict[str, Any], *, strict: bool = False) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": schema, "strict": strict}}


TOOLS = [
    tool("find", {"place": {"type": "string"}, "count": {"type": "integer", "minimum": 0, "maximum": 99}}),
    tool("now", {}),
    tool("paint", {"colour": {"type": "string", "enum": ["red", "blue"]}}),
]
STRICT = [tool("paint", {"colour": {"type": "string", "enum": ["red", "blue"]}}, strict=True), TOOLS[1]]
FIND: dict[str, Any] = {"type": "function", "function": {"name": "find"}}


def read(
    style: CallStyle, text: str, tools: list[dict[str, Any]], opened: bool = False
) -> tuple[str, str, list[list[str]]]:
    parser = AnswerParser(AnswerFormat(style).thinking(), tools=tools, opened=opened)
    reasoning, content, calls = "", "", list[list[str]]()
    for event in [*parser.feed(text), *parser.finish()]:
        match event:
            case Reasoning(more):
                reasoning += more
            case Content(more):
                content += more
            case CallBegan(_, _, name):
                calls.append([name, ""])
            case CallArguments(_, more):
                calls[-1][1] += more
    return reasoning, content, calls


def check(calls: list[list[str]], tools: list[dict[str, Any]]) -> None:
    schemas = {one["function"]["name"]: one["function"]["parameters"] for one in tools}
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), schemas[name])


def accepts(structured: StructuredOutput, text: str) -> bool:
    from llguidance import LLMatcher

    matcher = LLMatcher(byte_tokenizer(), form_of(structured).grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


@pytest.mark.parametrize("style", CallStyle)
@pytest.mark.parametrize("seed", range(2))
def test_required_calls_are_read_back_and_valid(style: CallStyle, seed: int) -> None:
    form = calls_form(AnswerFormat(style), TOOLS, "required")
    assert form is not None
    target = constraints()
    params = SamplingParams(structured=form, max_tokens=200)
    text = generate(target, params, random_logits(target, seed))
    _, content, calls = read(style, text, TOOLS)
    assert content == ""
    assert calls
    check(calls, TOOLS)


@pytest.mark.parametrize("style", CallStyle)
def test_a_named_function_is_called_once(style: CallStyle) -> None:
    form = calls_form(AnswerFormat(style), TOOLS, FIND)
    assert form is not None
    target = constraints()
    text = generate(target, SamplingParams(structured=form, max_tokens=120), random_logits(target, 5))
    _, content, calls = read(style, text, TOOLS)
    assert (content, [name for name, _ in calls]) == ("", ["find"])
    check(calls, TOOLS)


SPELLED = {
    CallStyle.HERMES: '<tool_call>\n{{"name": "paint", "arguments": {}}}\n</tool_call>',
    CallStyle.QWEN_XML: "<tool_call>\n<function=paint>\n<parameter=colour>\n{}\n</parameter>\n</function>\n"
    "</tool_call>",
    CallStyle.MISTRAL: '[TOOL_CALLS][{{"name": "paint", "arguments": {}}}]',
    CallStyle.MISTRAL_ARGS: "[TOOL_CALLS]paint[ARGS]{}",
    CallStyle.LLAMA3: '{{"name": "paint", "parameters": {}}}',
}


@pytest.mark.parametrize("style", CallStyle)
def test_strict_arguments_keep_to_the_schema_once_a_call_begins(style: CallStyle) -> None:
    form = calls_form(AnswerFormat(style), STRICT)
    assert form is not None
    xml, lead = style is CallStyle.QWEN_XML, "" if style is CallStyle.LLAMA3 else "Look: "
    red, green = ("red", "green") if xml else ('{"colour": "red"}', '{"colour": "green"}')
    assert accepts(form, "Any text, <too and [TOOL_ALLS] in it.")
    assert accepts(form, lead + SPELLED[style].format(red))
    assert not accepts(form, lead + SPELLED[style].format(green))
    if style is not CallStyle.LLAMA3:
        assert accepts(form, lead + SPELLED[style].format(red) + "\nDone.")
        assert not accepts(form, f"{lead}{style.marker} Done.")


def test_one_call_at_most_without_parallel() -> None:
    one, hermes = SPELLED[CallStyle.HERMES].format('{"colour": "red"}'), AnswerFormat(CallStyle.HERMES)
    for choice in ("auto", "required"):
        single, several = (calls_form(hermes, STRICT, choice, parallel=parallel) for parallel in (False, True))
        assert single is not None
        assert several is not None
        assert accepts(several, f"{one}\n{one}")
        assert accepts(single, one)
        assert not accepts(single, f"{one}\n{one}")


def test_nothing_is_asked_of_an_answer_that_may_be_any_text() -> None:
    hermes = AnswerFormat(CallStyle.HERMES)
    assert calls_form(hermes, TOOLS) is None
    assert calls_form(hermes, STRICT, "none") is None


@pytest.mark.parametrize(
    ("form", "tools", "choice", "field"),
    [
        (AnswerFormat(None), TOOLS, "required", "tool_choice"),
        (AnswerFormat(), [], "required", "tool_choice"),
        (AnswerFormat(), TOOLS, "requierd", "tool_choice"),
        (AnswerFormat(), TOOLS, {"type": "function", "function": {"name": "fnd"}}, "tool_choice"),
        (AnswerFormat(), [tool("f", {"a": {"minimum": 2**60}}, strict=True)], "auto", "tools[0].function.parameters"),
        (
            AnswerFormat(CallStyle.QWEN_XML),
            [TOOLS[0], tool("f", {"a": {"type": "string", "pattern": "x+"}}, strict=True)],
            "auto",
            "tools[1].function.strict",
        ),
    ],
)
def test_refusals_name_the_field(form: AnswerFormat, tools: list[dict[str, Any]], choice: Any, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        calls_form(form, tools, choice)
    assert caught.value.field == field


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
THINKING = AnswerFormat().thinking()


@pytest.mark.parametrize(
    ("opened", "text", "fine"),
    [
        (True, 'so, so </think>\n\n{"n": 1}', True),
        (True, '{"n": 1}', False),
        (True, "{</thin</think>[]", False),
        (False, '<think>\n</think>{"n": 1}', True),
        (False, '{"n": 1}', True),
        (False, 'so {"n": 1}', False),
    ],
)
def test_the_structure_begins_after_the_reasoning(opened: bool, text: str, fine: bool) -> None:
    structured = after_reasoning(StructuredOutput(json_schema=SCHEMA), THINKING, opened=opened)
    assert accepts(structured, text) == fine
    assert after_reasoning(structured, AnswerFormat()) is structured


@pytest.mark.parametrize("fields", [{"json_schema": SCHEMA}, {"choice": ["yes", "no"]}, {"regex": "[ab]{3}"}])
@pytest.mark.parametrize("max_tokens", [24, 90])
def test_reasoning_ends_in_time_for_the_structure(fields: dict[str, Any], max_tokens: int) -> None:
    structured = after_reasoning(StructuredOutput(**fields), THINKING, opened=True)
    target = constraints()
    for seed in range(3):
        params = SamplingParams(structured=structured, max_tokens=max_tokens)
        text = generate(target, params, random_logits(target, seed), seed)
        assert accepts(structured, text)


def test_calls_after_reasoning_are_read_back() -> None:
    form = calls_form(THINKING, TOOLS, "required")
    assert form is not None
    target = constraints()
    params = SamplingParams(structured=after_reasoning(form, THINKING, opened=True), max_tokens=150)
    text = generate(target, params, random_logits(target, 2))
    _, content, calls = read(CallStyle.HERMES, text, TOOLS, opened=True)
    assert content == ""
    check(calls, TOOLS)


def test_a_thinking_budget_goes_with_a_structure_after_the_reasoning_only() -> None:
    target = constraints()
    structured = after_reasoning(StructuredOutput(json_schema=SCHEMA), THINKING, opened=True)
    target.validate(SamplingParams(structured=structured, max_tokens=90, thinking_budget=20))
    for other in (
        StructuredOutput(json_schema=SCHEMA),
        after_reasoning(StructuredOutput(json_schema=SCHEMA), THINKING),
    ):
        with pytest.raises(RequestError, match="no thinking before it"):
            target.validate(SamplingParams(structured=other, max_tokens=90, thinking_budget=20))


def test_outside_and_markers_are_checked() -> None:
    for fields in ({"outside": ("a", "")}, {"outside": "ab"}, {"markers": "ab"}, {"markers": [1]}):
        with pytest.raises(RequestError, match=f"structured.{next(iter(fields))}"):
            asked(choice=["a"], **fields)

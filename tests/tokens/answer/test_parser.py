"""Any chunking gives the same message, nothing is lost, and what a template prints is read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.core import Message, ToolCall
from gristmill.tokens.answer.detect import detect
from gristmill.tokens.answer.formats import HERMES, LLAMA3, MISTRAL, QWEN_XML, AnswerFormat, CallStyle
from gristmill.tokens.answer.parser import AnswerParser
from gristmill.tokens.answer.reader import CallArguments, CallBegan, Content, Event, Reasoning
from tokens.answer.families import FAMILIES, QUESTION, TOOLS, call, calling, renderer


@dataclass
class Answer:
    reasoning: str = ""
    content: str = ""
    calls: list[list[str]] = field(default_factory=list)
    """Id, name and arguments of each."""

    @property
    def named(self) -> list[tuple[str, str]]:
        return [(name, arguments) for _, name, arguments in self.calls]

    def add(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case Reasoning(text):
                    self.reasoning += text
                case Content(text):
                    self.content += text
                case CallBegan(index, call_id, name):
                    assert index == len(self.calls)
                    self.calls.append([call_id, name, ""])
                case CallArguments(index, text):
                    assert index == len(self.calls) - 1
                    self.calls[index][2] += text


def parse(
    form: AnswerFormat,
    pieces: Sequence[str],
    tools: Sequence[Mapping[str, Any]] | None = TOOLS,
    opened: bool = False,
) -> Answer:
    answer = Answer()
    parser = AnswerParser(form, tools=tools, opened=opened, new_id=lambda: "made")
    for piece in pieces:
        answer.add(parser.feed(piece))
    answer.add(parser.finish())
    return answer


FORMS = [AnswerFormat(style).thinking() for style in CallStyle]
BITS = [
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>"),
    *("<function=find>", "<parameter=place>", "<parameter=count>", "</parameter>", "</function>", "<", "[", "]", ";"),
    *(
        '{"name": "find", "arguments": {',
        '{"name": "find", "parameters": {',
        '"place": "a',
        '"count": 3',
        "}",
        "{",
        '"',
    ),
    *(
        "\\",
        '\\"',
        "\\u00e9",
        "é😀",
        "\n",
        " ",
        "find",
        "nothing",
        ",",
        ", ",
        ":",
        "12",
        "true",
        '"name": "now"',
        "\x01",
    ),
    '{"arguments": {"tags": ["}", {"x": "{\\"<tool_call>"}]}, "name": "find"}',
    '<tool_call>\n{"name": "find", "arguments": {"place": "</tool_call>"}}\n</tool_call>',
    '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"name": "find", "arguments": {"count": 1}}]',
    '[TOOL_CALLS]find[ARGS]{"count": 1}',
    "<tool_call>\n<function=find>\n<parameter=place>\nMill\n</parameter>\n</function>\n</tool_call>",
]
texts = st.lists(st.sampled_from(BITS), max_size=14).map("".join)


@settings(max_examples=400)
@given(st.sampled_from(FORMS), texts, st.lists(st.integers(1, 9), min_size=1, max_size=6), st.booleans())
def test_any_chunking_gives_the_same_message(form: AnswerFormat, text: str, sizes: list[int], opened: bool) -> None:
    pieces: list[str] = []
    at = 0
    while at < len(text):
        pieces.append(text[at : at + sizes[len(pieces) % len(sizes)]])
        at += len(pieces[-1])
    assert parse(form, pieces, opened=opened) == parse(form, [text], opened=opened)


@settings(max_examples=400)
@given(st.sampled_from(FORMS), texts)
def test_without_calls_and_reasoning_the_content_is_the_text(form: AnswerFormat, text: str) -> None:
    assert parse(form, [text], tools=()).calls == []
    answer = parse(form, [text])
    if not answer.calls and not text.lstrip().startswith("<think>"):
        assert answer == Answer(content=text)


@settings(max_examples=300)
@given(st.sampled_from(FORMS), texts)
def test_every_letter_of_a_call_or_content_was_written(form: AnswerFormat, text: str) -> None:
    """What comes out, letters only, is a subsequence of what went in; only frames and names are left out."""
    answer = parse(form, [text])
    written = iter(text)
    assert all(letter in written for letter in answer.content if letter not in answer.reasoning)
    for name, arguments in answer.named:
        assert name in ("find", "now", "set_title")
        assert form.calls is CallStyle.QWEN_XML or all(c in text for c in arguments if c.isalpha() and c.isascii())


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**60), 2**60), st.floats(-9, 9), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
arguments_of: dict[str, st.SearchStrategy[Any]] = {
    "place": st.text(max_size=12) | st.sampled_from(["</tool_call>", '"}', "{[", "\\", "<tool_call>", "5", "true"]),
    "count": st.integers(-5, 5),
    "where": st.dictionaries(st.text(max_size=3), json_values, max_size=3),
    "tags": st.lists(json_values, max_size=3),
    "deep": st.booleans(),
}
one_call = st.one_of(
    st.tuples(st.just("find"), st.fixed_dictionaries({}, optional=arguments_of)),
    st.just(("now", dict[str, Any]())),
    st.tuples(st.just("set_title"), st.fixed_dictionaries({"text": arguments_of["place"]})),
)
calls = st.lists(one_call, min_size=1, max_size=3).map(
    lambda made: [call(index, name, arguments) for index, (name, arguments) in enumerate(made)]
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60)
@given(calls, st.sampled_from(["", "Let me look.", "Ünicode: {"]))
def test_calls_are_read_back_from_what_the_template_prints(family: str, made: list[ToolCall], content: str) -> None:
    if family == "llama3.1":
        content = ""  # its template has calls or content
    message = calling(*made, content=content)
    text = renderer(family).answer_text([QUESTION, message], tools=TOOLS)
    answer = parse(detect(renderer(family)), [text])
    assert answer.content == content
    assert [name for name, _ in answer.named] == [one["function"]["name"] for one in made]
    assert [json.loads(read) for _, read in answer.named] == [json.loads(one["function"]["arguments"]) for one in made]
    read_calls = [call(i, name, json.loads(read)) for i, (name, read) in enumerate(answer.named)]
    if family.startswith("mistral"):
        assert [call_id for call_id, _, _ in answer.calls] == [one["id"] for one in made]
    again: list[Message] = [QUESTION, calling(*read_calls, content=answer.content), {**QUESTION, "content": "More?"}]
    assert renderer(family).render_prompt(again, tools=TOOLS) == renderer(family).render_prompt(
        [QUESTION, message, again[-1]], tools=TOOLS
    )


CALL = '<tool_call>\n{"name": "find", "arguments": {"count": 1}}\n</tool_call>'
FOUND = [("find", '{"count": 1}')]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"Look:\n{CALL}\n{CALL}\n", "Look:", FOUND * 2),
        (f"  {CALL}", "", FOUND),
        (f"{CALL}\nDone. ", "\nDone. ", FOUND),
        ("<tool_call>oops</tool_call>", "<tool_call>oops</tool_call>", []),
        (f"a <tool_call>{{{CALL}", "a <tool_call>{", FOUND),
        ('<tool_call>{"name": "rm", "arguments": {}}</tool_call>', None, []),
        ('<tool_call>{"name": "find", "argum', None, []),
        ('<tool_call>{"name": "find", "arguments": "{}"}</tool_call>', None, []),
        ('<tool_call>{"name": "find", "extra": 1, "arguments": {}}', None, []),
        ('<tool_call>{"name": "find", "arguments": {"count": 1', "", [("find", '{"count": 1')]),
        (
            '<tool_call>{"name": "find", "arguments": {"count": 01}}</tool_call>',
            "}}</tool_call>",
            [("find", '{"count": 01')],
        ),
        ('<tool_call>{"name": "find", "arguments": {}, "b": 1}</tool_call>!', ', "b": 1}</tool_call>!', None),
        ('<tool_call>{"name": "find"}</tool_call>', "", [("find", "{}")]),
        ('<tool_call>{"arguments": {"count": 1}, "name": "find"}</tool_', "", FOUND),
        ('<tool_call>{"name": "find", "arguments": {"place": "a\nb"}}', "", [("find", '{"place": "a\\nb"}')]),
        ('<tool_call>{"name": "f\\u0069nd", "arguments": {"count": 1}} </tool_call> ', "", FOUND),
        (f"{CALL}<tool_call>", "<tool_call>", FOUND),
        ("a < b <tool_ <<tool_call", None, []),
        (CALL[:-12] + CALL, "", FOUND * 2),
        (CALL[:-11] + CALL, "\n<", FOUND * 2),
        (CALL[:-12] + "\n<b>", "\n\n<b>", FOUND),
        ("<tool_call>\n<" + CALL, "<tool_call>\n<", FOUND),
    ],
)
def test_what_is_no_call_is_content_as_it_was_written(
    text: str, content: str | None, calls: list[tuple[str, str]] | None
) -> None:
    answer = parse(HERMES, list(text))
    assert answer.content == (text if content is None else content)
    assert calls is None or answer.named == calls


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        (LLAMA3, '<|python_tag|>{"name": "now", "parameters": {}}; {"name": "now"}', "", [("now", "{}")] * 2),
        (LLAMA3, 'Hm {"name": "now", "parameters": {}}', 'Hm {"name": "now", "parameters": {}}', []),
        (LLAMA3, '{"title": "x"}', '{"title": "x"}', []),
        (LLAMA3, '{"name": "now"} and so on', " and so on", [("now", "{}")]),
        (MISTRAL, '[TOOL_CALLS] [{"name": "now", "arguments": {}}, {"na', ', {"na', [("now", "{}")]),
        (MISTRAL, "[TOOL_CALLS]rm[ARGS]{}", "[TOOL_CALLS]rm[ARGS]{}", []),
        (MISTRAL, 'a[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]find{"count": 1}', 'a[TOOL_CALLS]find{"count": 1}', None),
        (QWEN_XML, "<tool_call>\n<function=now>\n</function>", "", [("now", "{}")]),
        (QWEN_XML, "<tool_call><function=rm></function></tool_call>", None, []),
        (QWEN_XML, "<tool_call><function=find><parameter=place>a\n</", "", [("find", '{"place": "a')]),
        (QWEN_XML, "<tool_call><function=find>x</function>", "x</function>", [("find", "")]),
    ],
)
def test_other_styles(form: AnswerFormat, text: str, content: str | None, calls: list[tuple[str, str]] | None) -> None:
    answer = parse(form, list(text))
    assert answer.content == (text if content is None else content)
    assert calls is None or answer.named == calls


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("place", "5", "5"),
        ("place", 'a "b"\n', 'a "b"\n'),
        ("count", "5", 5),
        ("count", "many", "many"),
        ("deep", "True", True),
        ("tags", '["a", {"b": 1.50}]', ["a", {"b": 1.5}]),
        ("other", "[1]", [1]),
        ("other", "one", "one"),
        ("where", "NaN", "NaN"),
    ],
)
def test_xml_arguments_have_the_type_that_the_tool_declares(key: str, written: str, value: object) -> None:
    text = f"<tool_call>\n<function=find>\n<parameter={key}>\n{written}\n</parameter>\n</function>\n</tool_call>"
    ((_, arguments),) = parse(QWEN_XML, [text]).named
    assert json.loads(arguments) == {key: value}


THINKING = HERMES.thinking()


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("<think>\nHm.\n</think>\n\nYes", False, "Hm.", "Yes"),
        ("Hm.\n</think>\n\nYes", True, "Hm.", "Yes"),
        ("<think>\n\n</think>\n\nYes\n", False, "", "Yes\n"),
        ("<think>\nHm\n\nso </thi", False, "Hm\n\nso </thi", ""),
        ("Yes <think>no</think>", False, "", "Yes <think>no</think>"),
        ("\n<think>a<tool_call>{</think>b", False, "a<tool_call>{", "b"),
        ("<think>a</think><think>b</think>", False, "a", "<think>b</think>"),
    ],
)
def test_reasoning_is_told_from_content(text: str, opened: bool, reasoning: str, content: str) -> None:
    answer = parse(THINKING, list(text), opened=opened)
    assert (answer.reasoning, answer.content, answer.calls) == (reasoning, content, [])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("end", ["<|im_end|>", "</s>"])
@pytest.mark.parametrize("body", ["Yes", "Yes ", "<think>a</think>b", "<think>a", CALL, CALL[:-12], "a <", "a </s> b"])
def test_the_token_that_ends_the_answer_is_no_part_of_it(form: AnswerFormat, end: str, body: str) -> None:
    expected = parse(form, [body])
    answer, parser = Answer(), AnswerParser(form, tools=TOOLS, ends=["<|im_end|>", "</s>"], new_id=lambda: "made")
    for char in body + end:
        answer.add(parser.feed(char))
    answer.add(parser.finish())
    assert answer == expected


def test_reasoning_is_content_when_nobody_asks_for_it() -> None:
    parser = AnswerParser(THINKING, reasoning=False)
    assert [*parser.feed("<think>a</think>b"), *parser.finish()] == [Content("<think>a</think>b")]


def test_a_call_after_reasoning() -> None:
    answer = parse(THINKING, list(f"<think>\nHm.\n</think>\n\n{CALL}"))
    assert (answer.reasoning, answer.content, answer.named) == ("Hm.", "", FOUND)


def test_text_comes_as_soon_as_it_can_be_nothing_else() -> None:
    parser = AnswerParser(THINKING, tools=TOOLS, new_id=lambda: "x")
    assert parser.feed("<thi") == []
    assert parser.feed("nk>\nHm") == [Reasoning("Hm")]
    assert parser.feed("m</think>Yes <tool_c") == [Reasoning("m"), Content("Yes")]
    assert parser.feed("all>\n{") == []
    assert parser.feed('"name": "find", "arguments": {"pl') == [CallBegan(0, "x", "find"), CallArguments(0, '{"pl')]
    assert parser.feed('ace": 1}') == [CallArguments(0, 'ace": 1}')]
    assert [*parser.feed("}</tool_call>"), *parser.finish()] == []


def test_made_ids_are_nine_letters_and_digits_and_differ() -> None:
    parser = AnswerParser(HERMES)
    made = [event.id for event in parser.feed(CALL * 5) if isinstance(event, CallBegan)]
    assert len(set(made)) == 5
    assert all(len(one) == 9 and one.isalnum() and one.isascii() for one in made)


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "find", "arguments": {"a": ' + "[" * 50_000,
        '<tool_call>{"a":' * 3_000,
        " " * 50_000 + "<" * 50_000,
        "<tool_call>\n<function=find><parameter=tags>" + "9" * 50_000 + "\n</parameter>",
    ],
)
def test_hostile_answers_neither_crash_nor_vanish(text: str) -> None:
    for form in FORMS:
        answer = parse(form, [text])
        assert len(answer.content) + sum(len(arguments) for _, arguments in answer.named) > len(text) - 60

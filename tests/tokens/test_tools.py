"""Conversations with tools, reasoning, a developer, and an answer that is to be continued."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest

from gristmill.core import Message
from gristmill.errors import DataError
from gristmill.tokens.answer.detect import detect
from gristmill.tokens.answer.formats import CallStyle
from gristmill.tokens.answer.parser import AnswerParser
from gristmill.tokens.answer.reader import CallArguments, CallBegan
from gristmill.tokens.renderer import JinjaRenderer
from gristmill.tokens.templates import CHATML
from tokens.answer.families import FAMILIES, QUESTION, QWEN3, TOOLS, call, calling, renderer
from tokens.formats import BY_NAME, SMOLLM2

PLAIN = JinjaRenderer(BY_NAME["smollm2"].tokenizer)
ASKED = calling(call(1, "find", {"place": "Mill", "count": 2}))
RESULT: Message = {"role": "tool", "content": "forty-one", "tool_call_id": "abcDEF121"}
ROUND: list[Message] = [QUESTION, ASKED, RESULT]
STYLES = {
    "qwen3": CallStyle.HERMES,
    "qwen_coder": CallStyle.QWEN_XML,
    "llama3.1": CallStyle.LLAMA3,
    "mistral": CallStyle.MISTRAL,
    "mistral_args": CallStyle.MISTRAL_ARGS,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_format_is_found_from_what_the_template_prints(family: str) -> None:
    found = detect(renderer(family))
    assert found.calls is STYLES[family]
    assert found.reasoning == (("<think>", "</think>") if family == "qwen3" else None)


@pytest.mark.parametrize("family", FAMILIES)
def test_tools_calls_and_results_are_printed_and_begin_the_prompt_of_the_next_answer(family: str) -> None:
    assert renderer(family).knows_tools
    text = renderer(family).prompt_text(ROUND, TOOLS).text
    for part in ("Does find.", "Mill", "forty-one"):
        assert part in text
    before = renderer(family).prompt_text([QUESTION], TOOLS).text
    assert text.startswith(before)
    # objects, not JSON text inside JSON
    assert '\\"place\\"' not in text


def test_the_prompt_with_tools_is_a_prefix_of_what_is_learned() -> None:
    answer: Message = {"role": "assistant", "content": "Forty-one."}
    for one in (renderer("qwen3"), renderer("llama3.1"), PLAIN):
        rendered = one.render([*ROUND, answer], tools=TOOLS)
        prompt = one.render_prompt(ROUND, tools=TOOLS)
        assert rendered.token_ids[: len(prompt)] == prompt
        assert sum(rendered.loss_mask[: len(prompt)]) > 0
        learned = [token for token, mask in zip(rendered.token_ids, rendered.loss_mask, strict=True) if mask]
        assert '"find"' in one.tokenizer.decode(learned)


def test_a_template_without_tools_gets_them_in_hermes_form() -> None:
    assert not PLAIN.knows_tools
    assert detect(PLAIN).calls is CallStyle.HERMES
    system: Message = {"role": "system", "content": "Be brief."}
    text = PLAIN.prompt_text([system, *ROUND], TOOLS).text
    assert text.startswith("<|im_start|>system\nBe brief.\n\n")
    assert text.count("<|im_start|>system") == 1
    assert '{"type": "function", "function": {"name": "find"' in text
    assert '<tool_call>\n{"name": "find", "arguments": {"place": "Mill", "count": 2}}\n</tool_call><|im_end|>' in text
    assert text.endswith("user\n<tool_response>\nforty-one\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    parser = AnswerParser(detect(PLAIN), tools=TOOLS, new_id=lambda: "x")
    written = PLAIN.answer_text([QUESTION, ASKED], tools=TOOLS)
    assert parser.feed(written) == [CallBegan(0, "x", "find"), CallArguments(0, '{"place": "Mill", "count": 2}')]
    assert PLAIN.prompt_text([QUESTION]).text == PLAIN.prompt_text([QUESTION], []).text


def test_messages_keep_their_numbers_when_a_system_message_is_put_first() -> None:
    lost = JinjaRenderer(BY_NAME["qwen2.5"].tokenizer)
    with pytest.raises(DataError, match="message 1: the chat template leaves out the role 'narrator'"):
        lost.render_prompt([QUESTION, {"role": "narrator", "content": "Night."}], tools=TOOLS)


def test_a_developer_is_the_system_where_the_template_knows_none() -> None:
    developer: Message = {"role": "developer", "content": "Be brief."}
    as_system: Message = {**developer, "role": "system"}
    for name in ("smollm2", "chatml", "llama3"):
        one = JinjaRenderer(BY_NAME[name].tokenizer)
        assert one.render_prompt([developer, QUESTION]) == one.render_prompt([as_system, QUESTION])
    knows = JinjaRenderer(PLAIN.tokenizer, CHATML.replace("'tool']", "'tool', 'developer']"))
    assert "<|im_start|>developer\nBe brief." in knows.prompt_text([developer, QUESTION]).text


@pytest.mark.parametrize("content", ["Forty", "Forty ", "\nForty\n\n", "s"])
def test_a_continued_answer_is_left_open(content: str) -> None:
    begun: Message = {"role": "assistant", "content": content}
    for one in (PLAIN, renderer("llama3.1"), JinjaRenderer(BY_NAME["gemma"].tokenizer)):
        text = one.prompt_text([QUESTION, begun], continue_final=True).text
        assert text.startswith(one.prompt_text([QUESTION]).text)
        assert text.endswith(content.lstrip())
        assert one.render_prompt([QUESTION, begun], continue_final=True) != one.render_prompt([QUESTION, begun])


@pytest.mark.parametrize("messages", [[QUESTION], [QUESTION, ASKED], [QUESTION, {"role": "assistant", "content": " "}]])
def test_only_an_answer_with_content_can_be_continued(messages: list[Message]) -> None:
    with pytest.raises(DataError, match="continue_final needs"):
        renderer("qwen3").render_prompt(messages, continue_final=True)


def test_template_options_reach_the_template_and_unknown_ones_are_refused() -> None:
    qwen3 = renderer("qwen3")
    form = detect(qwen3)
    closed = qwen3.prompt_text([QUESTION], template_options={"enable_thinking": False}).text
    assert closed == qwen3.prompt_text([QUESTION]).text + "<think>\n\n</think>\n\n"
    assert not form.opened_by(closed)
    for name in ("enable_thinkin", "messages", "tools"):
        with pytest.raises(DataError, match=f"template option '{name}' is not read.*enable_thinking"):
            qwen3.render_prompt([QUESTION], template_options={name: True})
    with pytest.raises(DataError, match="has no options"):
        PLAIN.render_prompt([QUESTION], template_options={"enable_thinking": True})


def test_a_prompt_that_opens_the_reasoning() -> None:
    opening = SMOLLM2.replace("<|im_start|>assistant\n' }}", "<|im_start|>assistant\n<think>\n' }}")
    one = JinjaRenderer(PLAIN.tokenizer, opening)
    form = detect(one)
    assert form.reasoning == ("<think>", "</think>")
    assert form.opened_by(one.prompt_text([QUESTION]).text)
    assert form.opened_by("", "<think>so")
    assert not form.opened_by("<think>", "<think>so</think>Yes")
    history: list[Message] = [QUESTION, {"role": "assistant", "content": "Two."}, QUESTION]
    assert one.tokenizer.decode(one.render_prompt(history), skip_special_tokens=False) == one.prompt_text(history).text
    with pytest.raises(DataError, match="not prefix-preserving"):
        one.render(history[:2])


def test_reasoning_is_learned_or_refused_and_dropped_from_history_where_the_template_does() -> None:
    thoughtful: Message = {"role": "assistant", "content": "Two.", "reasoning_content": "Count."}
    rendered = renderer("qwen3").render([QUESTION, thoughtful])
    learned = [token for token, mask in zip(rendered.token_ids, rendered.loss_mask, strict=True) if mask]
    assert renderer("qwen3").tokenizer.decode(learned) == "<think>\nCount.\n</think>\n\nTwo."
    assert "Count." not in renderer("qwen3").prompt_text([QUESTION, thoughtful, QUESTION]).text
    with pytest.raises(DataError, match="message 1: the chat template leaves out reasoning_content"):
        PLAIN.render([QUESTION, thoughtful])


def test_content_beside_calls_is_refused_where_the_template_drops_it() -> None:
    with pytest.raises(DataError, match="message 1: the chat template leaves out the content beside tool calls"):
        renderer("llama3.1").render_prompt([QUESTION, {**ASKED, "content": "Let me look."}, RESULT], tools=TOOLS)


def test_a_name_is_printed_or_refused() -> None:
    named: Message = {**QUESTION, "name": "Ada"}
    with pytest.raises(DataError, match="message 0: the chat template leaves out the field 'name'"):
        PLAIN.render_prompt([named])
    prints = CHATML.replace(
        "message['role'] + '\n'", "message['role'] + (' ' ~ message.name if message.name else '') + '\n'"
    )
    assert "user Ada\n" in JinjaRenderer(PLAIN.tokenizer, prints).prompt_text([named]).text
    assert PLAIN.render_prompt([QUESTION, ASKED, {**RESULT, "name": "find"}])


def wrong(**fields: Any) -> Message:
    return cast("Message", {**ASKED, **fields})


def a_call(**fields: Any) -> dict[str, Any]:
    return {**call(1, "find", {}), **fields}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (wrong(tool_calls=[]), "field 'tool_calls' must be a list"),
        (wrong(tool_calls="x"), "field 'tool_calls' must be a list"),
        (wrong(tool_calls=["x"]), r"field 'tool_calls\[0\]' must have exactly id, type, function"),
        (wrong(tool_calls=[a_call(index=0)]), r"field 'tool_calls\[0\]' must have exactly"),
        (wrong(tool_calls=[a_call(id=3)]), r"field 'tool_calls\[0\].id' must be text"),
        (wrong(tool_calls=[a_call(type="custom")]), r"field 'tool_calls\[0\].type' must be 'function'"),
        (wrong(tool_calls=[a_call(function={"name": "f"})]), r"field 'tool_calls\[0\].function' must have exactly"),
        (
            wrong(tool_calls=[a_call(function={"name": "f", "arguments": "[1]"})]),
            r"field 'tool_calls\[0\].function.arguments' must be the text of a JSON object",
        ),
        (
            wrong(tool_calls=[a_call(function={"name": "f", "arguments": '{"a": NaN}'})]),
            r"field 'tool_calls\[0\].function.arguments' must be the text of a JSON object",
        ),
        (wrong(role="user"), "only the role assistant has the field 'tool_calls'"),
        (wrong(reasoning_content=3), "field 'reasoning_content' must be text"),
        (wrong(tool_cals=[]), "field 'tool_cals' is not supported. Did you mean tool_calls"),
        (cast("Message", {**RESULT, "tool_call_id": "other"}), "tool_call_id 'other' is the id of no call before it"),
    ],
)
def test_fields_are_checked_by_name(message: Message, reason: str) -> None:
    with pytest.raises(DataError, match=f"message 1: {reason}"):
        renderer("qwen3").render_prompt([QUESTION, message])


def test_no_field_can_smuggle_a_special_token_in() -> None:
    for hidden in ('{"a": "\\u003c|im_end|>"}', '{"<|im_end|>": 1}'):
        message = wrong(tool_calls=[a_call(function={"name": "f", "arguments": hidden})])
        with pytest.raises(DataError, match="message 1: tool_calls spells the special token"):
            PLAIN.render_prompt([QUESTION, message])
    with pytest.raises(DataError, match=r"tools\[0\] spells the special token"):
        PLAIN.render_prompt([QUESTION], tools=[{"name": "f", "description": "<|im_end|>"}])


@pytest.mark.parametrize("tools", [[{}], [{"name": "f"}, {"name": "f"}], ["f"], [{"function": {"name": 3}}]])
def test_tools_need_names_of_their_own(tools: list[Any]) -> None:
    with pytest.raises(DataError, match=r"tools\[\d\] needs a function with a name"):
        PLAIN.render_prompt([QUESTION], tools=tools)


@pytest.mark.peer
def test_prints_what_transformers_prints() -> None:
    """Its templates get the same names, and its tojson keeps letters as they are."""
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = [dict(message) for message in ROUND]
    turns[1]["tool_calls"] = [
        {**call(1, "f", {}), "function": {"name": "find", "arguments": {"place": "Mühle", "count": 2}}}
    ]
    ours: list[Message] = [QUESTION, calling(call(1, "find", {"place": "Mühle", "count": 2})), RESULT]
    for name, family in FAMILIES.items():
        tokens = {"bos_token": family.bos, "eos_token": family.eos}
        texts, _ = render_jinja_template([turns], TOOLS, None, family.template, add_generation_prompt=True, **tokens)
        assert renderer(name).prompt_text(ours, TOOLS).text == texts[0]


def test_an_unknown_form_of_calls_is_unknown() -> None:
    odd = QWEN3.replace("<tool_call>", "<invoke>").replace("</tool_call>", "</invoke>")
    found = detect(JinjaRenderer(dataclasses.replace(renderer("qwen3").tokenizer, chat_template=odd)))
    assert found.calls is None
    assert found.reasoning == ("<think>", "</think>")

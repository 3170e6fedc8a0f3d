"""Which format a model's answers have, from what its chat template prints."""

from __future__ import annotations

import json
import re
from typing import cast

from gristmill.core import Message
from gristmill.errors import DataError
from gristmill.tokens.answer.formats import AnswerFormat, CallStyle
from gristmill.tokens.answer.parser import AnswerParser
from gristmill.tokens.answer.reader import CallArguments, CallBegan
from gristmill.tokens.probes import CALLING, TOOL
from gristmill.tokens.renderer import JinjaRenderer

_OPENED = re.compile(r"<(\w+)>\s*\Z")
_THOUGHT = "Count them."


def detect(renderer: JinjaRenderer) -> AnswerFormat:
    """The style whose reader understands the call that the template prints (calls is None where none does), and the
    markers that it prints around reasoning, or that end a prompt, or else `<think>` where the vocabulary has it."""
    reasoning = _reasoning(renderer)
    return AnswerFormat(_call_style(renderer, reasoning), reasoning)


def _call_style(renderer: JinjaRenderer, reasoning: tuple[str, str] | None) -> CallStyle | None:
    question, call, _ = CALLING
    function = call["tool_calls"][0]["function"]
    written = {"name": function["name"], "arguments": json.dumps(function["arguments"])}
    asked = cast("list[Message]", [question, {**call, "tool_calls": [{**call["tool_calls"][0], "function": written}]}])
    try:
        text = renderer.answer_text(asked, tools=[TOOL])
    except DataError:
        return None
    styles = [CallStyle.QWEN_XML, CallStyle.HERMES, CallStyle.LLAMA3]
    styles.append(CallStyle.MISTRAL_ARGS if "[ARGS]" in text else CallStyle.MISTRAL)
    for style in styles:
        parser = AnswerParser(AnswerFormat(style, reasoning), tools=[TOOL])
        events = [*parser.feed(text.strip()), *parser.finish()]
        match events:
            case [CallBegan(_, _, name), CallArguments(_, arguments)] if name == function["name"]:
                if json.loads(arguments) == function["arguments"]:
                    return style
    return None


def _reasoning(renderer: JinjaRenderer) -> tuple[str, str] | None:
    question = cast("list[Message]", CALLING[:1])
    thoughtful: Message = {"role": "assistant", "content": "One.", "reasoning_content": _THOUGHT}
    try:
        before, _, after = renderer.answer_text([*question, thoughtful]).partition(_THOUGHT)
        prompt = renderer.prompt_text(question).text
    except DataError:
        before, after, prompt = "", "", ""
    opening, closing = before.strip(), after.partition("One.")[0].strip()
    if all(marker and marker[0] not in marker[1:] for marker in (opening, closing)):
        return opening, closing
    if opened := _OPENED.search(prompt):
        return f"<{opened[1]}>", f"</{opened[1]}>"
    named = [renderer.tokenizer.id_of(token) for token in ("<think>", "</think>")]
    return None if None in named else ("<think>", "</think>")

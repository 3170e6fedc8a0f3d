"""How the answer to a chat request is asked for and read: its prompt, its parameters, its reasoning and calls."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gristmill.core import CompletionOutput, Message, SamplingParams
from gristmill.engine.constraints.calls import after_reasoning, calls_form
from gristmill.errors import RequestError
from gristmill.serve.hosted import Hosted, ServedModel
from gristmill.serve.wire.chat import ChatCompletionRequest, NamedTool, Tool
from gristmill.serve.wire.sampling import sampling_params
from gristmill.tokens.answer.formats import AnswerFormat
from gristmill.tokens.answer.parser import AnswerParser
from gristmill.tokens.answer.reader import CallBegan, Content, Event, Reasoning
from gristmill.tokens.tokenizer import Tokenizer

CALL_MARKERS = ("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
"""What the styles of tool calls write that may be a special token."""


@dataclass(frozen=True)
class ReadingPlan:
    """A rendered conversation, how to choose the answer's tokens, and how to read it."""

    tokenizer: Tokenizer
    form: AnswerFormat
    prompt: list[int]
    params: SamplingParams
    tools: Sequence[Mapping[str, Any]]
    """Those that may be called."""
    opened: bool
    """Whether the answer begins inside the reasoning."""
    shows_reasoning: bool
    """Whether the client gets it."""
    shows_special: bool
    """Whether the client gets special tokens as text."""

    @property
    def reasons(self) -> bool:
        """Whether the answer may hold reasoning."""
        return self.form.reasoning is not None

    @cached_property
    def dropped(self) -> Sequence[str]:
        """Special tokens that the client does not get as text, longest first: all but those that mark its parts."""
        kept = {"", *CALL_MARKERS, *(self.form.reasoning or ())}
        stops = (self.tokenizer.token_of(index) for index in self.params.stop_token_ids or ())
        return sorted({*self.tokenizer.special_tokens, *(name for name in stops if name)} - kept, key=len, reverse=True)

    @property
    def is_plain(self) -> bool:
        """Whether all of an answer is content."""
        return not self.reasons and not self.tools

    def reasoning_tokens(self, output: CompletionOutput) -> int:
        """How many of an answer's tokens are reasoning, its markers included."""
        if self.form.reasoning is None:
            return 0
        opening, closing = ([*self.tokenizer.encode(marker, add_bos=False)] for marker in self.form.reasoning)
        if not self.opened and output.token_ids[: len(opening)] != opening:
            return 0
        ids, width = output.token_ids, len(closing)
        ends = (place + width for place in range(len(ids)) if ids[place : place + width] == closing)
        return next(ends, len(ids))


def plan_reading(hosted: Hosted, request: ChatCompletionRequest) -> ReadingPlan:
    """Render the conversation and settle what the request and the model's chat template together ask for.

    Raises DataError for a conversation that the template cannot render, RequestError for what does not go together.
    """
    model, form = hosted.generator, hosted.answer_form
    values = request.sampling_values()
    options = dict(request.chat_template_kwargs or {})
    if form.reasoning is None:
        _refuse_thinking(request, hosted.name)
    tools = [] if request.tool_choice == "none" else [_plain(tool) for tool in request.tools or ()]
    messages = request.conversation()
    continues = bool(request.continue_final_message)
    prompt = model.renderer.prompt_text(messages, tools, continues, options)
    opened = form.opened_by(prompt.text, messages[-1]["content"] if continues else "")
    ids = model.renderer.encode_prompt(prompt)
    params = sampling_params(values)
    if form.reasoning is not None:
        opening, closing = form.reasoning
        if params.limits_thinking:
            params = dataclasses.replace(params, think_end=closing)
            if not opened and not continues:  # a budget counts from the beginning of the reasoning
                ids, opened = [*ids, *model.tokenizer.encode(opening, add_bos=False)], True
    params = _held_to_form(params, request, form, tools, opened)
    # The tokenizer's own end of sequence can be another one than the template's: the model would talk on.
    params = params.ending_at(model.renderer.stop_token_ids)
    plan = ReadingPlan(
        tokenizer=model.tokenizer,
        form=form,
        prompt=ids,
        params=params,
        tools=tools,
        opened=opened,
        shows_reasoning=request.include_reasoning is not False,
        shows_special=not params.skip_special_tokens,
    )
    if plan.is_plain:
        return plan
    return dataclasses.replace(plan, params=dataclasses.replace(params, skip_special_tokens=False))


def _held_to_form(
    params: SamplingParams,
    request: ChatCompletionRequest,
    form: AnswerFormat,
    tools: Sequence[Mapping[str, Any]],
    opened: bool,
) -> SamplingParams:
    """With the form that tools and formats ask for, and stop strings and form after the reasoning, not within."""
    if tools:
        if params.structured is not None:
            field = "structured_outputs" if request.structured_outputs is not None else "response_format"
            raise RequestError(f"{field} leaves no room for tool calls: give it without tools", field=field)
        choice = request.tool_choice.model_dump() if isinstance(request.tool_choice, NamedTool) else request.tool_choice
        calls = calls_form(form, tools, choice or "auto", parallel=request.parallel_tool_calls is not False)
        params = dataclasses.replace(params, structured=calls)
    if form.reasoning is None:
        return params
    opening, closing = form.reasoning
    if params.structured is not None:
        params = dataclasses.replace(params, structured=after_reasoning(params.structured, form, opened=opened))
    if params.stop_strings:
        params = dataclasses.replace(params, stop_outside=("" if opened else opening, closing))
    return params


def render_conversation(
    model: ServedModel,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> list[int]:
    """The ids of a conversation, up to where the answer begins.

    Raises DataError for one that the template cannot render and for options that it does not read.
    """
    plain = [_plain(tool) for tool in tools or ()]
    return model.renderer.render_prompt(messages, tools=plain, template_options=template_options)


def _plain(tool: Tool) -> dict[str, Any]:
    """As chat templates take it."""
    return tool.model_dump(exclude_none=True)


def _refuse_thinking(request: ChatCompletionRequest, name: str) -> None:
    for field in ("reasoning_effort", "thinking_budget", "min_thinking_tokens", "think_waits"):
        value = getattr(request, field)
        if value is not None and value != "none":
            raise RequestError(f"{name} does not reason before it answers", field=field)


class AnswerReader:
    """Takes one answer apart while it grows."""

    def __init__(self, plan: ReadingPlan) -> None:
        self._read = 0
        self._parser = None
        if not plan.is_plain:
            self._parser = AnswerParser(plan.form, tools=plan.tools, opened=plan.opened)
        self._special = None if plan.is_plain or plan.shows_special else _SpecialTokens(plan.dropped)
        self._shows_reasoning = plan.shows_reasoning
        self.called_tools = False
        self.ended = False

    def read(self, output: CompletionOutput) -> list[Event]:
        """What is new since the last call."""
        piece = output.text[self._read :]
        self._read = len(output.text)
        self.ended = output.finish_reason is not None
        if self._parser is None:
            return [Content(piece)] if piece else []
        if self._special is not None:
            piece = self._special.drop(piece, last=self.ended)
        events = self._parser.feed(piece)
        if self.ended:
            events += self._parser.finish()
        self.called_tools = self.called_tools or any(isinstance(each, CallBegan) for each in events)
        return [each for each in events if self._shows_reasoning or not isinstance(each, Reasoning)]


class _SpecialTokens:
    """Drops special tokens from a text that comes in pieces."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._first = frozenset(name[0] for name in names)
        self._pattern = re.compile("|".join(map(re.escape, names))) if names else None
        self._held = ""

    def drop(self, piece: str, *, last: bool) -> str:
        """The piece without them; an end that may be the beginning of one waits for the next piece."""
        if self._pattern is None:
            return piece
        text = self._pattern.sub("", self._held + piece)
        begun = 0
        if not last:
            # there may be a thousand names, and this is asked of every token
            lengths = (n for n in range(min(len(text), len(self._names[0])), 0, -1) if text[-n] in self._first)
            begun = next((n for n in lengths if any(name.startswith(text[-n:]) for name in self._names)), 0)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun]

"""The responses interface on top of chat: items become messages, and an answer's events become items again."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from gristmill.serve.errors import ApiError
from gristmill.serve.wire.answers import FinishReason, TokenLogprob, Usage
from gristmill.serve.wire.chat import ChatCompletionRequest
from gristmill.serve.wire.responses import (
    EventType,
    FunctionCallItem,
    FunctionCallOutputItem,
    IncompleteDetails,
    InputDetails,
    InputText,
    Item,
    ItemStatus,
    MessageItem,
    OutputDetails,
    OutputItem,
    OutputText,
    ReasoningItem,
    Response,
    ResponseEvent,
    ResponseFailure,
    ResponseRequest,
    ResponseUsage,
    SaidText,
    SchemaFormat,
)
from gristmill.tokens.answer.reader import CallArguments, CallBegan, Content, Event, Reasoning

FIELDS: Mapping[str, str] = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "structured_outputs": "text.format",
    "reasoning_effort": "reasoning.effort",
    "thinking_budget": "reasoning.effort",
    "logprobs": "include",
}
"""What fields of chat are called here."""


def items_of(request: ResponseRequest) -> list[Item]:
    """The input as items."""
    return [MessageItem(role="user", content=request.input)] if isinstance(request.input, str) else request.input


def chat_request(request: ResponseRequest, items: Sequence[Item]) -> ChatCompletionRequest:
    """The request that chat has for these items, which are those of former responses too.

    Raises ApiError 400 for what chat does not have.
    """
    fields: dict[str, Any] = {
        "model": request.model,
        "messages": messages_of(items, request.instructions),
        "max_completion_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "priority": request.priority,
        "stream": request.stream,
        "parallel_tool_calls": request.parallel_tool_calls if request.tools else None,
        "reasoning_effort": request.reasoning.effort if request.reasoning else None,
        "logprobs": bool(request.include) or None,
        "top_logprobs": request.top_logprobs if request.include else None,
    }
    if request.top_logprobs and not request.include:
        raise ApiError(
            400, "top_logprobs needs include to ask for logprobs", param="top_logprobs", code="invalid_value"
        )
    if request.tools:
        if request.include:
            raise ApiError(400, "include gives no logprobs beside tools", param="include", code="invalid_value")
        definitions = [tool.model_dump(exclude={"type"}, exclude_none=True) for tool in request.tools]
        fields["tools"] = [{"type": "function", "function": definition} for definition in definitions]
    choice = request.tool_choice
    if choice is not None and (request.tools or choice not in ("auto", "none")):
        fields["tool_choice"] = (
            choice if isinstance(choice, str) else {"type": "function", "function": {"name": choice.name}}
        )
    if request.text is not None and (form := request.text.format) is not None:
        spelled = form.model_dump(exclude_none=True, by_alias=True)
        kind = spelled.pop("type")
        fields["response_format"] = {"type": kind, **({kind: spelled} if isinstance(form, SchemaFormat) else {})}
    try:
        return ChatCompletionRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = FIELDS.get(str(first["loc"][0]), str(first["loc"][0])) if first["loc"] else None
        raise ApiError(400, f"{name}: {first['msg']}", param=name, code="invalid_value") from error


def messages_of(items: Iterable[Item], instructions: str | None) -> list[dict[str, Any]]:
    """Chat messages. What the assistant thinks, says and calls in a row is one message, and so are the instructions and
    what the system says at the beginning."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions is not None else []
    for item in items:
        last = messages[-1] if messages and messages[-1]["role"] == "assistant" else {}
        if isinstance(item, ReasoningItem):
            if last.keys() != {"role"}:
                messages.append({"role": "assistant"})
            thought = "".join(part.text for part in item.content or ())
            messages[-1]["reasoning_content"] = messages[-1].get("reasoning_content", "") + thought
        elif isinstance(item, FunctionCallItem):
            if not last:
                messages.append({"role": "assistant"})
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
        elif isinstance(item, FunctionCallOutputItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        elif item.role == "assistant":
            if not last or "content" in last or "tool_calls" in last:
                messages.append({"role": "assistant"})
            messages[-1]["content"] = _text(item.content)
        elif item.role in ("system", "developer") and len(messages) == 1 and messages[0]["role"] == "system":
            messages[0]["content"] += "\n\n" + _text(item.content)
        else:
            messages.append({"role": item.role, "content": _text(item.content)})
    for message in messages:
        if message.keys() <= {"role", "reasoning_content"} and message["role"] == "assistant":
            message["content"] = ""  # it thought and said nothing
    return messages


def _text(content: str | Sequence[InputText | SaidText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def new_response(request: ResponseRequest, model: str) -> Response:
    """The response of this model before it has an answer."""
    text = request.text.format if request.text and request.text.format else None
    return Response(
        id=f"resp_{uuid.uuid4().hex}",
        object="response",
        created_at=int(time.time()),
        completed_at=None,
        status="in_progress",
        background=False,
        error=None,
        incomplete_details=None,
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        metadata=request.metadata or {},
        model=model,
        output=[],
        parallel_tool_calls=request.parallel_tool_calls is not False,
        previous_response_id=request.previous_response_id,
        reasoning={"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
        service_tier="default",
        store=request.store is not False,
        temperature=1.0 if request.temperature is None else request.temperature,
        text={"format": text.model_dump(by_alias=True, exclude_none=True) if text else {"type": "text"}},
        tool_choice=request.tool_choice or "auto",
        tools=[
            {"description": None, "parameters": None, "strict": None, **t.model_dump()} for t in request.tools or ()
        ],
        top_logprobs=request.top_logprobs or 0,
        top_p=1.0 if request.top_p is None else request.top_p,
        truncation="disabled",
        usage=None,
    )


@dataclass
class _Open:
    """The item that grows."""

    type: Literal["message", "reasoning", "function_call"]
    id: str
    call: CallBegan | None = None
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None

    def part(self, text: str) -> OutputText:
        """Of a message or of reasoning."""
        if self.type == "reasoning":
            return OutputText(type="reasoning_text", text=text)
        part = OutputText(type="output_text", text=text, annotations=[])
        if self.logprobs is not None:
            part.logprobs = list(self.logprobs) if text else []
        return part

    def item(self, status: ItemStatus) -> OutputItem:
        """As it is now; without text while it is in progress."""
        text = "" if status == "in_progress" else "".join(self.pieces)
        item = OutputItem(id=self.id, type=self.type, status=status)
        if self.call is not None:
            item.call_id, item.name, item.arguments = self.call.id, self.call.name, text
            return item
        item.content = [] if status == "in_progress" else [self.part(text)]
        if self.type == "message":
            item.role = "assistant"
        else:
            item.summary = []
        return item


class Assembly:
    """Makes items of an answer's events, and tells of it in events of its own; the numbers run on.

    White space between items belongs to none of them and is left out; before the text of the first item it stays.
    """

    def __init__(self, response: Response, *, logprobs: bool = False) -> None:
        self.response = response
        self._logprobs = logprobs
        self._open: _Open | None = None
        self._blank: list[str] = []
        self._places: list[TokenLogprob] = []
        self._number = 0

    def begin(self) -> Iterator[ResponseEvent]:
        """The first events."""
        yield self._event("response.created", response=self.response)
        yield self._event("response.in_progress", response=self.response)

    def take(self, events: Iterable[Event], logprobs: Sequence[TokenLogprob] = ()) -> Iterator[ResponseEvent]:
        """What comes next, with the log-probabilities of its tokens if they were asked for."""
        self._places += logprobs
        for each in events:
            if isinstance(each, Content):
                yield from self._say(each.text)
            elif isinstance(each, Reasoning):
                yield from self._enter("reasoning")
                yield from self._add("response.reasoning_text.delta", each.text)
            elif isinstance(each, CallBegan):
                yield from self._close("completed")
                yield from self._enter("function_call", each)
            else:
                assert isinstance(each, CallArguments)
                yield from self._add("response.function_call_arguments.delta", each.text)

    def finish(self, reason: FinishReason, usage: Usage) -> Iterator[ResponseEvent]:
        """The last events. An answer of nothing is a message without text."""
        whole = reason in ("stop", "tool_calls")
        if self._open is None and not self.response.output:
            blank = "".join(self._blank)
            yield from self._enter("message")
            if blank:
                yield from self._add("response.output_text.delta", blank)
        yield from self._close("completed" if whole else "incomplete")
        response = self.response
        response.status = "completed" if whole else "incomplete"
        if not whole:
            early: Literal["max_output_tokens", "content_filter"]
            early = "content_filter" if reason == "content_filter" else "max_output_tokens"
            response.incomplete_details = IncompleteDetails(reason=early)
        response.completed_at = int(time.time())
        response.usage = _usage(usage)
        yield self._event("response.completed" if whole else "response.incomplete", response=response)

    def fail(self, error: ApiError) -> ResponseEvent:
        """The last event, when the answer cannot be finished."""
        self.response.status = "failed"
        self.response.error = ResponseFailure(code="server_error", message=error.detail)
        return self._event("response.failed", response=self.response)

    def _say(self, text: str) -> Iterator[ResponseEvent]:
        if self._open is None or self._open.type != "message":
            self._blank.append(text)
            if not text.strip():
                return
            text = "".join(self._blank) if not self.response.output and self._open is None else text.lstrip()
            self._blank = []
            yield from self._enter("message")
        yield from self._add("response.output_text.delta", text)

    def _enter(
        self, kind: Literal["message", "reasoning", "function_call"], call: CallBegan | None = None
    ) -> Iterator[ResponseEvent]:
        """Make sure that an item of this kind grows."""
        if self._open is not None and self._open.type == kind:
            return
        yield from self._close("completed")
        self._blank = []
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        self._open = opened = _Open(kind, f"{prefix}_{uuid.uuid4().hex}", call)
        if kind == "message" and self._logprobs:
            opened.logprobs = []
        place = len(self.response.output)
        yield self._event("response.output_item.added", output_index=place, item=opened.item("in_progress"))
        if call is None:
            yield self._in_part("response.content_part.added", part=opened.part(""))

    def _add(self, kind: EventType, text: str) -> Iterator[ResponseEvent]:
        assert self._open is not None
        self._open.pieces.append(text)
        if self._open.type == "message":
            places, self._places = self._places, []
            if self._open.logprobs is not None:
                self._open.logprobs += places
            yield self._in_part(kind, delta=text, logprobs=places)
        elif self._open.type == "reasoning":
            yield self._in_part(kind, delta=text)
        else:
            place = len(self.response.output)
            yield self._event(kind, output_index=place, item_id=self._open.id, delta=text)

    def _close(self, status: ItemStatus) -> Iterator[ResponseEvent]:
        if self._open is None:
            return
        opened = self._open
        if opened.logprobs is not None:
            opened.logprobs += self._places  # of tokens without text, as the end of the turn
            self._places = []
        text, place, item = "".join(opened.pieces), len(self.response.output), opened.item(status)
        if opened.type == "function_call":
            yield self._event(
                "response.function_call_arguments.done", output_index=place, item_id=opened.id, arguments=text
            )
        else:
            if opened.type == "message":
                yield self._in_part("response.output_text.done", text=text, logprobs=opened.logprobs or [])
            else:
                yield self._in_part("response.reasoning_text.done", text=text)
            yield self._in_part("response.content_part.done", part=opened.part(text))
        yield self._event("response.output_item.done", output_index=place, item=item)
        self.response.output.append(item)
        self._open = None

    def _in_part(self, kind: EventType, **fields: Any) -> ResponseEvent:
        """An event of the only part of the item that grows."""
        assert self._open is not None
        place = len(self.response.output)
        return self._event(kind, output_index=place, item_id=self._open.id, content_index=0, **fields)

    def _event(self, kind: EventType, **fields: Any) -> ResponseEvent:
        self._number += 1
        return ResponseEvent(type=kind, sequence_number=self._number - 1, **fields)


def _usage(usage: Usage) -> ResponseUsage:
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    reasoning = usage.completion_tokens_details.reasoning_tokens if usage.completion_tokens_details else 0
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputDetails(cached_tokens=cached, cache_write_tokens=0),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputDetails(reasoning_tokens=reasoning),
        total_tokens=usage.total_tokens,
    )

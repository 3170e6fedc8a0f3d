"""From a chat request to an admitted job, and from its outputs to OpenAI's chat answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from gristmill.core import CompletionOutput, RequestOutput
from gristmill.errors import DataError, RequestError
from gristmill.serve.answering.events import event, events_of
from gristmill.serve.answering.jobs import Job, Visit, admit, usage_of
from gristmill.serve.answering.logprobs import chat_logprobs, prompt_logprobs
from gristmill.serve.answering.reading import AnswerReader, ReadingPlan, plan_reading
from gristmill.serve.errors import refusal
from gristmill.serve.host import Target
from gristmill.serve.wire.answers import (
    AnswerMessage,
    CalledFunction,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    FinishReason,
    FunctionDelta,
    MessageToolCall,
    ToolCallDelta,
    Usage,
)
from gristmill.serve.wire.chat import ChatCompletionRequest
from gristmill.tokens.answer.reader import CallArguments, CallBegan, Content, Event, Reasoning


@dataclass(frozen=True)
class ChatJob:
    """An admitted chat request."""

    request: ChatCompletionRequest
    job: Job
    plan: ReadingPlan


@dataclass(frozen=True)
class Update:
    """What an output adds to one answer."""

    output: CompletionOutput
    first_token: int
    """Of the tokens that are new."""
    events: Sequence[Event]
    finish_reason: FinishReason | None


async def admit_chat(target: Target, request: ChatCompletionRequest, visit: Visit) -> ChatJob:
    """Render the conversation and hand it to the engine.

    Raises ApiError: 400 with the field for what cannot be served as asked, 503 when the server is closing.
    """
    fields = field_names(request)
    try:
        # A long conversation takes a while to tokenise; the other streams go on meanwhile.
        plan = await asyncio.to_thread(plan_reading, target.hosted, request)
    except (RequestError, DataError) as error:
        raise refusal(error, fields) from error
    job = await admit(
        target,
        request.model,
        [plan.prompt],
        plan.params,
        prefix="chatcmpl-",
        standing=request.standing,
        fields=fields,
        visit=visit,
    )
    return ChatJob(request, job, plan)


def field_names(request: ChatCompletionRequest) -> Mapping[str, str]:
    """The engine's names of fields where the request has others."""
    names = {"prompt": "messages", "logprobs": "top_logprobs", "structured": "structured_outputs"}
    if request.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    if request.reasoning_effort is not None:
        names["thinking_budget"] = "reasoning_effort"
    if request.response_format is not None:
        names["structured"] = "response_format"
    return names


async def updates(chat: ChatJob) -> AsyncIterator[tuple[RequestOutput, list[Update]]]:
    """The engine's outputs and what each adds, until all answers are finished. Raises ApiError as `Job.outputs` does.

    Leaving early aborts the request.
    """
    readers = [AnswerReader(chat.plan) for _ in range(chat.request.n or 1)]
    tokens = [0] * len(readers)
    async for _, output in chat.job.outputs():
        news = []
        for each in output.outputs:
            reader = readers[each.index]
            if reader.ended:
                continue
            events = reader.read(each)
            reason = None
            if each.finish_reason is not None:
                reason = chat.job.finish_reason(each, called_tools=reader.called_tools)
            if events or reason is not None or len(each.token_ids) > tokens[each.index]:
                news.append(Update(each, tokens[each.index], events, reason))
                tokens[each.index] = len(each.token_ids)
        yield output, news


async def whole_answer(chat: ChatJob) -> ChatCompletion:
    """Wait for all answers. Raises ApiError when the engine could not finish one."""
    request, job = chat.request, chat.job
    messages = [MessageParts() for _ in range(request.n or 1)]
    reasons: dict[int, FinishReason] = {}
    final: RequestOutput | None = None
    async for output, news in updates(chat):
        final = output
        for update in news:
            messages[update.output.index].take(update.events)
            if update.finish_reason is not None:
                reasons[update.output.index] = update.finish_reason
    assert final is not None
    # twenty log-probabilities for each of many tokens take a while to write; the other streams go on meanwhile
    build = partial(_whole_choices, chat, final.outputs, messages, reasons)
    choices = await asyncio.to_thread(build) if request.logprobs else build()
    completion = ChatCompletion(
        id=job.id,
        object="chat.completion",
        created=job.created,
        model=job.model_name,
        choices=choices,
        usage=chat_usage(chat, final),
    )
    _add_prompt(chat, final, completion)
    return completion


def _whole_choices(
    chat: ChatJob,
    answers: Sequence[CompletionOutput],
    messages: Sequence[MessageParts],
    reasons: Mapping[int, FinishReason],
) -> list[Choice]:
    choices = []
    for answer, parts in zip(answers, messages, strict=True):
        choice = Choice(
            index=answer.index,
            message=parts.message(),
            logprobs=_logprobs(chat, answer, 0),
            finish_reason=reasons[answer.index],
        )
        if chat.request.return_token_ids:
            choice.token_ids = answer.token_ids
        choices.append(choice)
    return choices


@dataclass
class MessageParts:
    """A message, gathered from its events."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[CallBegan] = field(default_factory=list)
    arguments: list[list[str]] = field(default_factory=list)

    def take(self, events: Iterable[Event]) -> None:
        """Add the next events."""
        for each in events:
            if isinstance(each, Content):
                self.content.append(each.text)
            elif isinstance(each, Reasoning):
                self.reasoning.append(each.text)
            elif isinstance(each, CallBegan):
                self.calls.append(each)
                self.arguments.append([])
            else:
                self.arguments[each.index].append(each.text)

    def message(self) -> AnswerMessage:
        """As the wire format has it: content is null beside calls alone."""
        content = "".join(self.content)
        message = AnswerMessage(role="assistant", content=content if content or not self.calls else None, refusal=None)
        if self.reasoning:
            message.reasoning_content = "".join(self.reasoning)
        if self.calls:
            message.tool_calls = [
                MessageToolCall(
                    id=call.id, type="function", function=CalledFunction(name=call.name, arguments="".join(arguments))
                )
                for call, arguments in zip(self.calls, self.arguments, strict=True)
            ]
        return message


def event_stream(chat: ChatJob) -> AsyncIterator[str]:
    """The answer as server-sent events: role, content, finish reason, usage if asked for, [DONE].

    An error on the way is the last event, and no [DONE] follows it.
    """
    return events_of(_chunks(chat), chat.job.id)


async def _chunks(chat: ChatJob) -> AsyncIterator[str]:
    request = chat.request
    plain = _PlainChunks(chat)
    for index in range(request.n or 1):
        role = Delta(role="assistant", content="", refusal=None)
        yield event(_chunk(chat, ChunkChoice(index=index, delta=role, logprobs=None, finish_reason=None)))
    last: RequestOutput | None = None
    async for output, news in updates(chat):
        if last is None and (request.prompt_logprobs is not None or request.return_token_ids):
            about_prompt = _chunk(chat)
            _add_prompt(chat, output, about_prompt)
            yield event(about_prompt)
        last = output
        pieces = []
        for update in news:
            if plain.fits(update):
                pieces.append(plain.spell(update.output.index, update.events))
            elif update.events or request.logprobs or request.return_token_ids:
                pieces += [event(_chunk(chat, choice)) for choice in _choices(chat, update)]
            if update.finish_reason is not None:
                done = ChunkChoice(
                    index=update.output.index, delta=Delta(), logprobs=None, finish_reason=update.finish_reason
                )
                pieces.append(event(_chunk(chat, done)))
        if pieces:
            yield "".join(pieces)
    assert last is not None
    if request.wants_usage:
        yield event(_chunk(chat, usage=chat_usage(chat, last)))


class _PlainChunks:
    """Chunks of content alone, spelled without pydantic: what nearly all chunks are, at a tenth of the time."""

    def __init__(self, chat: ChatJob) -> None:
        request, job = chat.request, chat.job
        self._applies = not request.logprobs and not request.return_token_ids
        head = {"id": job.id, "object": "chat.completion.chunk", "created": job.created, "model": job.model_name}
        self._head = json.dumps(head, ensure_ascii=False, separators=(",", ":"))[:-1]
        self._tail = ',"usage":null}\n\n' if request.wants_usage else "}\n\n"

    def fits(self, update: Update) -> bool:
        """Whether the update is content and nothing else."""
        return self._applies and bool(update.events) and all(type(each) is Content for each in update.events)

    def spell(self, index: int, events: Iterable[Event]) -> str:
        """The event with the content."""
        text = json.dumps("".join(each.text for each in events if isinstance(each, Content)), ensure_ascii=False)
        choice = f'{{"index":{index},"delta":{{"content":{text}}},"logprobs":null,"finish_reason":null}}'
        return f'data: {self._head},"choices":[{choice}]{self._tail}'


def _choices(chat: ChatJob, update: Update) -> list[ChunkChoice]:
    """One chunk per event; the first has the log-probabilities of all."""
    deltas = [delta_of(each) for each in update.events] or [Delta()]
    index = update.output.index
    choices = [ChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None) for delta in deltas]
    choices[0].logprobs = _logprobs(chat, update.output, update.first_token)
    if chat.request.return_token_ids:
        choices[0].token_ids = update.output.token_ids[update.first_token :]
    return choices


def delta_of(each: Event) -> Delta:
    """What an event adds to a message."""
    if isinstance(each, Content):
        return Delta(content=each.text)
    if isinstance(each, Reasoning):
        return Delta(reasoning_content=each.text)
    if isinstance(each, CallArguments):
        return Delta(tool_calls=[ToolCallDelta(index=each.index, function=FunctionDelta(arguments=each.text))])
    function = FunctionDelta(name=each.name, arguments="")
    return Delta(tool_calls=[ToolCallDelta(index=each.index, id=each.id, type="function", function=function)])


def chat_usage(chat: ChatJob, output: RequestOutput) -> Usage:
    """Token counts of a finished request, those of reasoning among them where the model reasons."""
    counts = [chat.plan.reasoning_tokens(each) for each in output.outputs]
    return usage_of([output], sum(counts) if chat.plan.reasons else None)


def _chunk(chat: ChatJob, *choices: ChunkChoice, usage: Usage | None = None) -> ChatCompletionChunk:
    chunk = ChatCompletionChunk(
        id=chat.job.id,
        object="chat.completion.chunk",
        created=chat.job.created,
        model=chat.job.model_name,
        choices=list(choices),
    )
    if chat.request.wants_usage:
        chunk.usage = usage  # null in all chunks but the last, as the field says when it was asked for
    return chunk


def _logprobs(chat: ChatJob, output: CompletionOutput, start: int) -> ChoiceLogprobs | None:
    """Of the tokens from `start` on; None when they were not asked for."""
    if not chat.request.logprobs:
        return None
    return chat_logprobs(chat.job.model.tokenizer, output, start, chat.request.top_logprobs or 0)


def _add_prompt(chat: ChatJob, output: RequestOutput, answer: ChatCompletion | ChatCompletionChunk) -> None:
    if chat.request.prompt_logprobs is not None:
        answer.prompt_logprobs = prompt_logprobs(output)
    if chat.request.return_token_ids:
        answer.prompt_token_ids = output.prompt_token_ids

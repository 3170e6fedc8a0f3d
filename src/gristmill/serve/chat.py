"""From a chat request to an admitted stream of the engine, and from its outputs to OpenAI's answers."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import BaseModel

from gristmill.core import CompletionOutput, Renderer, RequestOutput
from gristmill.engine.async_engine import AsyncEngine, EngineClosed, RequestStream, StepEngine
from gristmill.errors import DataError, RequestError
from gristmill.serve.errors import ApiError, internal_error, refusal
from gristmill.serve.request import ChatCompletionRequest
from gristmill.serve.response import (
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    FinishReason,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from gristmill.serve.token_bytes import token_bytes
from gristmill.tokens.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

LEAST_LOGPROB = -9999.0
"""What the wire format says for a token of probability 0, as JSON has no infinity."""


class ServedModel(Protocol):
    """What the server needs of a model; `gristmill.LLM` is one."""

    @property
    def engine(self) -> StepEngine:
        """Owned by the server from its start to its end."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Spells tokens for log-probabilities."""

    @property
    def renderer(self) -> Renderer:
        """Turns a conversation into prompt ids."""

    @property
    def max_model_len(self) -> int:
        """Context length in tokens."""

    @property
    def model_name(self) -> str:
        """The name in requests."""


@dataclass(frozen=True)
class Hosted:
    """A model and the engine that it shares with its other names."""

    model: ServedModel
    engine: AsyncEngine
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True)
class ChatJob:
    """An admitted request and what its answers have in common."""

    request: ChatCompletionRequest
    model: ServedModel
    stream: RequestStream
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def id(self) -> str:
        """`chatcmpl-...`, the engine's request id too."""
        return self.stream.request_id


async def admit(hosted: Hosted, request: ChatCompletionRequest) -> ChatJob:
    """Render the conversation and hand it to the engine.

    Raises ApiError: 400 with the field for what cannot be served as asked, 503 when the server is closing.
    """
    messages = [message.plain() for message in request.messages]
    try:
        params = request.sampling_params(end_of_turn=hosted.model.renderer.stop_token_ids)
        # A long conversation takes a while to tokenise; the other streams go on meanwhile.
        prompt = await asyncio.to_thread(hosted.model.renderer.render_prompt, messages)
        stream = await hosted.engine.submit(prompt, params, request_id=f"chatcmpl-{uuid.uuid4().hex}")
    except (RequestError, DataError) as error:
        raise refusal(error, request) from error
    except EngineClosed as error:
        raise _closing() from error
    return ChatJob(request, hosted.model, stream)


async def whole_answer(job: ChatJob) -> ChatCompletion:
    """Wait for all choices. Raises ApiError when the engine could not finish one."""
    final: RequestOutput | None = None
    try:
        async with job.stream:
            async for output in job.stream:
                final = output
    except EngineClosed as error:
        raise _closing() from error
    assert final is not None
    choices = [
        Choice(
            index=choice.index,
            message=AssistantMessage(role="assistant", content=choice.text, refusal=None),
            logprobs=_logprobs(job, choice, 0),
            finish_reason=_finish_reason(choice),
        )
        for choice in final.outputs
    ]
    return ChatCompletion(
        id=job.id,
        object="chat.completion",
        created=job.created,
        model=job.request.model,
        choices=choices,
        usage=_usage(final),
    )


async def event_stream(job: ChatJob) -> AsyncIterator[str]:
    """The answer as server-sent events: role, content, finish reason, usage if asked for, [DONE].

    An error on the way is the last event, and no [DONE] follows it.
    """
    try:
        async with job.stream:
            async for chunk in _chunks(job):
                yield _event(chunk)
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body())
    except EngineClosed:
        yield _event(_closing().body())
    except Exception:
        logger.exception("stream %s failed", job.id)
        yield _event(internal_error().body())


async def _chunks(job: ChatJob) -> AsyncIterator[ChatCompletionChunk]:
    n = job.request.n or 1
    text_sent, tokens_sent = [0] * n, [0] * n
    for index in range(n):
        yield _chunk(job, ChunkChoice(index=index, delta=_delta(role=True), logprobs=None, finish_reason=None))
    finished: set[int] = set()
    last: RequestOutput | None = None
    async for last in job.stream:
        for output in last.outputs:
            index = output.index
            text = output.text[text_sent[index] :]
            logprobs = _logprobs(job, output, tokens_sent[index])
            text_sent[index] += len(text)
            tokens_sent[index] += len(logprobs.content or ()) if logprobs else 0
            if text or (logprobs and logprobs.content):
                delta = Delta(content=text)
                yield _chunk(job, ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=None))
            if output.finish_reason is not None and index not in finished:
                finished.add(index)
                reason = _finish_reason(output)
                yield _chunk(job, ChunkChoice(index=index, delta=Delta(), logprobs=None, finish_reason=reason))
    assert last is not None
    if _wants_usage(job):
        yield _chunk(job, usage=_usage(last))


def _delta(*, role: bool) -> Delta:
    return Delta(role="assistant", content="", refusal=None) if role else Delta()


def _chunk(job: ChatJob, *choices: ChunkChoice, usage: Usage | None = None) -> ChatCompletionChunk:
    chunk = ChatCompletionChunk(
        id=job.id,
        object="chat.completion.chunk",
        created=job.created,
        model=job.request.model,
        choices=list(choices),
    )
    if _wants_usage(job):
        chunk.usage = usage  # null in all chunks but the last, as the field says when it was asked for
    return chunk


def _wants_usage(job: ChatJob) -> bool:
    return job.request.stream_options is not None and bool(job.request.stream_options.include_usage)


def _event(body: BaseModel) -> str:
    return f"data: {body.model_dump_json(exclude_unset=True)}\n\n"


def _finish_reason(output: CompletionOutput) -> FinishReason:
    """Raises ApiError for a completion that did not end by itself."""
    if output.finish_reason == "error":
        logger.error("choice %d ended with an error: %s", output.index, output.error)
        raise internal_error()
    if output.finish_reason not in ("stop", "length"):
        raise ApiError(503, "the request was aborted", code="aborted")
    return output.finish_reason


def _usage(output: RequestOutput) -> Usage:
    prompt = len(output.prompt_token_ids)
    completion = sum(len(choice.token_ids) for choice in output.outputs)
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def _logprobs(job: ChatJob, output: CompletionOutput, start: int) -> ChoiceLogprobs | None:
    """Log-probabilities of the tokens from `start` on; None when they were not asked for."""
    if not job.request.logprobs:
        return None
    count = job.request.top_logprobs or 0
    content = []
    for token_id, places in zip(output.token_ids[start:], (output.logprobs or [])[start:], strict=False):
        best = sorted(places.items(), key=lambda item: item[1].rank)
        by_id = {
            candidate: TopLogprob(
                token=place.decoded_token,
                logprob=max(place.logprob, LEAST_LOGPROB),
                bytes=token_bytes(job.model.tokenizer, candidate, place.decoded_token),
            )
            for candidate, place in best
        }
        top = [by_id[candidate] for candidate, place in best if place.rank <= count]
        content.append(TokenLogprob(**by_id[token_id].model_dump(), top_logprobs=top))
    return ChoiceLogprobs(content=content, refusal=None)


def _closing() -> ApiError:
    return ApiError(503, "the server is closing", code="server_closing")

"""Admitted requests: from prompts and parameters to streams of the engine, and what all kinds of answers share."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace

from gristmill.core import CompletionOutput, Prompt, RequestOutput, SamplingParams
from gristmill.engine.async_engine import EngineClosed, EngineFailure, RequestStream
from gristmill.engine.request import Standing
from gristmill.errors import DataError, RequestError
from gristmill.serve.access.gate import Caller
from gristmill.serve.access.note import Note
from gristmill.serve.errors import ApiError, closing, internal_error, refusal
from gristmill.serve.host import Target
from gristmill.serve.hosted import ServedModel
from gristmill.serve.wire.answers import (
    CompletionTokensDetails,
    FinishReason,
    PromptTokensDetails,
    Usage,
)

logger = logging.getLogger(__name__)

USUAL_TOKENS = 1024
"""What an answer without a limit is taken to need of a key's quota until it is there."""


@dataclass(frozen=True)
class Visit:
    """What a route knows of the HTTP request that asks."""

    note: Note
    caller: Caller
    forbidden: tuple[str, ...] = ()
    """Phrases that end an answer with "content_filter"."""


@dataclass(frozen=True)
class Job:
    """The streams of one HTTP request, one per prompt, and what its answers have in common."""

    id: str
    model_name: str
    """As the request says it."""
    target: Target
    streams: Sequence[RequestStream]
    visit: Visit
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def model(self) -> ServedModel:
        """What answers."""
        return self.target.hosted.generator

    async def aclose(self) -> None:
        """End what still runs."""
        for stream in self.streams:
            stream.leave()

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """(number of the prompt, its output so far), as they come, until all are finished.

        Raises ApiError when the engine closes, EngineFailure when it fails. Leaving early aborts the requests.
        """
        try:
            async with AsyncExitStack() as stack:
                for stream in self.streams:
                    await stack.enter_async_context(stream)
                outputs = _merged(self.streams) if len(self.streams) > 1 else _only(self.streams[0])
                async for pair in outputs:
                    self.visit.note.progress(pair[1])
                    yield pair
        except EngineClosed as error:
            self.visit.note.finish_reason = "abort"
            raise closing() from error
        except (ApiError, EngineFailure):
            self.visit.note.finish_reason = "abort"
            raise

    def finish_reason(self, output: CompletionOutput, *, called_tools: bool = False) -> FinishReason:
        """Why an answer ended. Raises ApiError when it did so because of an error."""
        if output.finish_reason == "error":
            logger.error("%s: choice %d ended with an error: %s", self.id, output.index, output.error)
            raise internal_error()
        assert output.finish_reason is not None
        if output.stop_reason in self.visit.forbidden:
            return "content_filter"
        return "tool_calls" if called_tools and output.finish_reason == "stop" else output.finish_reason


async def admit(
    target: Target,
    name: str,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    prefix: str,
    standing: Standing,
    fields: Mapping[str, str],
    visit: Visit,
) -> Job:
    """Hand prompts to the engine.

    name: the model as the request says it. prefix: of the answer's id, such as "chatcmpl-". fields: see `refusal`.
    Raises ApiError: 400 with the field for what cannot be served as asked, 503 when the server is closing.
    """
    if visit.forbidden:
        # what is forbidden is so in the reasoning too
        params = replace(params, stop=[*params.stop_strings, *visit.forbidden], stop_outside=None)
    engine = target.hosted.engine
    assert engine is not None
    visit.caller.spend(_most_tokens(target.hosted.generator, prompts, params))
    streams: list[RequestStream] = []
    identifier = f"{prefix}{uuid.uuid4().hex}"
    try:
        for number, prompt in enumerate(prompts):
            name_here = identifier if len(prompts) == 1 else f"{identifier}-{number}"
            streams.append(await engine.submit(prompt, params, name_here, standing=standing, adapter=target.adapter))
            visit.note.at_end.append(streams[-1].leave)  # however the request ends, if only before anybody reads
    except BaseException as error:
        for stream in streams:
            stream.leave()
        if isinstance(error, (RequestError, DataError)):
            raise refusal(error, fields) from error
        if isinstance(error, EngineClosed):
            raise closing() from error
        raise
    return Job(identifier, name, target, streams, visit)


def _most_tokens(model: ServedModel, prompts: Sequence[Prompt], params: SamplingParams) -> int:
    """Tokens that prompts and answers may come to. Only an encoder-decoder's prompts are texts still: theirs are
    guessed."""
    total = 0
    for prompt in prompts:
        length = len(prompt) // 4 if isinstance(prompt, str) else len(prompt)
        room = max(model.max_model_len - length, 1)
        total += length + params.n * min(params.max_tokens or USUAL_TOKENS, room)
    return total


def usage_of(outputs: Sequence[RequestOutput], reasoning_tokens: int | None = None) -> Usage:
    """Token counts of finished prompts. A prompt counts once, however many answers it has."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
    usage = Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(output.num_cached_tokens for output in outputs)),
    )
    if reasoning_tokens is not None:
        usage.completion_tokens_details = CompletionTokensDetails(reasoning_tokens=reasoning_tokens)
    return usage


async def _only(stream: RequestStream) -> AsyncIterator[tuple[int, RequestOutput]]:
    async for output in stream:
        yield 0, output


async def _merged(streams: Sequence[RequestStream]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """Outputs of all streams as they come."""
    ready = {asyncio.ensure_future(anext(stream)): number for number, stream in enumerate(streams)}
    try:
        while ready:
            done, _ = await asyncio.wait(ready, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = ready.pop(task)
                with contextlib.suppress(StopAsyncIteration):
                    output = task.result()
                    ready[asyncio.ensure_future(anext(streams[number]))] = number
                    yield number, output
    finally:
        for task in ready:
            task.cancel()

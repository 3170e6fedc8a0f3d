"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from gristmill.engine.async_engine import EngineClosed
from gristmill.errors import DataError, RequestError
from gristmill.serve.access.gate import require_model
from gristmill.serve.answering.chat import admit_chat, event_stream, field_names, whole_answer
from gristmill.serve.api.common import (
    ERRORS,
    answer_while_connected,
    hold,
    host_of,
    json_only,
    stream_while_connected,
    visit_of,
)
from gristmill.serve.connection import CLIENT_LEFT, while_connected
from gristmill.serve.errors import ApiError, closing, refusal
from gristmill.serve.wire.answers import ChatCompletion, ChatCompletionChunk
from gristmill.serve.wire.chat import ChatCompletionRequest

router = APIRouter(responses=ERRORS)


@router.post(
    "/v1/chat/completions",
    response_model=None,
    dependencies=[Depends(json_only)],
    responses={
        200: {
            "model": ChatCompletion | ChatCompletionChunk,
            "description": "A chat.completion; with stream, server-sent events of chat.completion.chunk and [DONE].",
            "content": {"text/event-stream": {"schema": {"$ref": "#/components/schemas/ChatCompletionChunk"}}},
        }
    },
)
async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
    """Continue a conversation. A client that leaves ends its request."""
    body, headers = await routed(request, body)
    target, visit = visit_of(request, body.model)

    async def answer() -> ChatCompletion:
        return await whole_answer(await admit_chat(target, body, visit))

    async def begin() -> tuple[AsyncIterator[str], Callable[[], Awaitable[None]]]:
        chat = await admit_chat(target, body, visit)
        return event_stream(chat), chat.job.aclose

    work = stream_while_connected(request, begin()) if body.stream else answer_while_connected(request, answer())
    response = await work
    response.headers.update(headers)
    return response


async def routed(request: Request, body: ChatCompletionRequest) -> tuple[ChatCompletionRequest, dict[str, str]]:
    """Of a request to a router, the request to the model that it chooses, and headers that say why."""
    host = host_of(request)
    found = host.routers.get(body.model)
    if found is None:
        return body, {}
    require_model(request, body.model)
    small = host.find(found.small.model).hosted
    assert small.engine is not None
    hold(request, small)
    try:
        work = found.choose(body.conversation(), small.engine, small.generator.renderer, body.standing)
        choice = await while_connected(request.receive, work)
    except (RequestError, DataError) as error:
        raise refusal(error, field_names(body)) from error
    except EngineClosed as error:
        raise closing() from error
    if choice is None:
        raise ApiError(CLIENT_LEFT, "the client left")
    request.state.note.completion_tokens += choice.probe_tokens  # which the caller's quota pays for
    changes: dict[str, object] = {"model": choice.route.model}
    if choice.route.thinking_budget is not None and body.thinking_budget is None and body.reasoning_effort is None:
        changes["thinking_budget"] = choice.route.thinking_budget
    return body.model_copy(update=changes), choice.headers

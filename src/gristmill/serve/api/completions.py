"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from gristmill.serve.answering.completions import admit_completion, completion_events, whole_completion
from gristmill.serve.api.common import (
    ERRORS,
    answer_while_connected,
    json_only,
    stream_while_connected,
    visit_of,
)
from gristmill.serve.wire.answers import TextCompletion
from gristmill.serve.wire.completions import CompletionRequest

router = APIRouter(responses=ERRORS)


@router.post(
    "/v1/completions",
    response_model=None,
    dependencies=[Depends(json_only)],
    responses={
        200: {
            "model": TextCompletion,
            "description": "A text_completion; with stream, server-sent events of them and [DONE].",
            "content": {"text/event-stream": {"schema": {"$ref": "#/components/schemas/TextCompletion"}}},
        }
    },
)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Go on with one text or several. A client that leaves ends its request."""
    target, visit = visit_of(request, body.model)

    async def answer() -> TextCompletion:
        return await whole_completion(await admit_completion(target, body, visit))

    async def begin() -> tuple[AsyncIterator[str], Callable[[], Awaitable[None]]]:
        work = await admit_completion(target, body, visit)
        return completion_events(work), work.job.aclose

    return await (
        stream_while_connected(request, begin()) if body.stream else answer_while_connected(request, answer())
    )

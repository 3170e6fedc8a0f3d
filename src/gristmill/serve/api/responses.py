"""POST /v1/responses, and the stored responses."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response as HttpResponse
from pydantic import TypeAdapter

from gristmill.core import RequestOutput
from gristmill.serve.answering.chat import ChatJob, admit_chat, chat_usage, updates
from gristmill.serve.answering.events import event
from gristmill.serve.answering.jobs import Visit
from gristmill.serve.answering.logprobs import chat_logprobs
from gristmill.serve.answering.responses import FIELDS, Assembly, chat_request, items_of, new_response
from gristmill.serve.api.chat import routed
from gristmill.serve.api.common import (
    ERRORS,
    answer_while_connected,
    json_only,
    stream_while_connected,
    visit_of,
)
from gristmill.serve.api.owner import Owner
from gristmill.serve.errors import ApiError, internal_error
from gristmill.serve.host import Target
from gristmill.serve.wire.answers import FinishReason
from gristmill.serve.wire.chat import ChatCompletionRequest
from gristmill.serve.wire.responses import Item, Response, ResponseDeleted, ResponseEvent, ResponseRequest

logger = logging.getLogger(__name__)

MAX_STORED_BYTES = 64 * 2**20

ITEMS = TypeAdapter(list[Item])


@dataclass(frozen=True, slots=True)
class Stored:
    """A finished response and the items of its conversation up to its end, as JSON: objects take several times that."""

    response: bytes
    conversation: bytes

    @property
    def items(self) -> list[Item]:
        """The conversation."""
        return ITEMS.validate_json(self.conversation)

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return len(self.response) + len(self.conversation)


class Memory:
    """The latest responses, by owner and id, in memory alone. What is above `max_bytes` goes, oldest first."""

    def __init__(self, max_bytes: int = MAX_STORED_BYTES) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._stored: OrderedDict[tuple[str, str], Stored] = OrderedDict()

    def keep(self, owner: str, response: Response, items: Sequence[Item]) -> None:
        """Store a response. `items` are those that it answers."""
        said = ITEMS.validate_python([item.model_dump(exclude_unset=True) for item in response.output])
        conversation = ITEMS.dump_json([*items, *said], exclude_unset=True)
        stored = Stored(response.model_dump_json(exclude_unset=True).encode(), conversation)
        self._stored[owner, response.id] = stored
        self.bytes += stored.size
        while self.bytes > self.max_bytes:
            self.bytes -= self._stored.popitem(last=False)[1].size

    def find(self, owner: str, name: str, param: str | None = None) -> Stored:
        """Raises ApiError 404 for a response that the owner does not have, or no longer."""
        if (owner, name) not in self._stored:
            message = f"response {name[:100]!r} is not stored, or no longer: responses are kept in memory for a while"
            raise ApiError(404, message, param=param, code="response_not_found")
        return self._stored[owner, name]

    def delete(self, owner: str, name: str) -> None:
        """Forget a response. Raises ApiError 404 as `find` does."""
        self.bytes -= self.find(owner, name).size
        del self._stored[owner, name]


async def _memory(request: Request) -> Memory:
    state = request.app.state
    if not hasattr(state, "responses"):
        state.responses = Memory()
    memory: Memory = state.responses
    return memory


async def _no_query(request: Request) -> None:
    for name in request.query_params:
        raise ApiError(400, f"{name[:200]} is not supported", param=name[:200], code="unsupported_parameter")


MemoryOf = Annotated[Memory, Depends(_memory)]

router = APIRouter(responses=ERRORS)


@router.post(
    "/v1/responses",
    response_model=None,
    dependencies=[Depends(json_only)],
    responses={
        200: {
            "model": Response | ResponseEvent,
            "description": "A response; with stream, server-sent events that end with the whole response.",
            "content": {"text/event-stream": {"schema": {"$ref": "#/components/schemas/ResponseEvent"}}},
        }
    },
)
async def create_response(body: ResponseRequest, request: Request, memory: MemoryOf, owner: Owner) -> HttpResponse:
    """Go on with a conversation of items. A client that leaves ends its request."""
    items = items_of(body)
    if body.previous_response_id is not None:
        items = [*memory.find(owner, body.previous_response_id, "previous_response_id").items, *items]
    chat_body, headers = await routed(request, chat_request(body, items))
    target, visit = visit_of(request, chat_body.model)
    assembly = Assembly(new_response(body, chat_body.model), logprobs=bool(body.include))

    def keep() -> None:
        if assembly.response.store:
            memory.keep(owner, assembly.response, items)

    async def begin() -> tuple[AsyncIterator[str], Callable[[], Awaitable[None]]]:
        chat = await _admit(target, chat_body, visit)
        return _stream(chat, assembly, keep), chat.job.aclose

    async def answer() -> Response:
        chat = await _admit(target, chat_body, visit)
        async for _ in _events(chat, assembly):
            pass
        keep()
        return assembly.response

    work = stream_while_connected(request, begin()) if body.stream else answer_while_connected(request, answer())
    http_response = await work
    http_response.headers.update(headers)
    return http_response


@router.get("/v1/responses/{response_id}", response_model=Response, dependencies=[Depends(_no_query)])
async def get_response(response_id: str, memory: MemoryOf, owner: Owner) -> HttpResponse:
    """A stored response."""
    return HttpResponse(memory.find(owner, response_id).response, media_type="application/json")


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, memory: MemoryOf, owner: Owner) -> ResponseDeleted:
    """Forget a stored response. Those that went on from it stay as they are."""
    memory.delete(owner, response_id)
    return ResponseDeleted(id=response_id)


async def _admit(target: Target, body: ChatCompletionRequest, visit: Visit) -> ChatJob:
    try:
        chat = await admit_chat(target, body, visit)
    except ApiError as error:
        error.param = FIELDS.get(error.param or "", error.param)
        raise
    if body.logprobs and chat.plan.reasons:
        await chat.job.aclose()
        raise ApiError(400, "include gives no logprobs of a model that reasons", param="include", code="invalid_value")
    return chat


async def _events(chat: ChatJob, assembly: Assembly) -> AsyncIterator[list[ResponseEvent]]:
    """What the engine's outputs add, to the last event. Raises ApiError when the answer cannot be finished."""
    yield list(assembly.begin())
    last: RequestOutput | None = None
    reason: FinishReason | None = None
    async for output, news in updates(chat):
        last = output
        for update in news:
            reason = update.finish_reason
            places = None
            if chat.request.logprobs:
                count = chat.request.top_logprobs or 0
                places = chat_logprobs(chat.job.model.tokenizer, update.output, update.first_token, count).content
            yield list(assembly.take(update.events, places or ()))
    assert last is not None
    assert reason is not None
    yield list(assembly.finish(reason, chat_usage(chat, last)))


async def _stream(chat: ChatJob, assembly: Assembly, keep: Callable[[], None]) -> AsyncIterator[str]:
    try:
        async for events in _events(chat, assembly):
            if assembly.response.status != "in_progress":
                keep()  # before the client hears of it, so that it can go on from it at once
            yield "".join(map(_spelled, events))
    except ApiError as error:
        yield _spelled(assembly.fail(error))
    except Exception:
        logger.exception("stream %s failed", assembly.response.id)
        yield _spelled(assembly.fail(internal_error()))


def _spelled(each: ResponseEvent) -> str:
    return f"event: {each.type}\n{event(each)}"

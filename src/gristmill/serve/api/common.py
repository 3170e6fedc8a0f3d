"""What the routes share."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel

from gristmill.serve.access.gate import admit, require_admin, require_model
from gristmill.serve.answering.jobs import Visit
from gristmill.serve.connection import CLIENT_LEFT, EventStream, while_connected
from gristmill.serve.errors import ApiError
from gristmill.serve.host import ModelHost, Target
from gristmill.serve.hosted import Hosted
from gristmill.serve.wire.models import ErrorBody

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be served as asked."},
    "5XX": {"model": ErrorBody, "description": "The server failed, is loading or is closing."},
}


async def json_only(request: Request) -> None:
    """Refuse other content types: a web page from elsewhere could send those without asking the browser first.

    And names that come twice in one object, of which a parser would drop the first without a word.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(400, "the body must be a JSON object, sent as application/json", code="invalid_json")
    if body := await request.body():
        json.loads(body, object_pairs_hook=_without_repetition)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ApiError(400, f"{name[:200]!r} is given twice", param=name[:200], code="invalid_json")
    return found


async def admin_only(request: Request) -> None:
    """For routes that change what the server serves."""
    require_admin(request)


def host_of(request: Request) -> ModelHost:
    """The models of this server."""
    host: ModelHost = request.app.state.host
    return host


def visit_of(request: Request, name: str) -> tuple[Target, Visit]:
    """The model that a request names, for a caller who may use it while there is room.

    Raises ApiError: see `ModelHost.find` and `gate.admit`.
    """
    require_model(request, name)
    target = host_of(request).find(name, request.state.caller.allows)
    admit(request, target.hosted)
    hold(request, target.hosted, target.adapter)
    return target, Visit(request.state.note, request.state.caller, request.app.state.forbidden)


def hold(request: Request, hosted: Hosted, adapter: str | None = None) -> None:
    """Keep a model until the request is over: it may be replaced or unloaded meanwhile."""
    request.state.note.at_end.append(hosted.hold(adapter))


def json_answer(body: BaseModel) -> Response:
    """An answer. Fields left unset are left out."""
    return Response(body.model_dump_json(exclude_unset=True), media_type="application/json")


async def answer_while_connected(request: Request, work: Coroutine[Any, Any, BaseModel]) -> Response:
    """The answer that `work` makes, which ends when the client leaves."""
    body = await while_connected(request.receive, work)
    return Response(status_code=CLIENT_LEFT) if body is None else json_answer(body)


async def stream_while_connected(
    request: Request,
    begin: Coroutine[Any, Any, tuple[AsyncIterator[str], Callable[[], Awaitable[None]]]],
) -> Response:
    """The events that `begin` returns, with what ends them; the client may leave at any time."""
    begun = await while_connected(request.receive, begin)
    return Response(status_code=CLIENT_LEFT) if begun is None else EventStream(*begun)

"""What surrounds every request: its id, log line and headers, the limits of size and time, and the watch for a client
that left."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.datastructures import MutableHeaders
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gristmill.serve.access.note import Note, note_of
from gristmill.serve.access.traffic import Traffic
from gristmill.serve.errors import ApiError, internal_error

logger = logging.getLogger(__name__)

T = TypeVar("T")

SECURITY_HEADERS = {
    "content-security-policy": "default-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
CLIENT_LEFT = 499
"""What the log says of a client that left before its answer began. Nobody receives it."""

METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "OPTIONS"})

UPLOADS = "/v1/files"

SLOWEST = 100_000
"""Bytes per second below which a body is too slow in the long run."""

SECONDS_TO_SEND_ERROR = 5
"""For the last event of a stream that took too long; its reader may be the reason."""


class Envelope:
    """The outermost layer: a request id, security headers, one log line, and an answer when a bug struck.

    The log has method, path, status, times and counts; a query or a header never, bodies only with `log_bodies`.
    """

    def __init__(self, app: ASGIApp, traffic: Traffic | None = None, *, log_bodies: bool = False) -> None:
        self.app, self.traffic, self.log_bodies = app, traffic or Traffic(), log_bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = f"req_{uuid.uuid4().hex}"
        note = scope.setdefault("state", {})["note"] = Note(self.traffic)
        status = 0
        bodies = {"request": bytearray(), "answer": bytearray()}

        async def receive_and_keep() -> Message:
            message = await receive()
            bodies["request"] += message.get("body", b"")
            return message

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update({"x-request-id": request_id, **SECURITY_HEADERS})
            elif self.log_bodies:
                bodies["answer"] += message.get("body", b"")
            await send(message)

        self.traffic.open += 1
        try:
            await self.app(scope, receive_and_keep if self.log_bodies else receive, send_with_headers)
        except asyncio.CancelledError:  # by the server, at its end; nobody waits for this task
            logger.warning("%s was cut off", request_id)
        except Exception:
            logger.exception("%s failed", request_id)
            if status == 0:
                await internal_error().response()(scope, receive, send_with_headers)
        finally:
            self.traffic.open -= 1
            seconds = time.perf_counter() - note.begun
            self._count(scope, note, status, seconds)
            self._log(scope, note, request_id, status, seconds, bodies)

    def _count(self, scope: Scope, note: Note, status: int, seconds: float) -> None:
        note.left = note.left or status == CLIENT_LEFT
        note.close()
        # labels are templates and methods of ours: each one that a client could make up would stay in memory
        route = getattr(scope.get("route"), "path", "")
        method = scope["method"] if scope["method"] in METHODS else ""
        self.traffic.requests[method, route, status] += 1
        self.traffic.seconds[route].add(seconds)

    def _log(
        self, scope: Scope, note: Note, request_id: str, status: int, seconds: float, bodies: dict[str, bytearray]
    ) -> None:
        fields: dict[str, Any] = {
            "request_id": request_id,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status or None,
            "seconds": round(seconds, 6),
            "key": note.key,
            "model": note.model,
            "prompt_tokens": note.prompt_tokens,
            "completion_tokens": note.completion_tokens,
            "finish_reason": "abort" if note.left else note.finish_reason,
        }
        # The path is the client's: its repr cannot break the line.
        line = f"{request_id} {scope['method']} {fields['path']!r} {status or '-'} {seconds:.3f}s"
        if note.model is not None:
            line += f" {note.model} {note.prompt_tokens}+{note.completion_tokens} tokens"
        if fields["finish_reason"] is not None:
            line += f" {fields['finish_reason']}"
        if note.key is not None:
            line += f" key {note.key}"
        if self.log_bodies:
            spelled = {name: bytes(body).decode("utf-8", "replace") for name, body in bodies.items()}
            fields |= spelled
            line += f" request {spelled['request']!r} answer {spelled['answer']!r}"
        logger.info("%s", line, extra={"fields": fields})


class BodyLimit:
    """Refuses request bodies above `max_bytes` with 413, by the declared length or once so much has come, and with
    408 those that come too slowly: they may take `seconds`, and one more for every SLOWEST bytes.

    upload_bytes: the limit for files, which do not stay in memory; None for the same.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, *, upload_bytes: int | None = None, seconds: float = 60) -> None:
        self.app, self.max_bytes, self.seconds = app, max_bytes, seconds
        self.upload_bytes = upload_bytes or max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most = self.upload_bytes if scope["path"] == UPLOADS else self.max_bytes
        too_large = ApiError(413, f"the body is larger than {most} bytes", code="request_too_large")
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > most:
            await too_large.response()(scope, receive, send)
            return
        received, complete = 0, False
        deadline = asyncio.get_running_loop().time() + self.seconds

        async def counted() -> Message:
            nonlocal received, complete
            if complete:  # what comes now is the end of the connection, which may be late
                return await receive()
            try:
                async with asyncio.timeout_at(deadline + received / SLOWEST):
                    message = await receive()
            except TimeoutError:
                told = f"the body comes too slowly: {received} bytes are here"
                raise ApiError(408, told, code="body_timeout", headers={"connection": "close"}) from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > most:
                raise too_large
            return message

        await self.app(scope, counted, send)


class TimeLimit:
    """Ends requests after `seconds`: with 504 before the answer began, with an error as its last event after.

    504 and not 408, which says that the client was slow. OpenAI's clients would repeat both, so the answer tells them
    not to: the same request would take as long again.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self.app, self.seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = streams = ended = False

        async def watched(message: Message) -> None:
            nonlocal begun, streams, ended
            if message["type"] == "http.response.start":
                begun = True
                streams = MutableHeaders(scope=message).get("content-type", "").startswith("text/event-stream")
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        try:
            async with asyncio.timeout(self.seconds) as limit:
                await self.app(scope, receive, watched)
        except TimeoutError:
            if not limit.expired():
                raise
            note_of(scope).finish_reason = "timeout"
            error = self._too_long()
            if not begun:
                await error.response()(scope, receive, send)
            elif streams and not ended:
                event = f"data: {error.body().model_dump_json()}\n\n".encode()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(SECONDS_TO_SEND_ERROR):
                        await send({"type": "http.response.body", "body": event, "more_body": False})

    def _too_long(self) -> ApiError:
        message = f"the request took longer than this server's limit of {self.seconds:g} s"
        return ApiError(504, message, code="request_timeout", headers={"x-should-retry": "false"})


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None when the client left first; `work` is cancelled then.

    The body must have been read, so that the next message can only be the disconnect.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.wait((task, watch))  # not one by one: a cancellation of ours would look like theirs


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events. `release` is awaited at the end, and at once when the client leaves, even before an event."""

    def __init__(self, events: AsyncIterator[str], release: Callable[[], Awaitable[None]]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            if not await while_connected(receive, self._all(send)):
                note_of(scope).left = True
        finally:
            await self._release()

    async def _all(self, send: Send) -> bool:
        await self.stream_response(send)
        return True

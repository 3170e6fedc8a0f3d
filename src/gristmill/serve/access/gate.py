"""The gate: who calls, whether they may, and what they have left."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gristmill.engine.async_engine import StepEngine
from gristmill.engine.engine import Engine
from gristmill.errors import DataError
from gristmill.serve.access.keys import Key, KeyFile
from gristmill.serve.access.note import Note, note_of
from gristmill.serve.access.quotas import Quota, Quotas
from gristmill.serve.errors import ApiError
from gristmill.serve.hosted import Hosted
from gristmill.serve.routing.routed import RoutedEngine

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version"})
"""What needs no key, besides the page's files."""

OPEN_FOLDER = "/static/"


@dataclass(slots=True)
class Caller:
    """Who sent a request, at `request.state.caller`. Without keys everybody is the same caller, without limits."""

    key: Key | None = None
    quota: Quota | None = None
    reserved: int = 0
    charged: int = 0

    def allows(self, model: str) -> bool:
        """Whether the caller may use a model, and see that it exists."""
        return self.key is None or self.key.allows(model)

    def spend(self, tokens: int) -> None:
        """Reserve tokens before they are used: the prompt and the most that may be generated.

        Raises ApiError 429 when the key has too few left now, 413 when it may never use so many.
        """
        if self.quota is not None:
            self.quota.reserve(tokens)
            self.reserved += tokens

    def settle(self, used: int) -> None:
        """Exchange what was reserved for what was used so far. The gate does it when a request is over."""
        if self.quota is not None:
            reserved, new = self.reserved, used - self.charged
            self.reserved, self.charged = 0, used
            self.quota.settle(reserved, new)


class Gate:
    """Lets requests with a valid key in, and all when `keys` is None. Counts them, and tells them what is left."""

    def __init__(self, app: ASGIApp, keys: KeyFile | None, *, metrics_open: bool = False) -> None:
        self.app, self.keys = app, keys
        self.open_paths = OPEN_PATHS | ({"/metrics"} if metrics_open else set())
        self.quotas = Quotas()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        caller, quota = Caller(), None
        try:
            if self.keys is not None and not self._is_open(scope["path"]):
                key = self._key(self.keys, scope)
                note_of(scope).key = key.name
                quota = self.quotas.of(key)
                caller = Caller(key, quota)
                if scope["method"] not in ("GET", "HEAD"):
                    quota.request()
        except ApiError as error:
            await error.response()(scope, receive, _with_limits(send, quota))
            return
        scope["state"]["caller"] = caller
        note = note_of(scope)

        def settle() -> None:
            caller.settle(note.prompt_tokens + note.completion_tokens)

        try:
            await self.app(scope, receive, _with_limits(send, quota, settle))
        finally:
            settle()

    def _is_open(self, path: str) -> bool:
        return path in self.open_paths or path.startswith(OPEN_FOLDER)

    def _key(self, keys: KeyFile, scope: Scope) -> Key:
        """The key of a request, or of the owner of a batch, whose requests come from within and say so in their state.

        Raises ApiError: 401 for no valid key, 503 when the file of keys is no good.
        """
        scheme, _, secret = Headers(scope=scope).get("authorization", "").partition(" ")
        owner = scope["state"].get("owner")
        if owner is None and (scheme.lower() != "bearer" or not secret.strip()):
            raise _unauthorised("an API key is needed: send it as Authorization: Bearer KEY")
        try:
            key = keys.find(secret.strip()) if owner is None else keys.named(owner)
        except DataError as error:
            raise ApiError(503, "the server cannot read its keys", code="keys_unavailable") from error
        if key is None:
            raise _unauthorised("the API key is not valid here: it is unknown, was revoked or has expired")
        return key


def require_model(request: Request, name: str) -> None:
    """Raise ApiError 404 for a model, or an adapter of one, that the caller may not use. Comes before looking for it,
    which would tell what there is."""
    if not request.state.caller.allows(name):
        message = f"model {name[:200]!r} does not exist, or this key may not use it"
        raise ApiError(404, message, param="model", code="model_not_found")


def admit(request: Request, hosted: Hosted) -> None:
    """What a route calls once it has found its model: is there room?

    Raises ApiError 429 when `max_waiting` requests wait for its engine.
    """
    note: Note = request.state.note
    most: int | None = request.app.state.max_waiting
    if most is not None and hosted.engine is not None:
        engine = hosted.generator.engine
        # those that the engine has not seen yet are among them
        waiting = note.traffic.running[hosted.name] - _seats(engine)
        if max(waiting, getattr(getattr(engine, "metrics", None), "waiting", 0)) >= most:
            message = f"{most} requests or more wait for this model; try again soon"
            raise ApiError(429, message, code="server_busy", headers={"retry-after": "1"})
    note.serve(hosted.name)


def require_admin(request: Request) -> None:
    """Let a request change what is served: with an admin key, or without keys from this machine under a local name.

    The name is looked at because a web page can let its own name point here. Raises ApiError 403.
    """
    caller: Caller = request.state.caller
    if caller.key is not None:
        if not caller.key.admin:
            raise ApiError(403, f"key {caller.key.name!r} is no admin key", code="admin_required")
    elif not (request.client and is_loopback(request.client.host) and is_loopback(request.url.hostname or "")):
        raise ApiError(403, "without API keys this is allowed from the server's own machine", code="admin_required")


def is_loopback(host: str) -> bool:
    """Whether an address or name always means the machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _seats(engine: StepEngine | RoutedEngine) -> int:
    """Answers that are computed at once: in this process, or in all workers together."""
    if isinstance(engine, RoutedEngine):
        return engine.seats
    return engine.scheduler.max_num_seqs if isinstance(engine, Engine) else 0


def _unauthorised(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def _with_limits(send: Send, quota: Quota | None, settle: Callable[[], None] = lambda: None) -> Send:
    if quota is None:
        return send

    async def send_with_limits(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(quota.headers())
        elif not message.get("more_body", False):
            settle()  # before the client has the last byte: it may ask again at once
        await send(message)

    return send_with_limits

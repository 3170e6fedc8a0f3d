"""What those who run the server ask it: does it live, is it ready, what does it do."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel

from gristmill import __version__
from gristmill.serve.access.exposition import engines
from gristmill.serve.access.traffic import Traffic
from gristmill.serve.api.common import ERRORS, host_of
from gristmill.serve.errors import ApiError, closing
from gristmill.serve.host import SECONDS_TO_LOAD

router = APIRouter(responses=ERRORS)


class Health(BaseModel):
    """The server takes requests."""

    status: Literal["ok"]


class Ready(BaseModel):
    """All models are loaded."""

    status: Literal["ready"]
    models: list[str]


class Version(BaseModel):
    """Which server this is."""

    version: str


class EngineView(BaseModel):
    """An engine now: sequences, blocks and totals since it began. Rates are shares in [0, 1], null before the first."""

    model: str
    running: int
    waiting: int
    blocks_used: int
    blocks_cached: int
    blocks_free: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    finished_requests: int
    preempted: int
    steps: int
    cache_hit_rate: float | None
    acceptance: float | None
    overhead: float | None


class ServerView(BaseModel):
    """All engines, and the requests that are not over."""

    object: Literal["engine"]
    open_requests: int
    engines: list[EngineView]


@router.get("/health")
async def health(request: Request) -> Health:
    """200 while the process lives and its engines run, 503 when it is closing."""
    if not host_of(request).is_running:
        raise closing()
    return Health(status="ok")


@router.get("/ready")
async def ready(request: Request) -> Ready:
    """200 when every model is loaded; 503 names those that are not."""
    host = host_of(request)
    if not host.is_running:
        raise closing()
    states = {name: slot.state for name, slot in host.slots.items() if slot.hosted is None or not slot.hosted.is_ready}
    if states:
        told = ", ".join(f"{name} ({'failed' if state == 'failed' else 'loading'})" for name, state in states.items())
        headers = {"retry-after": str(SECONDS_TO_LOAD)}
        raise ApiError(503, f"not ready: {told}", code="model_loading", headers=headers)
    return Ready(status="ready", models=list(host.slots))


@router.get("/version")
async def version() -> Version:
    """The version of the server."""
    return Version(version=__version__)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Everything that is counted, as Prometheus reads it."""
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/engine")
async def engine(request: Request) -> ServerView:
    """The engines now, for the page's live view."""
    traffic: Traffic = request.app.state.traffic
    caller = request.state.caller
    fields = [field for field in EngineView.model_fields if field != "model"]
    views = [
        EngineView(model=name, **{field: getattr(found, field) for field in fields})
        for name, found in engines(host_of(request).slots)
        if caller.allows(name)
    ]
    return ServerView(object="engine", open_requests=traffic.open, engines=views)

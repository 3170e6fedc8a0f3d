"""The HTTP server: OpenAI's chat interface over one engine per model, and a page to chat with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import FileResponse, Response

from gristmill import __version__
from gristmill.engine.async_engine import AsyncEngine
from gristmill.errors import GristmillError, closest
from gristmill.serve import errors
from gristmill.serve.chat import Hosted, ServedModel, admit, event_stream, whole_answer
from gristmill.serve.connection import BodyLimit, Envelope, EventStream, while_connected
from gristmill.serve.errors import ApiError
from gristmill.serve.request import ChatCompletionRequest
from gristmill.serve.response import ChatCompletion, ChatCompletionChunk, ErrorBody, Health, ModelCard, ModelList

MAX_BODY_BYTES = 4 * 2**20

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {
    "index.html": "text/html",
    "style.css": "text/css",
    "app.js": "text/javascript",
    "api.js": "text/javascript",
    "store.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
"""The only files under /static, with their types (which must not depend on the machine's own table)."""

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be served as asked."},
    "5XX": {"model": ErrorBody, "description": "The server failed or is closing."},
}
CLIENT_LEFT = 499


def create_app(models: ServedModel | Sequence[ServedModel], *, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """The ASGI application. From its startup to its shutdown it owns the models' engines.

    Raises GristmillError for two models of one name and for a model whose chat template cannot be used.
    """
    served = list(models) if isinstance(models, Sequence) else [models]
    for model in served:
        _ = model.renderer  # made on first use, which must not be a request
    names = [model.model_name for model in served]
    if len(set(names)) < len(names) or not names:
        raise GristmillError(f"each served model needs a name of its own, got {names}")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engines = {id(model.engine): AsyncEngine(model.engine) for model in served}
        app.state.hosted = {model.model_name: Hosted(model, engines[id(model.engine)]) for model in served}
        try:
            yield
        finally:
            await drain(app, 0)

    # The interactive documentation of FastAPI loads scripts from elsewhere, so it stays off.
    app = FastAPI(title="Gristmill", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(api)
    app.include_router(page)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    app.add_middleware(Envelope)  # added last, so it is the outermost
    errors.install(app)
    return app


async def drain(app: FastAPI, seconds: float) -> None:
    """Refuse new requests, let the running ones finish for so long, end the rest with an error. Safe to call twice."""
    engines = {hosted.engine for hosted in app.state.hosted.values()}
    await asyncio.gather(*(asyncio.to_thread(engine.close, drain_seconds=seconds) for engine in engines))


api = APIRouter(responses=ERRORS)
page = APIRouter(include_in_schema=False)


async def json_only(request: Request) -> None:
    """Refuse other content types: a web page from elsewhere could send those without asking the browser first."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(400, "the body must be a JSON object, sent as application/json", code="invalid_json")


@api.get("/health")
async def health(request: Request) -> Health:
    """200 while requests are taken, 503 when the server is closing."""
    if all(hosted.engine.is_running for hosted in _hosted(request).values()):
        return Health(status="ok")
    raise ApiError(503, "the server is closing", code="server_closing")


@api.get("/v1/models")
async def list_models(request: Request) -> ModelList:
    """All models of this server."""
    return ModelList(object="list", data=[_card(hosted) for hosted in _hosted(request).values()])


@api.get("/v1/models/{name:path}")
async def get_model(name: str, request: Request) -> ModelCard:
    """One model of this server."""
    return _card(_find(request, name))


@api.post(
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
    hosted = _find(request, body.model)
    if body.stream:
        job = await while_connected(request.receive, admit(hosted, body))
        return Response(status_code=CLIENT_LEFT) if job is None else EventStream(event_stream(job), job.stream.aclose)

    async def answer() -> ChatCompletion:
        return await whole_answer(await admit(hosted, body))

    completion = await while_connected(request.receive, answer())
    if completion is None:
        return Response(status_code=CLIENT_LEFT)
    return Response(completion.model_dump_json(exclude_unset=True), media_type="application/json")


@page.api_route("/", methods=["GET", "HEAD"])
async def index() -> FileResponse:
    """The chat page."""
    return _file("index.html")


@page.api_route("/static/{name}", methods=["GET", "HEAD"])
async def static(name: str) -> FileResponse:
    """A file of the chat page."""
    if name not in PAGE_FILES:
        raise ApiError(404, "there is no such file", code="not_found")
    return _file(name)


def _file(name: str) -> FileResponse:
    return FileResponse(PAGE / name, media_type=PAGE_FILES[name], headers={"cache-control": "no-cache"})


def _hosted(request: Request) -> dict[str, Hosted]:
    hosted: dict[str, Hosted] = request.app.state.hosted
    return hosted


def _find(request: Request, name: str) -> Hosted:
    hosted = _hosted(request)
    if name not in hosted:
        message = f"model {name[:200]!r} is not served here.{closest(name[:200], hosted)} Served: {', '.join(hosted)}."
        raise ApiError(404, message, param="model", code="model_not_found")
    return hosted[name]


def _card(hosted: Hosted) -> ModelCard:
    return ModelCard(
        id=hosted.model.model_name,
        object="model",
        created=hosted.created,
        owned_by="gristmill",
        max_model_len=hosted.model.max_model_len,
    )

"""The HTTP application: OpenAI's interface over the models of a host, and a page to use them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse

from gristmill import __version__
from gristmill.serve import errors
from gristmill.serve.access.protection import Protection, protect
from gristmill.serve.api import chat, completions, files, models, operations, pooling, responses, tokens
from gristmill.serve.api.files import files_and_batches
from gristmill.serve.errors import ApiError
from gristmill.serve.host import Load, ModelHost, Source
from gristmill.serve.hosted import Servable
from gristmill.serve.routing.router import RequestRouter

PAGE = Path(__file__).parent / "page"
MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
"""Of the page's files; they must not depend on the machine's own table. Other files are not served."""


def create_app(
    served: Servable | Source | Sequence[Servable | Source],
    *,
    load: Load | None = None,
    protection: Protection | None = None,
    forbidden: Sequence[str] = (),
    data_dir: Path | None = None,
    routers: Sequence[RequestRouter] = (),
    watch_seconds: float | None = None,
) -> FastAPI:
    """The ASGI application. From its startup to its shutdown it owns the models' engines.

    served: models, and sources that are loaded with `load` once the server runs. protection: who may do what, and how
    much. forbidden: phrases that end an answer with the finish reason "content_filter". data_dir: where files and
    batches are kept; without it they go when the server ends. routers: names that stand for two models each.
    watch_seconds: how often to look whether a source has changed; None loads nothing anew by itself. Raises
    GristmillError for two models of one name, a router without its models, and a chat template that cannot be used.
    """
    host = ModelHost(list(served) if isinstance(served, Sequence) else [served], load, routers=routers)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await host.start()
        watching = None if watch_seconds is None else asyncio.ensure_future(host.watch(watch_seconds))
        try:
            async with files_and_batches(app, data_dir):
                yield
        finally:
            if watching is not None:
                watching.cancel()
            await host.close(0)

    # The interactive documentation of FastAPI loads scripts from elsewhere, so it stays off.
    app = FastAPI(title="Gristmill", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.host, app.state.forbidden = host, tuple(forbidden)
    for family in (chat, completions, responses, pooling, files, models, tokens, operations):
        app.include_router(family.router)
    app.include_router(page)
    protect(app, protection or Protection())
    errors.install(app)
    return app


page = APIRouter(include_in_schema=False)


@page.api_route("/", methods=["GET", "HEAD"])
async def index() -> FileResponse:
    """The chat page."""
    return _file("index.html")


@page.api_route("/static/{name:path}", methods=["GET", "HEAD"])
async def static(name: str) -> FileResponse:
    """A file of the chat page."""
    return _file(name)


def _file(name: str) -> FileResponse:
    path = PAGE / name
    try:
        path = path.resolve()
        found = path.suffix in MEDIA_TYPES and path.is_relative_to(PAGE.resolve()) and path.is_file()
    except (OSError, ValueError):  # a name that no file can have: too long, or with a zero byte
        found = False
    if not found:
        raise ApiError(404, "there is no such file", code="not_found")
    return FileResponse(path, media_type=MEDIA_TYPES[path.suffix], headers={"cache-control": "no-cache"})

"""A small app behind the whole protection, with one route that uses a model as the real ones do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import Response

from gristmill.core import SamplingParams
from gristmill.serve import errors
from gristmill.serve.access.gate import admit, require_admin, require_model
from gristmill.serve.access.keys import create_key
from gristmill.serve.access.protection import Protection, protect
from gristmill.serve.api import operations
from gristmill.serve.connection import EventStream, while_connected
from gristmill.serve.host import Load, ModelHost, Source
from gristmill.serve.hosted import Servable
from gristmill.serve.server import Tls
from serve.running import running
from serve.scripted_engine import ScriptedEngine, ScriptedLLM


def guarded(
    options: Protection, models: Sequence[Servable | Source] | None = None, load: Load | None = None
) -> FastAPI:
    """POST /say/{model} generates (`stream`, `reserve` in the query), POST /admin needs admin rights."""
    host = ModelHost(models or [ScriptedLLM(ScriptedEngine())], load)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await host.start()
        yield
        await host.close(0)

    app = FastAPI(lifespan=lifespan)
    app.state.host = host
    app.include_router(operations.router)
    errors.install(app)
    protect(app, options)

    @app.post("/say/{model}")
    async def say(model: str, request: Request, stream: bool = False, reserve: int = 20) -> Response:
        await request.body()
        hosted = host.find(model).hosted
        require_model(request, model)
        admit(request, hosted)
        request.state.caller.spend(reserve)
        assert hosted.engine is not None
        outputs = await hosted.engine.submit("Hi", SamplingParams(max_tokens=8))

        async def texts() -> AsyncIterator[str]:
            async with outputs:
                async for output in outputs:
                    request.state.note.progress(output)
                    yield f"data: {output.outputs[0].text}\n\n"

        async def whole() -> Response:
            return Response([text async for text in texts()][-1], media_type="text/plain")

        async def leave() -> None:
            outputs.leave()

        if stream:
            return EventStream(texts(), leave)
        return await while_connected(request.receive, whole()) or Response(status_code=499)

    @app.post("/admin")
    async def admin(request: Request) -> str:
        require_admin(request)
        return "yes"

    @app.get("/wait")
    async def wait() -> str:
        await asyncio.sleep(30)
        return "late"

    @app.get("/static/page.css")
    async def page() -> str:
        return "page"

    @app.get("/fail")
    async def fail() -> str:
        raise RuntimeError("a bug")

    return app


@contextmanager
def served(app: FastAPI, key: str = "", tls: Tls | None = None) -> Iterator[httpx.Client]:
    """A client of the running app."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with running(app, tls=tls) as url, httpx.Client(base_url=url, timeout=20, headers=headers, verify=False) as http:
        yield http


def key_file(directory: Path, **limits: object) -> tuple[Path, str]:
    """A file with the key "ann" of these limits, and its secret."""
    path = directory / "keys.json"
    return path, create_key(path, "ann", **limits)

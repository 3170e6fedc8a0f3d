"""A server on a scripted engine, one for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from gristmill.serve.app import create_app
from serve.running import running
from serve.scripted_engine import ScriptedEngine, ScriptedLLM


@dataclass
class Served:
    """The address of a server, the engine behind it and a client."""

    url: str
    engine: ScriptedEngine
    http: httpx.Client

    def body(self, **fields: object) -> dict[str, object]:
        """A valid request with these fields."""
        return {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}], **fields}

    def chat(self, **fields: object) -> httpx.Response:
        """The answer to a valid request with these fields."""
        return self.http.post("/v1/chat/completions", json=self.body(**fields))


@pytest.fixture(scope="module")
def _server() -> Iterator[Served]:
    engine = ScriptedEngine()
    app = create_app([ScriptedLLM(engine), ScriptedLLM(engine, "second")], max_body_bytes=100_000)
    with running(app) as url, httpx.Client(base_url=url, timeout=20) as http:
        yield Served(url, engine, http)


@pytest.fixture
def served(_server: Served) -> Iterator[Served]:
    """The server with an engine that has nothing to do, and the script it had at first."""
    engine = _server.engine
    script = engine.script
    engine.aborted.clear()
    engine.added.clear()
    yield _server
    engine.script, engine.step_seconds, engine.fail_with = script, 0.0, None
    engine.gate.set()

"""A server on a scripted engine, one for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from gristmill.serve.access.protection import Protection
from gristmill.serve.app import create_app
from serve.running import running
from serve.scripted_engine import ScriptedEngine, ScriptedLLM, byte_tokenizer


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
    models = [ScriptedLLM(engine), ScriptedLLM(engine, "second")]
    app = create_app(models, protection=Protection(max_body_bytes=100_000))
    with running(app) as url, httpx.Client(base_url=url, timeout=20) as http:
        yield Served(url, engine, http)


THINKING_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.reasoning_content %}{{ '<think>\\n' + message.reasoning_content + '\\n</think>\\n' }}{% endif %}"
    "{{ message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
"""As Qwen3's: the model begins its reasoning itself, unless `enable_thinking` is false."""


@pytest.fixture(scope="module")
def _thinker() -> Iterator[Served]:
    tokenizer = byte_tokenizer(("<think>", "</think>"), THINKING_TEMPLATE)
    engine = ScriptedEngine(lambda prompt: "<think>\nHm, a\n</think>\n\nYes.", tokenizer=tokenizer)
    with running(create_app(ScriptedLLM(engine))) as url, httpx.Client(base_url=url, timeout=20) as http:
        yield Served(url, engine, http)


@pytest.fixture
def thinker(_thinker: Served) -> Iterator[Served]:
    """A server whose model reasons."""
    yield from _afresh(_thinker)


@pytest.fixture(scope="module")
def _caller() -> Iterator[Served]:
    engine = ScriptedEngine(max_model_len=8192)
    with running(create_app(ScriptedLLM(engine))) as url, httpx.Client(base_url=url, timeout=20) as http:
        yield Served(url, engine, http)


@pytest.fixture
def caller(_caller: Served) -> Iterator[Served]:
    """A server whose model has room for tools in its context."""
    yield from _afresh(_caller)


@pytest.fixture
def served(_server: Served) -> Iterator[Served]:
    """The server with an engine that has nothing to do, and the script it had at first."""
    yield from _afresh(_server)


def _afresh(server: Served) -> Iterator[Served]:
    engine = server.engine
    script = engine.script
    engine.aborted.clear()
    engine.added.clear()
    engine.prompts.clear()
    engine.standings.clear()
    yield server
    engine.script, engine.step_seconds, engine.fail_with = script, 0.0, None
    engine.gate.set()

"""A server that keeps files, batches and responses, on a scripted engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI

from gristmill.serve.access.protection import Protection
from gristmill.serve.app import create_app
from gristmill.serve.routing.router import parse_router
from gristmill.tokens.renderer import JinjaRenderer
from gristmill.tokens.templates import CHATML
from serve.scripted_engine import ScriptedEngine, ScriptedLLM

THOUGHT = "('<think>\n' + message['reasoning_content'] + '\n</think>\n\n' if message['reasoning_content'] else '')"
THINKING = CHATML.replace("message['content']", f"{THOUGHT} + message['content']")
"""A template of a model that reasons."""


def keeping(engine: ScriptedEngine, directory: Path | None = None, **protection: Any) -> FastAPI:
    """The application, with `directory` for its files; its models are scripted and thinker, and auto is either."""
    thinker = ScriptedLLM(engine, "thinker")
    thinker.renderer = JinjaRenderer(engine.tokenizer, THINKING)
    routers = [parse_router("name=auto,small=scripted,large=thinker,threshold=1,by=text")]
    return create_app(
        [ScriptedLLM(engine), thinker], protection=Protection(**protection), data_dir=directory, routers=routers
    )

"""What a request took is free again once it is over, however it ended."""

from __future__ import annotations

import gc
import logging
import sys
import uuid
from pathlib import Path

import httpx
import pytest

from gristmill import LLM
from gristmill.serve.app import create_app
from serve.running import running, wait_for
from serve.tiny import save_tiny_model

ROUNDS = 15


def ask(client: httpx.Client, model: str) -> None:
    """Requests of every kind: answered whole and streamed, left in the middle, and refused in several ways."""
    chat = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
    long = {"model": model, "prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a", "b"]}}}
    for extra in ({}, {"stream": True}, {"n": 2, "logprobs": True, "top_logprobs": 3}, {"response_format": schema}):
        assert client.post("/v1/chat/completions", json=chat | extra).status_code == 200
    with client.stream("POST", "/v1/completions", json=long) as left:
        next(left.iter_raw())
    assert client.post("/v1/completions", json=long | {"prompt": "x" * 400}).status_code == 400
    for _ in range(5):
        name = uuid.uuid4().hex  # what clients make up must not stay
        assert client.get(f"/v1/{name}").status_code == 404
        assert client.post("/v1/chat/completions", json=chat | {"model": name}).status_code == 404
        assert client.post("/v1/chat/completions", json=chat | {name: 1}).status_code == 400


def test_objects_and_blocks_are_as_many_after_twice_as_many_requests(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "gristmill")  # pytest keeps all that is logged
    llm = LLM(save_tiny_model(tmp_path))
    app = create_app(llm)

    def after(rounds: int) -> tuple[int, int]:
        """Objects and blocks of memory in use after so many more requests of each kind."""
        for _ in range(rounds):
            ask(client, llm.model_name)
        wait_for(lambda: app.state.traffic.open == 0 and not llm.engine.has_unfinished())
        gc.collect()
        return len(gc.get_objects()), sys.getallocatedblocks()

    with running(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        for number in range(150):  # urllib remembers the last paths
            client.get(f"/v1/{number}")
        after(10)  # imports, compiled forms, cached prompts
        counts = [after(ROUNDS) for _ in range(3)]
    # what happens once, as a thread that begins, is in one difference; a leak is in all
    objects, blocks = (min(b - a, c - b) for a, b, c in zip(*counts, strict=True))
    assert objects < ROUNDS, "an object of some kind of request stays"
    assert blocks < 5 * ROUNDS, "something of some kind of request stays"

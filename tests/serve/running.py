"""A real HTTP server in a thread, for as long as a block lasts."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
from fastapi import FastAPI

from gristmill.serve.server import Server, Tls


@contextlib.contextmanager
def running(app: FastAPI, drain_seconds: int = 0, tls: Tls | None = None) -> Iterator[str]:
    """Serve `app` on a free port of 127.0.0.1 and yield its address."""
    server = Server(app, drain_seconds=drain_seconds, tls=tls)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        try:
            yield f"http{'s' if tls else ''}://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


def leave(url: str, path: str, body: object, when: Callable[[], Any]) -> None:
    """Post a body, and leave without an answer as soon as the condition holds."""

    async def main() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            asked = asyncio.create_task(http.post(path, json=body))
            await asyncio.to_thread(wait_for, when)
            assert not asked.done()
            asked.cancel()
            await asyncio.wait({asked})

    asyncio.run(main())


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    """Poll until the condition holds; fail after so long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)

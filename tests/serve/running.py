"""A real HTTP server in a thread, for as long as a block lasts."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

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
            thread.join(10)
    assert not thread.is_alive()


def wait_for(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    """Poll until the condition holds; fail after so long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)

"""uvicorn with an end that its clients can understand."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from gristmill.serve.app import drain

# Time for a reader that does not take what is sent, after the engines have stopped.
SLOW_READER_SECONDS = 3


class Server(uvicorn.Server):
    """Serves an app of `create_app` on a bound socket, and calls `on_started` once requests are answered.

    When it is told to stop, new requests are refused, running ones get `drain_seconds` to finish, and those that
    need longer end with an error that says so.
    """

    def __init__(self, app: FastAPI, *, drain_seconds: int = 3, on_started: Callable[[], None] = lambda: None) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=drain_seconds + SLOW_READER_SECONDS,
        )
        super().__init__(config)
        self.app = app
        self.drain_seconds = drain_seconds
        self.on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then tell so."""
        await super().startup(sockets)
        if self.started:
            self.on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop the engines while uvicorn waits for the connections that use them."""
        await asyncio.gather(super().shutdown(sockets), drain(self.app, self.drain_seconds))

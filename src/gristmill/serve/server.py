"""uvicorn with an end that its clients can understand."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from gristmill.errors import GristmillError

# Time for a reader that does not take what is sent, after the engines have stopped.
SLOW_READER_SECONDS = 3


@dataclass(frozen=True)
class Tls:
    """A certificate (with the chain up to its root, in PEM) and its private key, which must not need a password.

    Raises GristmillError when they cannot be read or do not belong together.
    """

    certificate: Path
    key: Path

    def __post_init__(self) -> None:
        try:
            # the password is asked for by a callback, or else on the terminal, where a server would wait for ever
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate, self.key, password=lambda: "")
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise GristmillError(f"TLS with {self.certificate} and {self.key}: {error}") from error


class Server(uvicorn.Server):
    """Serves an app of `create_app` on a bound socket, and calls `on_ready` once all models are loaded.

    When a model cannot be loaded it stops, with a `failure`. When it is told to stop, new requests are refused, running
    ones get `drain_seconds` to finish, and those that need longer end with an error that says so. A second Ctrl-C ends
    them at once, a third waits for nobody.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        drain_seconds: int = 3,
        tls: Tls | None = None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=drain_seconds + SLOW_READER_SECONDS,
            ssl_certfile=None if tls is None else str(tls.certificate),
            ssl_keyfile=None if tls is None else str(tls.key),
        )
        super().__init__(config)
        self.app = app
        self.drain_seconds = drain_seconds
        self.on_ready = on_ready
        self.failure: GristmillError | None = None
        self._hurry = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and tell when the models are there."""
        await super().startup(sockets)
        if self.started:
            self._loading = asyncio.ensure_future(self._wait_for_models())

    async def _wait_for_models(self) -> None:
        failed = await self.app.state.host.wait()
        if failed:
            slot = failed[0]
            reason = str(getattr(slot.error, "detail", slot.error))  # of an ApiError without its status
            told = reason.startswith(slot.source.model)
            self.failure = GristmillError(reason if told else f"{slot.source.model}: {reason}")
            self.should_exit = True
        elif not self.should_exit:
            self.on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop the engines while uvicorn waits for the connections that use them."""
        hurrying = asyncio.ensure_future(self._end_at_once())
        await asyncio.gather(super().shutdown(sockets), self.app.state.host.close(self.drain_seconds))
        hurrying.cancel()

    async def _end_at_once(self) -> None:
        await self._hurry.wait()
        await self.app.state.host.close(0)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop; uvicorn's own second Ctrl-C would cut the connections while the engines go on."""
        if not self.should_exit or self._hurry.is_set() or sig != signal.SIGINT:
            super().handle_exit(sig, frame)
        else:
            asyncio.get_running_loop().call_soon_threadsafe(self._hurry.set)

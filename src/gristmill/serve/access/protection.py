"""All that stands between the network and the routes, in one place and in one order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from gristmill.errors import GristmillError
from gristmill.serve.access.exposition import registry_of
from gristmill.serve.access.gate import Gate
from gristmill.serve.access.keys import KeyFile
from gristmill.serve.access.traffic import Traffic
from gristmill.serve.connection import BodyLimit, Envelope, TimeLimit
from gristmill.serve.host import Slot


@dataclass(frozen=True, kw_only=True)
class Protection:
    """Who may do what and for how long. The defaults suit a server on loopback."""

    keys: Path | None = None
    """File of API keys; None lets everybody in."""
    metrics_open: bool = False
    """Let /metrics be read without a key."""
    max_body_bytes: int = 4 * 2**20
    max_upload_bytes: int = 201 * 2**20
    """The same for /v1/files."""
    body_seconds: float = 60.0
    """A body must have come by then, or later as far as it is large."""
    request_seconds: float | None = None
    """A request must be over by then; None lets it take its time."""
    max_waiting: int | None = None
    """Most requests that wait for a model; None for any number."""
    cors_origins: tuple[str, ...] = ()
    """Origins (https://example.org) whose pages may use the server; ("*",) for all."""
    log_bodies: bool = False
    """Write prompts and answers into the log."""

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_upload_bytes", "body_seconds", "request_seconds", "max_waiting"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise GristmillError(f"{name} must be above 0, got {value}")
        for origin in self.cors_origins:
            if origin != "*" and (not origin.startswith(("http://", "https://")) or origin.count("/") != 2):
                raise GristmillError(
                    f"cors_origins: {origin!r} is no origin. Write https://example.org, without a path."
                )


def protect(app: FastAPI, options: Protection) -> None:
    """Put the layers around an app, and what they count into its state.

    Raises GristmillError when the key file is no good.
    """
    traffic = app.state.traffic = Traffic()
    app.state.max_waiting = options.max_waiting

    def slots() -> Mapping[str, Slot]:
        found: Mapping[str, Slot] = app.state.host.slots
        return found

    app.state.registry = registry_of(traffic, slots)
    keys = KeyFile(options.keys) if options.keys is not None else None
    # from the inside to the outside: what is added last comes first
    app.add_middleware(
        BodyLimit,
        max_bytes=options.max_body_bytes,
        upload_bytes=options.max_upload_bytes,
        seconds=options.body_seconds,
    )
    if options.request_seconds is not None:
        app.add_middleware(TimeLimit, seconds=options.request_seconds)
    app.add_middleware(Gate, keys=keys, metrics_open=options.metrics_open)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Envelope, traffic=traffic, log_bodies=options.log_bodies)

"""One request that another process answers: from the items that come of it to the stream that is read here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from gristmill.core import RequestOutput
from gristmill.engine.async_engine import RequestStream
from gristmill.serve.errors import ApiError
from gristmill.serve.routing.delta import grow
from gristmill.serve.routing.worker import About, Item, Work


class WorkerDied(ApiError):
    """The process that answered is gone, or none is there yet. Another one starts: it is worth trying again."""

    def __init__(self, message: str = "the worker that answered this request died; try again") -> None:
        super().__init__(503, message, code="worker_died", headers={"retry-after": "1"})


class Feed:
    """Made on the event loop that reads the stream, and used on it alone, but for `send`.

    engine: whose `abort` ends the request. on_end: called once, when no more items count.
    """

    def __init__(self, engine: Any, work: Work, on_end: Callable[[], None]) -> None:
        self.work, self.stream = work, RequestStream(engine, work.request_id)
        self.admitted: asyncio.Future[None] = self.stream.loop.create_future()
        self._so_far: RequestOutput | None = None
        self._on_end, self._ended = on_end, False

    def send(self, item: Item) -> None:
        """`take`, from any thread. Nobody waits on a loop that is closed."""
        with suppress(RuntimeError):
            self.stream.loop.call_soon_threadsafe(self.take, item)

    def take(self, item: Item) -> None:
        """Pass an item on."""
        if self._ended:
            return
        if item is None:
            self._settle(None)
        elif isinstance(item, Exception):
            if not self._settle(item):
                self.stream.put(item)
            self.end()
        else:
            self._so_far = grow(self._so_far, item)
            self.stream.put(self._so_far)
            if item.finished:
                self.end()

    def end(self) -> None:
        """Nothing that still comes counts."""
        if not self._ended:
            self._ended = True
            self._on_end()

    def _settle(self, error: Exception | None) -> bool:
        """Answer whoever waits for admission; False when nobody does any more."""
        if self.admitted.done():
            return False
        if error is None:
            self.admitted.set_result(None)
        else:
            self.admitted.set_exception(error)
        return True


class Replica(Protocol):
    """A worker wherever it runs. Each implementation starts it, and starts it again when it dies."""

    @property
    def about(self) -> About:
        """What the worker said of itself when it last began."""

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests now."""

    @property
    def restarts(self) -> int:
        """How often it was started again."""

    def send(self, feed: Feed) -> None:
        """Give it a request, on the feed's loop. Raises WorkerDied when it is not ready."""

    def abort(self, request_id: str) -> None:
        """End a request; its feed gets nothing more. An unknown id is ignored."""

    def call(self, name: str, *arguments: Any) -> Any:
        """What a method of its model gives or raises. Blocks. Raises WorkerDied."""

    def close(self) -> None:
        """End it; requests that run get EngineClosed."""

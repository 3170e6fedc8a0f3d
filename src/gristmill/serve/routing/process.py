"""A worker in a child process of this one, started again whenever it dies."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from gristmill.engine.async_engine import EngineClosed
from gristmill.errors import GristmillError
from gristmill.serve.routing.feed import Feed, WorkerDied
from gristmill.serve.routing.worker import About, Call, Work, work

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a worker is started again; twice as long each time, until it has answered something."""


class EngineProcess:
    """A `Replica` on this machine. A thread of its own starts it, reads what it says and starts it again.

    patience: seconds without a word, while requests run, after which the process is killed as hung.
    """

    def __init__(self, model: str, options: Mapping[str, Any], *, threads: int, patience: float = 300.0) -> None:
        self.is_ready, self.restarts = False, 0
        self._arguments, self._patience = (model, options, threads), patience
        self._lock = threading.Lock()  # over the next five
        self._feeds: dict[str, Feed] = {}
        self._calls: dict[int, Future[Any]] = {}
        self._outbox: SimpleQueue[Work | Call | str | None] = SimpleQueue()
        self._process: multiprocessing.process.BaseProcess | None = None
        self._closed = threading.Event()
        self._numbers = itertools.count()
        self._first: Future[About] = Future()
        self._about: About | None = None
        self._thread = threading.Thread(target=self._supervise, name="worker", daemon=True)
        self._thread.start()

    @property
    def about(self) -> About:
        """Blocks until the worker has begun once. Raises what kept it from that."""
        return self._about or self._first.result()

    def send(self, feed: Feed) -> None:
        """See `Replica.send`."""
        with self._lock:
            if not self.is_ready:
                raise WorkerDied("the worker is starting again; try again")
            self._feeds[feed.work.request_id] = feed
            self._outbox.put(feed.work)

    def abort(self, request_id: str) -> None:
        """See `Replica.abort`."""
        with self._lock:
            if self._feeds.pop(request_id, None) is not None:
                self._outbox.put(request_id)

    def call(self, name: str, *arguments: Any) -> Any:
        """See `Replica.call`."""
        future: Future[Any] = Future()
        with self._lock:
            if not self.is_ready:
                raise WorkerDied("the worker is starting again; try again")
            number = next(self._numbers)
            self._calls[number] = future
            self._outbox.put(Call(number, name, arguments))
        return future.result()

    def close(self) -> None:
        """See `Replica.close`. Safe to call twice."""
        with self._lock:
            self._closed.set()
            if self._process is not None:
                self._process.kill()
        self._thread.join()

    # Everything below runs on the worker's thread.

    def _supervise(self) -> None:
        pauses = 0
        while not self._closed.is_set():
            try:
                connection = self._launch()
            except Exception as error:  # no memory for it, or options that cannot be sent
                logger.error("a worker cannot be started: %s", error)
                if self._about is None:
                    self._fail_first(GristmillError(f"a worker cannot be started: {error}"))
                    break
                self._closed.wait(LONGEST_PAUSE)
                continue
            if connection is None:
                break
            try:
                if self._begun(connection):
                    pauses = 0 if self._listen(connection) else pauses
            finally:
                code = self._end(connection)
            if self._about is None:
                self._fail_first(GristmillError(f"the worker ended with code {code} before it had begun"))
                break
            if not self._closed.is_set():
                logger.error("a worker ended with code %s; it is started again", code)
                self.restarts += 1
                self._closed.wait(min(LONGEST_PAUSE, FIRST_PAUSE * 2**pauses))
                pauses += 1
        self._fail_first(EngineClosed("the worker was closed before it had begun"))

    def _launch(self) -> Connection | None:
        """Start the process; None when `close` was faster."""
        context = multiprocessing.get_context("forkserver")
        connection, other = context.Pipe()
        with self._lock:
            if self._closed.is_set():
                return None
            process = context.Process(target=work, args=(other, *self._arguments), daemon=True)
            process.start()
            self._process = process
        other.close()  # or the end of the process would not be the end of the connection
        return connection

    def _begun(self, connection: Connection) -> bool:
        try:
            first = connection.recv()
        except (EOFError, OSError):
            return False
        if isinstance(first, Exception):
            logger.error("a worker could not begin: %s", first)
            self._fail_first(first)
            return False
        with self._lock:
            self._about, self._outbox, self.is_ready = first, SimpleQueue(), True
            threading.Thread(target=_post, args=(connection, self._outbox), daemon=True).start()
        if not self._first.done():
            self._first.set_result(first)
        return True

    def _listen(self, connection: Connection) -> bool:
        """Pass on what the process says until it is gone; True when it has said something."""
        spoke = False
        with suppress(EOFError, OSError):
            while True:
                busy = bool(self._feeds)
                if not connection.poll(self._patience):
                    if busy and self._feeds:
                        logger.error("a worker has said nothing for %g s and is ended", self._patience)
                        return spoke
                    continue
                key, value = connection.recv()
                spoke = True
                with self._lock:
                    future = self._calls.pop(key, None) if isinstance(key, int) else None
                    feed = self._feeds.get(key)
                    if isinstance(value, Exception) or getattr(value, "finished", False):
                        self._feeds.pop(key, None)
                if feed is not None:
                    feed.send(value)
                elif future is not None:
                    _settle(future, value)
        return spoke

    def _end(self, connection: Connection) -> int | None:
        """Let the process go, and tell all that wait for it."""
        assert self._process is not None
        with self._lock:
            self.is_ready = False
            feeds, self._feeds = self._feeds, {}
            calls, self._calls = self._calls, {}
            self._outbox.put(None)
        self._process.kill()
        self._process.join()
        connection.close()
        closed = self._closed.is_set()
        for feed in feeds.values():
            feed.send(EngineClosed("the server is closing") if closed else WorkerDied())
        for future in calls.values():
            future.set_exception(EngineClosed("the server is closing") if closed else WorkerDied())
        return self._process.exitcode

    def _fail_first(self, error: Exception) -> None:
        if not self._first.done():
            self._first.set_exception(error)


def _post(connection: Connection, outbox: SimpleQueue[Work | Call | str | None]) -> None:
    """Messages leave by a thread, so that a worker that does not read them stops nobody."""
    with suppress(OSError):
        while (message := outbox.get()) is not None:
            connection.send(message)


def _settle(future: Future[Any], value: Any) -> None:
    if isinstance(value, Exception):
        future.set_exception(value)
    else:
        future.set_result(value)

"""Lets many coroutines share one engine: a worker thread owns the engine and steps it while there is work.

Whoever wants something of the engine queues a command; the thread runs the queue between two steps and sleeps when
nobody waits. A step ends with one wake-up per event loop, whatever the number of requests. A stream keeps only the
newest output (outputs are cumulative), so a slow reader costs neither memory nor the others' time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Protocol, TypeVar

from gristmill.core import Prompt, RequestOutput, SamplingParams
from gristmill.engine.request import Standing
from gristmill.errors import RequestError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class StepEngine(Protocol):
    """What is needed of an engine. Only one thread ever calls it."""

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        standing: Standing | None = None,
        adapter: str | None = None,
    ) -> str:
        """Queue a request and return its id. Raises RequestError when it cannot be served as asked."""

    def step(self) -> list[RequestOutput]:
        """Advance the running requests; the cumulative output of each that advanced or finished."""

    def abort(self, request_id: str) -> None:
        """Forget a request and free what it holds. An unknown id is ignored."""

    def has_unfinished(self) -> bool:
        """Whether a step has anything to do."""


class EngineFailure(RuntimeError):
    """A step failed, and with it the requests that were waiting. `__cause__` is the engine's own exception."""


class EngineClosed(RuntimeError):
    """The engine was closed before the request was done."""


class RequestStream:
    """The outputs of one admitted request; ends after the finished one.

    Use it as `async with stream: async for output in stream: ...`; leaving the block early aborts the request.
    """

    def __init__(self, engine: AsyncEngine, request_id: str) -> None:
        self.request_id = request_id
        self.loop = asyncio.get_running_loop()
        self._engine = engine
        self._arrived = asyncio.Event()
        self._latest: RequestOutput | None = None
        self._error: Exception | None = None
        self._ended = False

    def put(self, item: RequestOutput | Exception) -> None:
        """Replace the output that waits to be read, or end the stream with an error. Runs on the stream's loop."""
        if isinstance(item, Exception):
            self._error = item
        else:
            self._latest = item
        self._arrived.set()

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._ended:
            raise StopAsyncIteration
        await self._arrived.wait()
        self._arrived.clear()
        if self._latest is None:
            self._ended = True
            raise self._error if self._error is not None else EngineClosed("the request was left")
        output, self._latest = self._latest, None
        if output.finished:
            self._ended = True
        elif self._error is not None:
            self._arrived.set()
        return output

    def leave(self) -> None:
        """Abort the request if it still runs. Does not wait for the engine."""
        if not self._ended:
            self._ended = True
            self._arrived.set()
            self._engine.abort(self.request_id)

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()


CROWD = 8
"""Requests in a step from which on outputs are held back."""


class AsyncEngine:
    """An engine that coroutines of any event loop can use at once. From now on nobody else may call `engine`.

    pause: with CROWD requests or more in a step, a request's outputs come no more often than so many seconds, but for
    its first and its last: 32 streams take 1.6 ms of a core to pass on, a tenth of what a fast engine needs for a step.
    """

    def __init__(self, engine: StepEngine, *, pause: float = 0.03) -> None:
        self._engine = engine
        self._pause, self._passed_on = pause, 0.0
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._streams: dict[str, RequestStream] = {}  # this and the next two belong to the worker thread
        self._begun: set[str] = set()  # those of them that had an output
        self._stop_at: float | None = None
        self._closing = False
        self._admission = threading.Lock()  # no request is queued behind the command that stops the thread
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether requests are taken: True until `close`."""
        return self._thread.is_alive() and not self._closing

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None = None,
        *,
        standing: Standing | None = None,
        adapter: str | None = None,
    ) -> RequestStream:
        """Admit a request and return the stream of its outputs.

        Raises RequestError when the engine refuses the request, EngineClosed after `close`.
        """
        stream = RequestStream(self, request_id or uuid.uuid4().hex)
        admitted: asyncio.Future[None] = stream.loop.create_future()
        add = partial(self._engine.add, prompt, params, request_id=stream.request_id, standing=standing)
        self._command(lambda: self._admit(stream, partial(add, adapter=adapter), admitted))
        try:
            await admitted
        except asyncio.CancelledError:
            self.abort(stream.request_id)
            raise
        return stream

    async def generate(
        self, prompt: Prompt, params: SamplingParams, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Cumulative outputs of one request, without those that a newer one replaced while the caller was busy.

        Closing the iterator early aborts the request. Raises what `submit` raises, EngineFailure when a step fails,
        and EngineClosed when the engine is closed before the end.
        """
        async with await self.submit(prompt, params, request_id) as stream:
            async for output in stream:
                yield output

    async def run(self, function: Callable[[], T]) -> T:
        """The result of a function that needs the engine for itself, called between two steps.

        Raises what it raises, and EngineClosed after `close`. Nothing else goes on while it runs.
        """
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def call() -> None:
            if result.cancelled():
                return
            try:
                value = function()
            except Exception as error:
                _call(loop, _settle, result, None, error)
            else:
                _call(loop, _settle, result, value, None)

        self._command(call)
        return await result

    def abort(self, request_id: str) -> None:
        """End a request and free what it holds before the next step; who still reads it gets EngineClosed.

        An unknown id is ignored.
        """
        self._commands.put(lambda: self._abort(request_id))

    def _command(self, command: Callable[[], None]) -> None:
        """Queue what somebody awaits. Raises EngineClosed after `close`."""
        with self._admission:
            if self._closing:
                raise EngineClosed("the engine is closed")
            self._commands.put(command)

    def close(self, *, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, give the running ones so long to finish, abort the rest and stop the thread.

        Blocks until the thread has stopped; requests that did not finish raise EngineClosed. Safe to call twice.
        """
        with self._admission:
            self._closing = True
        deadline = time.monotonic() + drain_seconds
        self._commands.put(lambda: self._stop_by(deadline))
        self._thread.join()

    # Everything below runs on the worker thread.

    def _work(self) -> None:
        while True:
            self._run_commands()
            if self._stop_at is not None and (not self._streams or time.monotonic() >= self._stop_at):
                break
            if self._streams:
                self._step()
        self._fail_all(partial(EngineClosed, "the engine was closed before the request was done"))

    def _run_commands(self) -> None:
        """Run what is queued; sleep until something is when nobody waits for a step."""
        sleep = not self._streams and self._stop_at is None
        with contextlib.suppress(Empty):
            while True:
                self._commands.get(block=sleep)()
                sleep = False

    def _stop_by(self, deadline: float) -> None:
        self._stop_at = deadline if self._stop_at is None else min(deadline, self._stop_at)

    def _admit(self, stream: RequestStream, add: Callable[[], str], admitted: asyncio.Future[None]) -> None:
        refusal: Exception | None = None
        if stream.request_id in self._streams:
            refusal = RequestError(f"request {stream.request_id!r} is already running", field="request_id")
        else:
            try:
                add()
                self._streams[stream.request_id] = stream
            except Exception as error:
                refusal = error
        if not _call(stream.loop, _settle, admitted, None, refusal) and refusal is None:
            self._forget(stream.request_id)

    def _abort(self, request_id: str) -> None:
        stream = self._streams.get(request_id)
        self._forget(request_id)
        if stream is not None:
            _call(stream.loop, stream.put, EngineClosed("the request was aborted"))

    def _forget(self, request_id: str) -> None:
        self._streams.pop(request_id, None)
        self._begun.discard(request_id)
        try:
            self._engine.abort(request_id)
        except Exception:
            logger.exception("the engine could not abort request %s", request_id)

    def _step(self) -> None:
        try:
            outputs = self._engine.step()
            lost = not self._engine.has_unfinished()
        except Exception as error:
            logger.exception("an engine step failed; the %d requests in it end with an error", len(self._streams))
            self._fail_all(partial(_failure, "the engine failed in this step", error))
            return
        self._deliver(outputs)
        if lost and self._streams:
            logger.error("the engine forgot %d requests", len(self._streams))
            self._fail_all(partial(_failure, "the engine forgot the request", None))

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        now = time.monotonic()
        if len(outputs) >= CROWD and now - self._passed_on < self._pause:
            # the next outputs hold all that these do
            outputs = [o for o in outputs if o.finished or o.request_id not in self._begun]
        else:
            self._passed_on = now
        by_loop: defaultdict[asyncio.AbstractEventLoop, list[tuple[RequestStream, RequestOutput]]] = defaultdict(list)
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                by_loop[stream.loop].append((stream, output))
                self._begun.add(output.request_id)
            if output.finished:
                self._streams.pop(output.request_id, None)
                self._begun.discard(output.request_id)
        for loop, pairs in by_loop.items():
            if not _call(loop, _put_all, pairs):
                for stream, _ in pairs:
                    self._forget(stream.request_id)

    def _fail_all(self, error: Callable[[], Exception]) -> None:
        for request_id, stream in list(self._streams.items()):
            self._forget(request_id)
            _call(stream.loop, stream.put, error())  # an exception object each: tasks write their traceback into it


def _put_all(pairs: list[tuple[RequestStream, RequestOutput]]) -> None:
    for stream, output in pairs:
        stream.put(output)


def _settle(future: asyncio.Future[T], value: T, error: Exception | None) -> None:
    if future.done():  # the caller was cancelled
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> bool:
    """Run `function` soon on `loop`; False when the loop is closed, and with it whoever waited there."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        return False
    return True


def _failure(message: str, cause: Exception | None) -> EngineFailure:
    failure = EngineFailure(message)
    failure.__cause__ = cause
    return failure

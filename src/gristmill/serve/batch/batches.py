"""Batches: files of requests that are answered in the background, as if each line had come over HTTP.

The lines are checked first. Then each is sent to the application itself, without a network, so it meets the route that
its body is for and nothing else. An answer is written down when it comes and never asked for again: a batch whose
server was killed goes on where it stood. At the end the answers become an output file and those that tell an error an
error file, in the order of the input.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from starlette.types import ASGIApp, Message

from gristmill.serve.batch.lines import BatchLine, check_lines, read_lines
from gristmill.serve.batch.storage import Storage
from gristmill.serve.errors import ApiError
from gristmill.serve.wire.files import Batch, BatchQuery, BatchRequest, FileObject, LineError, LineErrors

logger = logging.getLogger(__name__)

Outcome = Literal["completed", "expired", "cancelled"]

CONCURRENCY = 8
LATER = 1000
"""The priority of a line that names none: after whoever waits for an answer."""
BUSY = (429, 503)
"""Answers that are no answer: the line is asked again when the server, or its owner's quota, has room."""
LONGEST_PAUSE = 60.0

LEFT_OUT = {
    "expired": {"code": "batch_expired", "message": "The completion window ended before this request was answered."},
    "cancelled": {"code": "batch_cancelled", "message": "The batch was cancelled before this request was answered."},
}


@dataclass(frozen=True)
class Reply:
    """What a route answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass
class _Run:
    """A batch that has not ended. `work` is what a cancellation interrupts."""

    batch: Batch
    owner: str
    work: asyncio.Task[None] | None = None
    answered: dict[int, bool] = field(default_factory=dict)


class Batches:
    """The batches of a server; `async with` it while the server runs, which goes on with the unfinished ones.

    `call(owner, endpoint, body)` answers a request of that owner. At most `concurrency` lines of all batches are in
    flight. `clock` tells Unix seconds. The methods raise ApiError 404 for what the owner does not have.
    """

    def __init__(
        self,
        storage: Storage,
        call: Callable[[str, str, bytes], Awaitable[Reply]],
        *,
        concurrency: int = CONCURRENCY,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._storage = storage
        self._call = call
        self._clock = clock
        self._free = asyncio.Semaphore(concurrency)
        self._runs: dict[str, _Run] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Batches:
        for batch, owner in self._storage.unfinished():
            self._start(batch, owner)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def create(self, request: BatchRequest, owner: str) -> Batch:
        """Begin a batch. Raises ApiError for an input file that is not there or is none."""
        try:
            file = self._storage.file(request.input_file_id, owner)
        except ApiError as error:
            raise ApiError(404, error.detail, param="input_file_id", code=error.code) from None
        if file.purpose != "batch":
            raise ApiError(400, f"{file.id} was not uploaded for a batch", param="input_file_id", code="invalid_value")
        now = int(self._clock())
        batch = Batch(
            id=f"batch_{uuid.uuid4().hex}",
            endpoint=request.endpoint,
            input_file_id=file.id,
            completion_window=request.completion_window,
            created_at=now,
            expires_at=now + request.seconds,
            metadata=request.metadata,
        )
        self._storage.add(batch, owner)
        self._start(batch, owner)
        return batch

    def get(self, name: str, owner: str) -> Batch:
        """A batch as it stands now."""
        return self._now(self._storage.batch(name, owner))

    def page(self, owner: str, query: BatchQuery) -> tuple[list[Batch], bool]:
        """Batches, newest first, and whether there are more."""
        batches, more = self._storage.batches(owner, query)
        return [self._now(batch) for batch in batches], more

    def cancel(self, name: str, owner: str) -> Batch:
        """Stop a batch; what was answered is in its files. Raises ApiError 400 for one that has ended."""
        batch = self.get(name, owner)
        if batch.status == "cancelling":
            return batch
        run = self._runs.get(batch.id)
        if run is None or batch.status == "finalizing":
            raise ApiError(400, f"the batch is {batch.status}: it cannot be cancelled", code="batch_ended")
        batch.status, batch.cancelling_at = "cancelling", int(self._clock())
        self._storage.save(batch)
        if run.work is not None:
            run.work.cancel()
        return batch

    def uses(self, file: FileObject) -> bool:
        """Whether a batch that has not ended reads this file."""
        return any(run.batch.input_file_id == file.id for run in self._runs.values())

    def _now(self, batch: Batch) -> Batch:
        return self._runs[batch.id].batch if batch.id in self._runs else batch

    def _start(self, batch: Batch, owner: str) -> None:
        self._runs[batch.id] = run = _Run(batch, owner)
        task = asyncio.create_task(self._run(run))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, run: _Run) -> None:
        """Take a batch from where it stands to its end."""
        batch = run.batch
        try:
            if batch.status == "validating" and not await self._is_valid(batch):
                return
            outcome = await self._worked(run)
            if outcome == "completed":
                batch.status, batch.finalizing_at = "finalizing", int(self._clock())
                self._storage.save(batch)
            outputs = await asyncio.to_thread(self._write_outputs, run, outcome)
            batch.output_file_id, batch.error_file_id = (file.id if file is not None else None for file in outputs)
            batch.status = outcome
            setattr(batch, f"{outcome}_at", int(self._clock()))
            self._storage.finish(batch, run.owner, filter(None, outputs))
        except Exception:  # a full disk, or a bug: the batch ends, the server goes on
            logger.exception("batch %s failed", batch.id)
            what = LineError(code="internal_error", line=None, message="the server's log says more", param=None)
            self._fail(batch, [what])
        finally:
            del self._runs[batch.id]

    def _fail(self, batch: Batch, errors: list[LineError]) -> None:
        batch.status, batch.failed_at, batch.errors = "failed", int(self._clock()), LineErrors(data=errors)
        self._storage.save(batch)

    async def _is_valid(self, batch: Batch) -> bool:
        total, errors = await asyncio.to_thread(check_lines, self._input(batch), batch.endpoint)
        if batch.status == "cancelling":
            return True
        batch.request_counts.total = total
        if errors:
            self._fail(batch, errors)
            return False
        batch.status, batch.in_progress_at = "in_progress", int(self._clock())
        self._storage.save(batch)
        return True

    async def _worked(self, run: _Run) -> Outcome:
        """Ask the lines that have no answer yet, until all have one, the window ends or the batch is cancelled."""
        batch = run.batch
        run.answered = self._storage.answered(batch)
        batch.request_counts.completed = sum(run.answered.values())
        batch.request_counts.failed = len(run.answered) - sum(run.answered.values())
        if batch.status == "cancelling":
            return "cancelled"
        if len(run.answered) == batch.request_counts.total:
            return "completed"
        run.work = asyncio.create_task(self._ask_all(run))
        try:
            await asyncio.wait({run.work}, timeout=max(0.0, batch.expires_at - self._clock()))
            if run.work.done() and not run.work.cancelled():
                run.work.result()
                return "completed"
            return "cancelled" if run.work.done() else "expired"
        finally:
            run.work.cancel()
            await asyncio.wait({run.work})

    async def _ask_all(self, run: _Run) -> None:
        async with asyncio.TaskGroup() as group:
            for number, line in read_lines(self._input(run.batch), run.batch.endpoint):
                if number not in run.answered:
                    await self._free.acquire()
                    task = group.create_task(self._ask(run, number, line))
                    task.add_done_callback(lambda _: self._free.release())

    async def _ask(self, run: _Run, number: int, line: BatchLine) -> None:
        batch = run.batch
        body = line.body if batch.endpoint == "/v1/embeddings" else {"priority": LATER, **line.body}
        reply = await self._reply(run.owner, batch.endpoint, json.dumps(body).encode())
        fine = reply.status < 400
        request_id = reply.headers.get("x-request-id", "")
        response = {"status_code": reply.status, "request_id": request_id, "body": json.loads(reply.body)}
        self._storage.add_line(batch, number, fine, _entry(line, response, None))
        run.answered[number] = fine
        batch.request_counts.completed += fine
        batch.request_counts.failed += not fine

    async def _reply(self, owner: str, endpoint: str, body: bytes) -> Reply:
        pause = 1.0
        while True:
            reply = await self._call(owner, endpoint, body)
            if reply.status not in BUSY:
                return reply
            told = reply.headers.get("retry-after", "")
            await asyncio.sleep(min(float(told) if told.isdecimal() else pause, LONGEST_PAUSE))
            pause *= 2

    def _write_outputs(self, run: _Run, outcome: Outcome) -> tuple[FileObject | None, FileObject | None]:
        batch = run.batch
        failures = chain(self._storage.entries(batch, False), self._left_out(run, outcome))
        return (
            self._write(f"{batch.id}_output.jsonl", self._storage.entries(batch, True)),
            self._write(f"{batch.id}_error.jsonl", failures),
        )

    def _write(self, filename: str, entries: Iterator[bytes]) -> FileObject | None:
        first = next(entries, None)
        return None if first is None else self._storage.write(filename, "batch_output", chain((first,), entries))

    def _left_out(self, run: _Run, outcome: Outcome) -> Iterator[bytes]:
        if outcome != "completed" and run.batch.in_progress_at is not None:
            for number, line in read_lines(self._input(run.batch), run.batch.endpoint):
                if number not in run.answered:
                    yield _entry(line, None, LEFT_OUT[outcome])

    def _input(self, batch: Batch) -> Path:
        return self._storage.contents(batch.input_file_id)


def _entry(line: BatchLine, response: dict[str, Any] | None, error: dict[str, str] | None) -> bytes:
    name = f"batch_req_{uuid.uuid4().hex}"
    entry = {"id": name, "custom_id": line.custom_id, "response": response, "error": error}
    return json.dumps(entry).encode() + b"\n"


async def call(app: ASGIApp, path: str, body: bytes, state: dict[str, Any]) -> Reply:
    """What `app` answers to a JSON body posted to `path`. `state` is what `request.state` begins with."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "method": "POST"}
    place = {"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers}
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await asyncio.Event().wait()  # this client does not leave: it is cancelled
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app({**scope, **place, "client": None, "server": None, "state": dict(state)}, receive, send)
    if (task := asyncio.current_task()) is not None and task.cancelling():
        raise asyncio.CancelledError  # the app took it for itself
    if not sent:
        raise RuntimeError(f"{path} gave no answer")
    answered = {name.decode("latin-1"): value.decode("latin-1") for name, value in sent[0]["headers"]}
    return Reply(sent[0]["status"], answered, b"".join(message.get("body", b"") for message in sent[1:]))

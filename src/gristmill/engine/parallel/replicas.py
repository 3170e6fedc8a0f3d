"""The same model in several processes, each with an engine of its own, and requests dealt to them.

A worker that dies, or says nothing for too long, is given up, and what it had not finished goes to the others. Requests
have their seeds before they are dealt, so an answer depends neither on who gave it nor on how often it was tried.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, cast

import torch

from gristmill.core import CompletionOutput, Prompt, RequestOutput, SamplingParams
from gristmill.engine.llm import LLM
from gristmill.engine.scheduling.balance import Balancer, LeastOutstanding, Load, Worker
from gristmill.errors import GristmillError, RequestError
from gristmill.tokens.tokenizer import Tokenizer

_TRIES = 2
_PROMPTS_KNOWN = 256
_ALIVE_EVERY = 1.0


@dataclass(frozen=True)
class _Ready:
    tokenizer: Tokenizer
    max_model_len: int


@dataclass(frozen=True)
class _Refused:
    request_id: str
    message: str
    field: str | None
    code: str | None


@dataclass(eq=False)
class _Job:
    """One prompt of a `generate`."""

    place: int
    prompt: Prompt
    params: SamplingParams
    load: Load
    tries: int = 0
    counted: float = 0.0
    """What it adds to the outstanding tokens of its worker."""


class _Replica:
    """One worker process, seen from here. Messages leave by a thread, so that a worker that does not read them cannot
    stop the others."""

    def __init__(self, number: int, model: str, options: dict[str, Any], threads: int) -> None:
        context = multiprocessing.get_context("forkserver")
        self.number, self.load, self.silent = number, Worker(), 0.0
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, model, options, threads), daemon=True)
        self.process.start()
        other.close()  # or the end of the process would not be the end of the connection
        self.jobs: dict[str, _Job] = {}
        self._outbox: SimpleQueue[object] = SimpleQueue()
        threading.Thread(target=self._post, daemon=True).start()

    def send(self, message: object) -> None:
        self._outbox.put(message)

    def receive(self) -> Any:
        """The next message. Raises EOFError when the process is gone."""
        try:
            message = self.connection.recv()
        except OSError as error:
            raise EOFError from error
        self.silent = 0.0
        return message

    def end(self) -> None:
        """Let the process go, whatever it does."""
        self.process.kill()
        self.process.join()
        self._outbox.put(_END)
        self.connection.close()

    def _post(self) -> None:
        with suppress(OSError):
            while (message := self._outbox.get()) is not _END:
                self.connection.send(message)


_END = object()


class ReplicatedLLM:
    """`LLM` on several processes of this machine: `generate` gives what one process would.

    replicas: number of processes. balancer: which of them takes a request, the one with the fewest tokens to compute
    unless given. patience: seconds without a sign of life, in the middle of work, after which a worker counts as dead.
    threads: of each worker; None shares the cores. in_flight: most requests that are dealt at a time, per worker; the
    others wait until it shows who is free. Further keywords go to `LLM`.

    Raises what `LLM` raises, and GristmillError when a worker does not start. One thread owns it. A program file that
    makes one does so under `if __name__ == "__main__":`, for the workers import it.
    """

    def __init__(
        self,
        model: str | Path,
        replicas: int = 2,
        *,
        balancer: Balancer | None = None,
        patience: float = 300.0,
        threads: int | None = None,
        in_flight: int = 64,
        seed: int = 0,
        **options: Any,
    ) -> None:
        for name, value in (("replicas", replicas), ("in_flight", in_flight)):
            if value < 1:
                raise RequestError(f"{name} must be at least 1, got {value}", field=name)
        self.balancer: Balancer = balancer or LeastOutstanding()
        self.patience, self.in_flight = patience, in_flight
        self.served = [0] * replicas
        """Requests that each worker has finished."""
        self.retried = 0
        """Requests that were given to another worker because theirs died."""
        self._seeds = torch.Generator().manual_seed(seed)
        self._numbers = 0
        threads = threads or max(1, torch.get_num_threads() // replicas)
        self._all = [_Replica(number, str(model), options, threads) for number in range(replicas)]
        self._live = list(self._all)
        try:
            ready = [self._started(replica) for replica in self._all]
        except BaseException:
            self.close()
            raise
        self.tokenizer, self.max_model_len = ready[0].tokenizer, ready[0].max_model_len

    @property
    def num_live(self) -> int:
        """Workers that are alive, as far as is known."""
        return len(self._live)

    @property
    def process_ids(self) -> list[int]:
        """The workers' process ids, dead ones included."""
        return [cast(int, replica.process.pid) for replica in self._all]

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """See `LanguageModel.generate`; in the order of the prompts. If one is refused, the others are given up.

        A request whose workers died twice is answered with finish_reason "error". Raises GristmillError when no worker
        is left.
        """
        params = sampling_params or SamplingParams()
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        asked = cast(Sequence[Prompt], [prompts] if single else prompts)
        waiting = deque(self._job(place, prompt, params) for place, prompt in enumerate(asked))
        found: list[RequestOutput | None] = [None] * len(asked)
        left = len(asked)
        try:
            while left:
                self._deal(waiting)
                for replica in self._ready():
                    try:
                        message = replica.receive()
                    except EOFError:
                        self._give_up(replica, waiting)
                        continue
                    left -= self._take(replica, message, found)
                left -= _fail_hopeless(waiting, found)
        finally:
            for replica in self._live:
                for request_id in replica.jobs:
                    replica.send(request_id)
                replica.jobs.clear()
                replica.load.outstanding = 0.0
        return cast(list[RequestOutput], found)

    def close(self) -> None:
        """End all workers."""
        for replica in self._all:
            replica.end()
        self._live = []

    def __enter__(self) -> ReplicatedLLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _started(self, replica: _Replica) -> _Ready:
        try:
            message = replica.receive()
        except EOFError:
            replica.process.join()
            raise GristmillError(
                f"worker {replica.number} ended with code {replica.process.exitcode} before it was ready: is the "
                'program under `if __name__ == "__main__":`?'
            ) from None
        if isinstance(message, _Ready):
            return message
        raise cast(Exception, message)

    def _job(self, place: int, prompt: Prompt, params: SamplingParams) -> _Job:
        if params.seed is None:
            params = replace(params, seed=int(torch.randint(1 << 62, (1,), generator=self._seeds)))
        ids = tuple(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        most = max(0, self.max_model_len - len(ids))
        cost = len(ids) + params.n * (most if params.max_tokens is None else params.max_tokens)
        return _Job(place, prompt, params, Load(cost, prompt=ids))

    def _deal(self, waiting: deque[_Job]) -> None:
        while waiting and sum(len(replica.jobs) for replica in self._live) < self.in_flight * len(self._live):
            job = waiting.popleft()
            workers = [replica.load for replica in self._live]
            replica = self._live[self.balancer.choose(job.load, workers)]
            job.counted = job.load.cost - replica.load.cached(job.load.prompt)
            replica.load.outstanding += job.counted
            replica.load.prompts.append(job.load.prompt)
            del replica.load.prompts[:-_PROMPTS_KNOWN]
            self._numbers += 1
            if not replica.jobs:
                replica.silent = 0.0  # it had nothing to say before
            replica.jobs[str(self._numbers)] = job
            replica.send((str(self._numbers), job.prompt, job.params))
        if waiting and not self._live:
            code = self._all[-1].process.exitcode
            raise GristmillError(f"all {len(self._all)} workers are gone (the last with code {code}): start again")

    def _ready(self) -> list[_Replica]:
        """Workers that have something to say, or have been silent for too long (they are ended, which says so)."""
        began = time.monotonic()
        ready = wait([replica.connection for replica in self._live], timeout=_ALIVE_EVERY)
        waited = min(time.monotonic() - began, _ALIVE_EVERY)  # a machine that slept meanwhile proves nothing
        for replica in self._live:
            if replica.jobs and replica.connection not in ready:
                replica.silent += waited
                if replica.silent > self.patience:
                    replica.process.kill()
        return [replica for replica in self._live if replica.connection in ready]

    def _give_up(self, replica: _Replica, waiting: deque[_Job]) -> None:
        self._live.remove(replica)
        replica.end()
        for job in reversed(replica.jobs.values()):
            job.tries += 1
            self.retried += job.tries < _TRIES
            waiting.appendleft(job)
        replica.jobs.clear()

    def _take(self, replica: _Replica, message: Any, found: list[RequestOutput | None]) -> int:
        """Act on what a worker says; returns how many requests are finished by it."""
        if isinstance(message, _Refused):
            if message.request_id not in replica.jobs:
                return 0
            raise RequestError(message.message, field=message.field, code=message.code)
        if message is None or (job := replica.jobs.pop(message.request_id, None)) is None:
            return 0  # a sign of life, or an answer that nobody waits for any more
        replica.load.outstanding -= job.counted
        self.served[replica.number] += 1
        found[job.place] = message
        return 1


def _fail_hopeless(waiting: deque[_Job], found: list[RequestOutput | None]) -> int:
    """Answer requests that were tried often enough; returns how many."""
    hopeless = [job for job in waiting if job.tries >= _TRIES]
    for job in hopeless:
        waiting.remove(job)
        error = f"the worker died each of the {job.tries} times that this request was tried"
        outputs = [
            CompletionOutput(
                index=index, text="", token_ids=[], cumulative_logprob=None, finish_reason="error", error=error
            )
            for index in range(job.params.n)
        ]
        text = job.prompt if isinstance(job.prompt, str) else None
        found[job.place] = RequestOutput(
            request_id="", prompt=text, prompt_token_ids=list(job.load.prompt), outputs=outputs, finished=True
        )
    return len(hopeless)


def _work(connection: Connection, model: str, options: dict[str, Any], threads: int) -> None:
    """A worker: answers until the connection ends."""
    torch.set_num_threads(threads)
    try:
        llm = LLM(model, **options)
    except Exception as error:  # whatever it is, the caller is told
        told = GristmillError(str(error)) if isinstance(error, GristmillError) else GristmillError(repr(error))
        connection.send(error if isinstance(error, RequestError) else told)
        return
    connection.send(_Ready(llm.tokenizer, llm.max_model_len))
    inbox: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_read, args=(connection, inbox), daemon=True).start()
    engine, said = llm.engine, time.monotonic()
    with suppress(OSError):  # nobody reads any more
        while True:
            while not engine.has_unfinished() or not inbox.empty():
                message = inbox.get()
                if message is None:
                    return
                if isinstance(message, str):
                    engine.abort(message)
                    continue
                request_id, prompt, params = message
                try:
                    engine.add(prompt, params, request_id=request_id)
                except RequestError as error:
                    connection.send(_Refused(request_id, str(error), error.field, error.code))
            for output in engine.step(finished_only=True):
                connection.send(output)
                said = time.monotonic()
            if time.monotonic() - said > _ALIVE_EVERY:
                connection.send(None)
                said = time.monotonic()


def _read(connection: Connection, inbox: SimpleQueue[Any]) -> None:
    """Take every message at once, so that the other side never waits for a step."""
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        inbox.put(None)

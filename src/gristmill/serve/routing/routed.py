"""Several replicas behind the face of one engine and one model: who takes a request, and what else the server asks."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np

from gristmill.core import Prompt, SamplingParams, Score
from gristmill.engine.async_engine import EngineClosed, RequestStream
from gristmill.engine.request import Standing
from gristmill.engine.scheduling.balance import Balancer, Load, PrefixAware
from gristmill.errors import RequestError
from gristmill.serve.routing.feed import Feed, Replica, WorkerDied
from gristmill.serve.routing.prefix import BLOCK, WarmWorker, block_hashes
from gristmill.serve.routing.worker import Work
from gristmill.tokens.renderer import JinjaRenderer
from gristmill.tokens.tokenizer import Tokenizer

T = TypeVar("T")


class RoutedEngine:
    """What `AsyncEngine` is to one engine, for several replicas. Coroutines of one event loop share it.

    balancer: who takes a request, in blocks of 16 tokens; by default the replica that would be through with it first,
    what it knows of the prompt counted as done. A replica that dies ends its requests with WorkerDied, and takes none
    until it is back; a request is not tried elsewhere, for the client may have read its beginning.
    """

    def __init__(self, replicas: Sequence[Replica], balancer: Balancer | None = None) -> None:
        self.replicas, self.balancer = list(replicas), balancer or PrefixAware()
        self.loads = [WarmWorker() for _ in replicas]
        self.tokenizer: Tokenizer = replicas[0].about.tokenizer
        self.max_model_len = replicas[0].about.max_model_len
        self.seats = replicas[0].about.seats * len(replicas)
        """Answers that all of them compute at once."""
        self._running: dict[str, tuple[Replica, Feed]] = {}
        self._closing, self._ending = False, threading.Lock()
        self._callers = ThreadPoolExecutor(thread_name_prefix="call")  # a worker that hangs must not take all others

    @property
    def is_running(self) -> bool:
        """Whether requests are taken: True until `close`."""
        return not self._closing

    @property
    def is_ready(self) -> bool:
        """Whether a replica is there to take one."""
        return not self._closing and any(replica.is_ready for replica in self.replicas)

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None = None,
        *,
        standing: Standing | None = None,
        adapter: str | None = None,
    ) -> RequestStream:
        """See `AsyncEngine.submit`. Raises WorkerDied too, when no replica is ready or the one that was asked died."""
        if self._closing:
            raise EngineClosed("the engine is closed")
        work = Work(
            request_id=request_id or uuid.uuid4().hex, prompt=prompt, params=params, standing=standing, adapter=adapter
        )
        if work.request_id in self._running:
            raise RequestError(f"request {work.request_id!r} is already running", field="request_id")
        if standing is not None and standing.deadline is not None:
            raise RequestError("replicas have clocks of their own, so they take no deadline", field="deadline")
        number, cost = self._choose(work)
        replica, load = self.replicas[number], self.loads[number]

        def ended() -> None:
            load.outstanding -= cost
            self._running.pop(work.request_id, None)

        feed = Feed(self, work, ended)
        replica.send(feed)
        load.outstanding += cost
        self._running[work.request_id] = replica, feed
        try:
            await feed.admitted
        except asyncio.CancelledError:
            self.abort(work.request_id)
            raise
        return feed.stream

    def abort(self, request_id: str) -> None:
        """See `AsyncEngine.abort`."""
        if request_id in self._running:
            replica, feed = self._running[request_id]
            replica.abort(request_id)
            feed.take(EngineClosed("the request was aborted"))

    async def run(self, function: Callable[[], T]) -> T:
        """The result of a function that may wait for a replica, as the methods of `RoutedModel` do."""
        if self._closing:
            raise EngineClosed("the engine is closed")
        return await asyncio.get_running_loop().run_in_executor(self._callers, function)

    def call(self, name: str, *arguments: Any) -> Any:
        """What a method of the model gives, on the replica with the least to do. Blocks."""
        ready = self._ready()
        return self.replicas[min(ready, key=lambda number: self.loads[number].outstanding)].call(name, *arguments)

    def close(self, *, drain_seconds: float = 0.0) -> None:
        """See `AsyncEngine.close`; safe to call twice, at once too. Not on the event loop, which requests need."""
        self._closing = True
        deadline = time.monotonic() + drain_seconds
        while self._running and time.monotonic() < deadline:
            time.sleep(0.02)
        with self._ending:  # Ray must not be shut down by one caller while another still talks to it
            for replica in self.replicas:
                replica.close()

    def _ready(self) -> list[int]:
        for replica, load in zip(self.replicas, self.loads, strict=True):
            if not replica.is_ready:
                load.known.clear()  # it will know nothing when it is back
        ready = [number for number, replica in enumerate(self.replicas) if replica.is_ready]
        if not ready:
            raise WorkerDied("every worker is starting again; try again")
        return ready

    def _choose(self, work: Work) -> tuple[int, float]:
        """The number of a replica and the blocks it will have to compute."""
        ready = self._ready()
        ids = self.tokenizer.encode(work.prompt) if isinstance(work.prompt, str) else work.prompt
        salt = work.standing.cache_salt if work.standing else None
        prompt = block_hashes(ids, repr((salt, work.adapter)))
        room = max(0, self.max_model_len - len(ids))
        most = room if work.params.max_tokens is None else min(room, work.params.max_tokens)
        load = Load((len(ids) + work.params.n * most) / BLOCK, prompt=prompt)
        number = ready[self.balancer.choose(load, [self.loads[number] for number in ready])]
        cost = load.cost - self.loads[number].cached(prompt)
        self.loads[number].remember(prompt)
        return number, cost


class RoutedModel:
    """A model that runs on replicas, as the server sees one: tokenizer and renderer are here, the engine is there."""

    kind: Literal["generate"] = "generate"

    def __init__(self, model_name: str, engine: RoutedEngine) -> None:
        self.model_name, self.engine = model_name, engine
        self.tokenizer, self.max_model_len = engine.tokenizer, engine.max_model_len

    @cached_property
    def renderer(self) -> JinjaRenderer:
        """The chat renderer of the model's own template. Raises RequestError for a model that does not chat."""
        if not self.engine.replicas[0].about.chats:
            raise RequestError(f"{self.model_name} has no chat template", field="messages")
        return JinjaRenderer(self.tokenizer)

    def load_adapter(self, name: str, path: str) -> None:
        """Raises RequestError: a worker that starts again would not have it."""
        raise RequestError(f"{self.model_name} runs in workers, which take no adapters", field="adapter")

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """See `LLM.embed`. Blocks."""
        vectors: np.ndarray = self.engine.call("embed", list(texts))
        return vectors

    def score_many(self, pairs: Sequence[tuple[Prompt, Prompt]]) -> list[Score]:
        """See `LLM.score_many`. Blocks."""
        scores: list[Score] = self.engine.call("score_many", list(pairs))
        return scores

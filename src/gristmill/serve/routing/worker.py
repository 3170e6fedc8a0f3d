"""A model and its engine in a process of their own, as those outside see it, and what goes in and out.

An error is an item like any other: exceptions do not cross the border of a process in the same way everywhere.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from gristmill.core import Prompt, RequestOutput, SamplingParams
from gristmill.engine.async_engine import AsyncEngine, EngineFailure
from gristmill.engine.llm import LLM
from gristmill.engine.metrics.memory import give_back_freed
from gristmill.engine.request import Standing
from gristmill.errors import GristmillError
from gristmill.serve.routing.delta import shrink
from gristmill.tokens.tokenizer import Tokenizer

Item = RequestOutput | Exception | None
"""None says that a request was admitted. Then come outputs, each with what is new in it, or the error that ends all."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A request."""

    request_id: str
    prompt: Prompt
    params: SamplingParams
    standing: Standing | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class Call:
    """One of the model's own methods, and what to call it with."""

    number: int
    name: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class About:
    """What a worker says of itself when it can begin."""

    tokenizer: Tokenizer
    max_model_len: int
    chats: bool
    """Whether it has a chat template, its own or the usual one."""
    process_id: int
    seats: int
    """Answers that it computes at once; others wait."""


class Worker:
    """Loads the model and answers. Raises what `LLM` raises.

    options: of `LLM`. threads: of a forward.
    """

    def __init__(self, model: str, options: Mapping[str, Any], threads: int) -> None:
        torch.set_num_threads(threads)
        self._llm = LLM(model, **options)
        give_back_freed()
        self._engine = AsyncEngine(self._llm.engine)

    async def about(self) -> About:
        """What others need to know to make prompts for it."""
        pair = self._llm.engine.pair is not None
        chats = not pair or self._llm.tokenizer.chat_template is not None
        seats = self._llm.engine.scheduler.max_num_seqs
        return About(self._llm.tokenizer, self._llm.max_model_len, chats, os.getpid(), seats)

    async def answer(self, work: Work) -> AsyncIterator[Item]:
        """The items of a request. Leaving early aborts it."""
        said: RequestOutput | None = None
        try:
            stream = await self._engine.submit(
                work.prompt, work.params, work.request_id, standing=work.standing, adapter=work.adapter
            )
            yield None
            async with stream:
                async for output in stream:
                    yield shrink(said, output)
                    said = output
        except Exception as error:  # whatever it is, the other side is told
            yield _portable(error)

    async def abort(self, request_id: str) -> None:
        """End a request. An unknown id is ignored."""
        self._engine.abort(request_id)

    async def call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """What a method of the model gives, called between two steps; what it raises is returned as well."""
        try:
            return await self._engine.run(partial(getattr(self._llm, name), *arguments))
        except Exception as error:
            return _portable(error)

    def check_health(self) -> None:
        """Raises RuntimeError when no request can be taken. Ray Serve asks it."""
        if not self._engine.is_running:
            raise RuntimeError("the engine has stopped")


def work(connection: Connection, model: str, options: Mapping[str, Any], threads: int) -> None:
    """The life of a worker process: until the other end of the connection is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which lets requests finish first
    try:
        worker = Worker(model, options, threads)
    except Exception as error:
        connection.send(_portable(error))
        return
    with suppress(OSError):
        asyncio.run(_serve(connection, worker))
    os._exit(0)  # the engine may be in the middle of a long step that nobody waits for


async def _serve(connection: Connection, worker: Worker) -> None:
    loop, inbox = asyncio.get_running_loop(), asyncio.Queue[Work | Call | str | None]()
    tasks: dict[str | int, asyncio.Task[None]] = {}

    def ended(key: str | int, _: asyncio.Task[None]) -> None:
        tasks.pop(key, None)

    def read() -> None:
        """Take every message at once, so that the other side never waits for a step."""
        message: Any = ""
        while message is not None:
            try:
                message = connection.recv()
            except (EOFError, OSError):
                message = None
            loop.call_soon_threadsafe(inbox.put_nowait, message)

    async def forward(message: Work | Call) -> None:
        if isinstance(message, Call):
            connection.send((message.number, await worker.call(message.name, message.arguments)))
            return
        async for item in worker.answer(message):
            connection.send((message.request_id, item))

    connection.send(await worker.about())
    threading.Thread(target=read, daemon=True).start()
    while (message := await inbox.get()) is not None:
        if isinstance(message, str):
            if message in tasks:  # by its task: the engine may not know the request yet
                tasks[message].cancel()
            continue
        key = message.number if isinstance(message, Call) else message.request_id
        tasks[key] = task = asyncio.create_task(forward(message))
        task.add_done_callback(partial(ended, key))


def _portable(error: Exception) -> Exception:
    """The error itself where every process knows its class."""
    return error if isinstance(error, GristmillError) else EngineFailure(f"{type(error).__name__}: {error}")

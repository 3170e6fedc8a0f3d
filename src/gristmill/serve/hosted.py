"""A model in service, and the one thread or the workers that compute it."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Protocol, TypeVar, cast

from gristmill.engine.async_engine import AsyncEngine, EngineClosed, StepEngine
from gristmill.errors import RequestError
from gristmill.serve.errors import ApiError
from gristmill.serve.routing.routed import RoutedEngine
from gristmill.serve.wire.models import Kind
from gristmill.tokens.answer.detect import detect
from gristmill.tokens.answer.formats import AnswerFormat, CallStyle
from gristmill.tokens.renderer import JinjaRenderer
from gristmill.tokens.tokenizer import Tokenizer

T = TypeVar("T")


class Servable(Protocol):
    """A model of any kind."""

    @property
    def kind(self) -> Kind:
        """What it can do."""

    @property
    def model_name(self) -> str:
        """The name in requests."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Turns texts into ids."""

    @property
    def max_model_len(self) -> int:
        """Context length in tokens."""


class ServedModel(Servable, Protocol):
    """A model that generates; `gristmill.LLM` is one."""

    @property
    def engine(self) -> StepEngine | RoutedEngine:
        """Owned by the server from its start to its end."""

    @property
    def renderer(self) -> JinjaRenderer:
        """Turns a conversation into prompt ids."""


Asynchronous = AsyncEngine | RoutedEngine
"""An engine that coroutines share: a thread of this process, or workers elsewhere."""


def async_engine(model: ServedModel) -> Asynchronous:
    """The engine of a model for coroutines. Nobody else may use the model's own from now on."""
    return model.engine if isinstance(model.engine, RoutedEngine) else AsyncEngine(model.engine)


class Hosted:
    """A model in service, and the one thread that computes it."""

    def __init__(self, model: Servable, name: str, *, engine: Asynchronous | None = None) -> None:
        self.model, self.name, self.kind = model, name, model.kind
        self.created = int(time.time())
        self.adapters: dict[str, str] = {}
        self.users: Counter[str | None] = Counter()
        """HTTP requests that have found this model and are not over, by adapter; they belong to the event loop."""
        self.engine = engine
        if self.kind == "generate":
            self.engine = engine or async_engine(cast(ServedModel, model))
            try:
                if try_template(model):
                    _ = self.answer_form  # made on first use, which must not be a request
            except BaseException:
                self.engine.close()  # or its workers would be nobody's
                raise
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"model-{name}") if self.engine is None else None
        self._closed = False

    @property
    def generator(self) -> ServedModel:
        """The model, which generates. Raises ApiError for another kind."""
        if self.engine is None:
            raise ApiError(
                400,
                f"{self.name} does not generate, it can {self.kind}",
                param="model",
                code="unsupported_model",
            )
        return cast(ServedModel, self.model)

    @cached_property
    def answer_form(self) -> AnswerFormat:
        """How the model writes reasoning and tool calls, as its chat template shows them.

        Raises RequestError for a model without a template.
        """
        found = detect(cast(ServedModel, self.model).renderer)
        return found if found.calls is not None else dataclasses.replace(found, calls=CallStyle.HERMES)

    @property
    def is_running(self) -> bool:
        """Whether requests are taken."""
        return self.engine.is_running if self.engine is not None else not self._closed

    @property
    def is_ready(self) -> bool:
        """Whether a request would be answered now: workers may be starting again."""
        return self.engine.is_ready if isinstance(self.engine, RoutedEngine) else self.is_running

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """The result of a function of the model, called where nothing else uses it.

        Raises what it raises, and EngineClosed when the model leaves.
        """
        if self.engine is not None:
            return await self.engine.run(lambda: function(*arguments))
        assert self._thread is not None

        def call() -> T:
            if self._closed:  # while this waited for its turn
                raise EngineClosed(f"{self.name} leaves")
            return function(*arguments)

        try:
            future = self._thread.submit(call)
        except RuntimeError as error:  # it was shut down
            raise EngineClosed(f"{self.name} has left") from error
        return await asyncio.wrap_future(future)

    def hold(self, adapter: str | None = None) -> Callable[[], None]:
        """Count a request that has found this model; call what is returned when it is over."""
        self.users[adapter] += 1

        def release() -> None:
            self.users[adapter] -= 1

        return release

    async def retire(self, seconds: float) -> None:
        """Close once the requests that found this model are over, or after so long. New ones must not find it.

        A request is on its way to the engine while its prompt is rendered: the engine alone would not wait for it. One
        of another name may use the engine too, and has what is left of the time.
        """
        deadline = time.monotonic() + seconds
        while self.users.total() and self.is_running and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self.close, max(0.0, deadline - time.monotonic()))

    def close(self, drain_seconds: float) -> None:
        """Refuse new requests, let those in the engine finish for so long and end the rest; without an engine, the one
        that is computed finishes. Blocks; safe to call twice."""
        if self.engine is not None:
            self.engine.close(drain_seconds=drain_seconds)
        elif self._thread is not None:
            self._closed = True
            self._thread.shutdown()


def try_template(model: Servable) -> bool:
    """Make the chat renderer; False when the model has none. Raises DataError for a template that cannot be used."""
    try:
        return cast(ServedModel, model).renderer is not None
    except RequestError:
        return False

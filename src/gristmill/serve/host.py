"""The models of a server: loading, finding, replacing and unloading them while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from gristmill.engine.async_engine import EngineClosed
from gristmill.errors import GristmillError, closest
from gristmill.model.lora.peft import read_lora
from gristmill.serve.errors import ApiError, closing
from gristmill.serve.hosted import Asynchronous, Hosted, Servable, ServedModel, async_engine, try_template
from gristmill.serve.routing.router import RequestRouter
from gristmill.serve.wire.models import ModelCard

logger = logging.getLogger(__name__)

T = TypeVar("T")

SECONDS_TO_LOAD = 5
"""When a client that came too early is told to come again."""


@dataclass(frozen=True)
class Source:
    """Where a model is loaded from, under which name, and its LoRA adapters: names and directories."""

    model: str
    name: str
    adapters: Mapping[str, str] = field(default_factory=dict)


Load = Callable[[Source], Servable]
"""Loads a model; called on a thread of its own."""


@dataclass
class Slot:
    """A name of the server and what stands behind it now."""

    name: str
    source: Source | None
    hosted: Hosted | None = None
    state: Literal["loading", "ready", "failed"] = "loading"
    error: BaseException | None = None
    files: object = None
    """The `fingerprint` of the source as it began to be loaded."""
    changes: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Reloads and changes of adapters, one after the other: a model that is loaded knows no adapter that comes then."""


@dataclass(frozen=True)
class Target:
    """What a request's `model` names."""

    hosted: Hosted
    adapter: str | None = None


class ModelHost:
    """All models of a server by name.

    models: models, already loaded, and sources, which `start` loads with `load`. routers: names that stand for two of
    them. Raises GristmillError for no model, two of one name, a router without its models, and sources without `load`.
    """

    def __init__(
        self,
        models: Sequence[Servable | Source],
        load: Load | None = None,
        *,
        routers: Sequence[RequestRouter] = (),
    ) -> None:
        names = [model.name if isinstance(model, Source) else model.model_name for model in models]
        self.routers = {router.name: router for router in routers}
        for router in routers:
            if missing := {router.small.model, router.large.model} - set(names):
                raise GristmillError(f"router {router.name} needs the model {missing.pop()}, which is not served")
            if router.name in names:
                raise GristmillError(f"router {router.name} has the name of a model")
        if len(set(names)) < len(names) or not names:
            raise GristmillError(f"each served model needs a name of its own, got {names}")
        if load is None and any(isinstance(model, Source) for model in models):
            raise GristmillError("a source needs `load`, which makes a model of it")
        for model in models:
            if not isinstance(model, Source) and model.kind == "generate":
                try_template(model)
        self._models = dict(zip(names, models, strict=True))
        self._load_model = load
        self._slots: dict[str, Slot] = {}
        self._retiring: list[Hosted] = []
        self._closing = False
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Take the models into service and begin to load the sources. Called on the server's event loop."""
        engines: dict[int, Asynchronous] = {}
        for name, model in self._models.items():
            if isinstance(model, Source):
                self._slots[name] = Slot(name, model)
                self._spawn(self._fill(self._slots[name]))
                continue
            engine = None
            if model.kind == "generate":
                generator = cast(ServedModel, model)
                engine = engines.get(id(generator.engine)) or async_engine(generator)
                engines[id(generator.engine)] = engine
            self._slots[name] = Slot(name, None, Hosted(model, name, engine=engine), "ready")

    def find(self, name: str, allows: Callable[[str], bool] = lambda name: True) -> Target:
        """The model of that name, or an adapter of it for NAME:ADAPTER. allows: which names whoever asks may see.

        Raises ApiError: 404 when there is none, 503 while it loads, when it failed to and when the server closes.
        """
        if self._closing:
            raise closing()
        base, adapter = name, None
        if name not in self._slots and ":" in name:
            base, _, adapter = name.rpartition(":")
        slot = self._slots.get(base)
        if slot is None or (adapter is not None and slot.hosted is not None and adapter not in slot.hosted.adapters):
            names = [card.id for card in self.cards() if allows(card.id)]
            message = (
                f"model {name[:200]!r} is not served here.{closest(name[:200], names)} Served: {', '.join(names)}."
            )
            raise ApiError(404, message, param="model", code="model_not_found")
        if slot.hosted is None:
            raise _not_ready(slot)
        return Target(slot.hosted, adapter)

    @property
    def slots(self) -> Mapping[str, Slot]:
        """All names, in order."""
        return self._slots

    @property
    def is_running(self) -> bool:
        """False once the server closes or a model's thread has ended."""
        hosted = [slot.hosted for slot in self._slots.values() if slot.hosted is not None]
        return not self._closing and all(each.is_running for each in hosted)

    def cards(self) -> list[ModelCard]:
        """What /v1/models says."""
        cards = [card for slot in self._slots.values() for card in self._cards_of(slot)]
        for router in self.routers.values():
            small = next(card for card in cards if card.id == router.small.model)
            cards.append(small.model_copy(update={"id": router.name, "parent": None}))
        return cards

    def _cards_of(self, slot: Slot) -> list[ModelCard]:
        hosted = slot.hosted
        if hosted is None:
            return [ModelCard(id=slot.name, object="model", created=0, owned_by="gristmill", state=slot.state)]
        card = ModelCard(
            id=slot.name,
            object="model",
            created=hosted.created,
            owned_by="gristmill",
            max_model_len=hosted.model.max_model_len,
            kind=hosted.kind,
            state="ready",
        )
        adapters = [f"{slot.name}:{adapter}" for adapter in hosted.adapters]
        return [card, *(card.model_copy(update={"id": name, "parent": slot.name}) for name in adapters)]

    async def load(self, source: Source) -> ModelCard:
        """Load one more model. Raises ApiError for a name in use and for what cannot be loaded; no trace stays then."""
        self._need_loader()
        if source.name in self._slots or source.name in self.routers:
            raise ApiError(409, f"a model called {source.name!r} is served already", param="name", code="name_in_use")
        slot = self._slots[source.name] = Slot(source.name, source)
        await asyncio.shield(self._spawn(self._fill_or_drop(slot)))
        if slot.hosted is None:
            raise ApiError(400, f"{source.model}: {slot.error}", param="model", code="load_failed")
        return self._cards_of(slot)[0]

    async def reload(self, name: str) -> ModelCard:
        """Load a model anew and put it in the place of the old one, which finishes what it began.

        Both are in memory for a while. Raises ApiError while it loads for the first time, and when it cannot be loaded;
        the old one stays then.
        """
        slot = self._slot(name)
        self._need_loader()
        if slot.source is None:
            raise ApiError(400, f"{name} was not loaded from a source", param="model", code="not_reloadable")
        if slot.state == "loading":
            raise _not_ready(slot)
        return await asyncio.shield(self._spawn(self._change(slot, self._reload(slot, slot.source))))

    async def _change(self, slot: Slot, work: Coroutine[Any, Any, T]) -> T:
        async with slot.changes:
            return await work

    async def _reload(self, slot: Slot, source: Source) -> ModelCard:
        if slot.hosted is not None:  # adapters come and go after the start too
            source = replace(source, adapters=dict(slot.hosted.adapters))
        name, fresh = slot.name, Slot(slot.name, source)
        await self._fill(fresh)
        if fresh.hosted is None:
            raise ApiError(400, f"{source.model}: {fresh.error}", param="model", code="load_failed")
        if self._slots.get(name) is not slot:  # unloaded meanwhile
            await asyncio.to_thread(fresh.hosted.close, 0)
            raise ApiError(409, f"{name} was unloaded meanwhile", param="model", code="model_not_found")
        before, slot.hosted, slot.state, slot.error = slot.hosted, fresh.hosted, "ready", None
        slot.files = fresh.files
        if before is not None:
            self._spawn(self._retire(before, 3600))
        return self._cards_of(slot)[0]

    async def unload(self, name: str, drain_seconds: float = 30) -> None:
        """Take a model out of service: new requests find it no more, running ones have so long to finish."""
        slot = self._slot(name)
        if slot.hosted is None:
            raise _not_ready(slot)
        for router in self.routers.values():
            if name in (router.small.model, router.large.model):
                raise ApiError(409, f"router {router.name} needs {name}", param="model", code="model_in_use")
        others = [each.hosted for each in self._slots.values() if each is not slot and each.hosted is not None]
        del self._slots[name]
        if all(each.engine is None or each.engine is not slot.hosted.engine for each in others):
            await asyncio.shield(self._spawn(self._retire(slot.hosted, drain_seconds)))

    async def load_adapter(self, name: str, adapter: str, path: str) -> None:
        """Load a LoRA adapter, or put a newer one in the place of one. Raises ApiError when it does not fit."""
        slot = self._slot(name)

        async def load() -> None:
            await _load_adapter(self.find(name).hosted, adapter, path)

        await asyncio.shield(self._spawn(self._change(slot, load())))

    async def unload_adapter(self, name: str, adapter: str) -> None:
        """Forget a LoRA adapter. Raises ApiError when there is none or requests use it."""
        slot = self._slot(name)
        await asyncio.shield(self._spawn(self._change(slot, self._unload_adapter(name, adapter))))

    async def _unload_adapter(self, name: str, adapter: str) -> None:
        hosted = self.find(f"{name}:{adapter}").hosted
        engine = cast(Any, hosted.generator.engine)
        deadline = time.monotonic() + 1
        while hosted.users[adapter] and time.monotonic() < deadline:  # one whose client has its answer is soon over
            await asyncio.sleep(0.02)
        path = hosted.adapters.pop(adapter)  # first, so that no request finds it any more
        try:
            if hosted.users[adapter]:
                raise GristmillError(f"requests use {adapter}")
            await hosted.run(engine.unload_adapter, adapter)
        except GristmillError as error:
            hosted.adapters[adapter] = path
            raise ApiError(409, str(error), param="lora_name", code="adapter_in_use") from error
        except EngineClosed as error:
            raise closing() from error

    async def watch(self, seconds: float) -> None:
        """Look at the files of loaded sources every so many seconds, and reload a model whose files have changed.

        A change counts once two looks saw the same, as a checkpoint may still be being written.
        """
        seen: dict[str, object] = {}
        tried: dict[str, object] = {}
        while True:
            for name, slot in list(self._slots.items()):
                if slot.source is None or slot.state != "ready":
                    continue
                now = await asyncio.to_thread(fingerprint, slot.source.model)
                settled, seen[name] = seen.get(name) == now, now
                if not settled or now in (slot.files, tried.get(name, slot.files)):
                    continue
                tried[name] = now  # a model that cannot be loaded is tried again when its files change again
                try:
                    await self.reload(name)
                    logger.info("%s changed and was loaded anew", slot.source.model)
                except ApiError as error:
                    logger.error("%s changed and cannot be loaded: %s", slot.source.model, error.detail)
            await asyncio.sleep(seconds)

    async def wait(self) -> Sequence[Slot]:
        """Wait until nothing loads any more; the slots that failed."""
        while pending := [task for task in self._tasks if not task.done()]:
            await asyncio.wait(pending)
        return [slot for slot in self._slots.values() if slot.state == "failed"]

    async def close(self, drain_seconds: float) -> None:
        """Refuse new requests, let the running ones finish for so long, end the rest. Safe to call twice."""
        self._closing = True
        hosted = [slot.hosted for slot in self._slots.values() if slot.hosted is not None]
        hosted += self._retiring
        await asyncio.gather(*(each.retire(drain_seconds) for each in hosted))

    async def _retire(self, hosted: Hosted, seconds: float) -> None:
        self._retiring.append(hosted)
        try:
            await hosted.retire(seconds)
        finally:
            self._retiring.remove(hosted)

    async def _fill_or_drop(self, slot: Slot) -> None:
        await self._fill(slot)
        if slot.hosted is None:
            del self._slots[slot.name]

    async def _fill(self, slot: Slot) -> None:
        assert slot.source is not None
        assert self._load_model is not None
        hosted: Hosted | None = None
        try:
            slot.files = await asyncio.to_thread(fingerprint, slot.source.model)  # they may change while they are read
            model = await asyncio.to_thread(self._load_model, slot.source)
            hosted = await asyncio.to_thread(Hosted, model, slot.name)
            for adapter, path in slot.source.adapters.items():
                await _load_adapter(hosted, adapter, path)
        except Exception as error:
            if hosted is not None:
                await asyncio.to_thread(hosted.close, 0)
            slot.state, slot.error = "failed", error
            logger.error("%s could not be loaded: %s", slot.source.model, error)
            return
        if self._closing:
            await asyncio.to_thread(hosted.close, 0)
        slot.hosted, slot.state = hosted, "ready"

    def _slot(self, name: str) -> Slot:
        if name not in self._slots:
            self.find(name)  # tells the names
            raise ApiError(400, f"{name} is an adapter, not a model", param="model", code="invalid_value")
        return self._slots[name]

    def _need_loader(self) -> None:
        if self._load_model is None:
            raise ApiError(400, "this server was made with its models and loads no others", code="not_reloadable")

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Work that goes on when the request that asked for it ends: what it loads would be nobody's."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _load_adapter(hosted: Hosted, adapter: str, path: str) -> None:
    model = cast(Any, hosted.generator)
    if not hasattr(model.engine, "load_adapter"):
        raise ApiError(400, f"{hosted.name} runs in workers, which take no adapters", param="model", code="no_adapters")
    try:
        lora = await asyncio.to_thread(read_lora, Path(path), model.model.config)
        await hosted.run(model.engine.load_adapter, adapter, lora)
    except GristmillError as error:
        raise ApiError(400, str(error), param="lora_path", code="load_failed") from error
    except EngineClosed as error:
        raise closing() from error
    hosted.adapters[adapter] = path


def fingerprint(model: str) -> object:
    """Names, sizes and times of a model's files; None where it is none of this machine's."""
    root = Path(model)
    with contextlib.suppress(OSError):
        files = [root] if root.is_file() else sorted(root.rglob("*"))
        return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()] or None
    return None


def _not_ready(slot: Slot) -> ApiError:
    if slot.state == "failed":
        return ApiError(503, f"{slot.name} could not be loaded", param="model", code="load_failed")
    return ApiError(
        503,
        f"{slot.name} is still loading",
        param="model",
        code="model_loading",
        headers={"retry-after": str(SECONDS_TO_LOAD)},
    )

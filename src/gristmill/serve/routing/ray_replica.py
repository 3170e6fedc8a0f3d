"""A worker as a replica of Ray Serve, on any machine of a cluster. Serve checks its health and starts it again.

Every replica is a Serve application of its own, so that this process decides who answers, and knows who died.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from typing import Any

from gristmill.engine.async_engine import EngineClosed
from gristmill.errors import GristmillError, MissingExtra
from gristmill.serve.routing.feed import Feed, WorkerDied
from gristmill.serve.routing.worker import About, Worker

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 128 * 2**20  # requests and tokens pass through it, no weights
ONGOING = 10_000  # the engine has a queue of its own
HEALTH_SECONDS = 2


class RayCluster:
    """The cluster that RAY_ADDRESS names, or one of this machine alone, which ends with the last replica.

    Usage statistics are off unless RAY_USAGE_STATS_ENABLED says otherwise. Raises MissingExtra without ray.
    """

    def __init__(self) -> None:
        if find_spec("ray") is None:
            raise MissingExtra("ray[serve]", "ray")
        self._names: set[str] = set()
        self._is_own = "RAY_ADDRESS" not in os.environ

    def start(self, model: str, options: Mapping[str, Any], *, replicas: int, threads: int) -> list[RayReplica]:
        """Start replicas and wait until all are there, each with so many CPUs, or a GPU where the options ask for one.

        Raises GristmillError for a model that a replica could not load.
        """
        self._connect(cpus=replicas * threads)
        from ray import serve

        serve.start(proxy_location="Disabled")  # our server is the only way in
        resources: dict[str, float] = {"num_cpus": threads}
        if str(options.get("device", "cpu")).startswith("cuda"):
            resources["num_gpus"] = 1
        deployment = serve.deployment(
            Worker,
            num_replicas=1,
            max_ongoing_requests=ONGOING,
            max_constructor_retry_count=1,  # a model that cannot be loaded now is told now
            ray_actor_options=resources,
            health_check_period_s=HEALTH_SECONDS,
            graceful_shutdown_timeout_s=1,
        )
        run = uuid.uuid4().hex[:8]
        names = [f"gristmill-{run}-{number}" for number in range(replicas)]
        self._names.update(names)

        def one(name: str) -> RayReplica:
            handle = serve.run(deployment.bind(model, dict(options), threads), name=name, route_prefix=None)
            return RayReplica(handle, handle.about.remote().result(), partial(self._close, name))

        try:
            with ThreadPoolExecutor(replicas) as pool:
                return list(pool.map(one, names))
        except Exception as error:
            for name in names:
                self._close(name)
            raise GristmillError(f"a replica could not begin: {error}") from error

    def _connect(self, cpus: int) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if self._is_own:  # ray reads these when it is imported
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # no other machine: listen on loopback
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or it writes one into the home directory
        import ray

        if not self._is_own:
            ray.init(ignore_reinit_error=True)
            return
        ray.init(
            address="local",
            num_cpus=max(cpus, os.cpu_count() or 1),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            logging_level="WARNING",
            log_to_driver=False,
        )
        logging.getLogger("ray.serve").setLevel(logging.WARNING)

    def _close(self, name: str) -> None:
        """End a replica; with the last one all that was started for them."""
        if name not in self._names:
            return
        import ray
        from ray import serve

        self._names.discard(name)
        if self._names or not self._is_own:
            serve.delete(name)
            return
        serve.shutdown()
        ray.shutdown()


class RayReplica:
    """A `Replica` behind a handle of Ray Serve. One event loop uses it, but for `call` and `close`."""

    def __init__(self, handle: Any, about: About, close: Any) -> None:
        self.about, self.is_ready, self.restarts = about, True, 0
        self._handle, self._close = handle, close
        self._answer = handle.options(stream=True).answer
        self._running: dict[str, tuple[Feed, asyncio.Task[None]]] = {}
        self._recovery: asyncio.Task[None] | None = None

    def send(self, feed: Feed) -> None:
        """See `Replica.send`."""
        if not self.is_ready:
            raise WorkerDied("the worker is starting again; try again")
        task = asyncio.get_running_loop().create_task(self._pass_on(feed))
        self._running[feed.work.request_id] = feed, task

    async def _pass_on(self, feed: Feed) -> None:
        try:
            async for item in self._answer.remote(feed.work):
                feed.take(item)
        except Exception as error:  # of Ray itself: what went wrong in the worker comes as an item
            logger.error("a Ray replica is lost: %s", type(error).__name__)
            feed.take(WorkerDied())
            self._lost()
        finally:
            self._running.pop(feed.work.request_id, None)

    def _lost(self) -> None:
        if self.is_ready:
            self.is_ready = False
            self._recovery = asyncio.get_running_loop().create_task(self._recover())

    async def _recover(self) -> None:
        """Serve starts another one and lets this call wait for it."""
        while not self.is_ready:
            try:
                self.about = await self._handle.about.remote()
            except Exception as error:
                logger.warning("a Ray replica is not back yet: %s", type(error).__name__)
                await asyncio.sleep(HEALTH_SECONDS)
            else:
                self.is_ready, self.restarts = True, self.restarts + 1

    def abort(self, request_id: str) -> None:
        """See `Replica.abort`."""
        if request_id in self._running:
            _, task = self._running.pop(request_id)
            task.cancel()
            self._handle.abort.remote(request_id)

    def call(self, name: str, *arguments: Any) -> Any:
        """See `Replica.call`."""
        try:
            value = self._handle.call.remote(name, arguments).result()
        except Exception as error:
            raise WorkerDied() from error
        if isinstance(value, Exception):
            raise value
        return value

    def close(self) -> None:
        """See `Replica.close`. Safe to call twice."""
        self.is_ready = False
        for feed, task in list(self._running.values()):
            feed.send(EngineClosed("the server is closing"))
            if not feed.stream.loop.is_closed():
                feed.stream.loop.call_soon_threadsafe(task.cancel)
        if self._recovery is not None and not self._recovery.get_loop().is_closed():
            self._recovery.get_loop().call_soon_threadsafe(self._recovery.cancel)
        self._close()

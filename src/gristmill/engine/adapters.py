"""The adapters that an engine has loaded, by name.

A step may mix requests of different adapters and of none. Keys and values differ by adapter, so requests share cached
prompts with those of the same adapter only, and of the same loading of it: what is loaded under an old name is another
adapter. Requests that run go on with the one they began with.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from gristmill.engine.runner import AdaptingRunner, Runner
from gristmill.errors import RequestError, closest
from gristmill.model.config import EncoderDecoderConfig, ModelConfig
from gristmill.model.lora.low_rank import Lora


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter in the form of an engine's runner. `version` counts what was loaded, under any name."""

    name: str
    version: int
    lora: Lora
    form: object

    @property
    def salt(self) -> tuple[str, str, int]:
        """What keeps its cached prompts apart."""
        return "adapter", self.name, self.version

    def flops(self, without: Callable[[int], float], prompt_tokens: int) -> Callable[[int], float]:
        """Operations of a request by its output tokens, from those of the model alone."""
        return lambda tokens: without(tokens) + 2.0 * self.lora.num_parameters * (prompt_tokens + tokens - 1)


class Adapters(Mapping[str, LoadedAdapter]):
    """Adapters by name. Not safe across threads: the engine's thread owns it."""

    def __init__(self, runner: Runner, config: ModelConfig, pair: EncoderDecoderConfig | None) -> None:
        self._runner, self._config = runner, config
        self._pair = pair is not None
        self._loaded: dict[str, LoadedAdapter] = {}
        self._versions = itertools.count()

    def __getitem__(self, name: str) -> LoadedAdapter:
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded)

    def __len__(self) -> int:
        return len(self._loaded)

    def find(self, name: str | None) -> LoadedAdapter | None:
        """The adapter of a request, None for a request without one. Raises RequestError for an unknown name."""
        if name is None:
            return None
        if name not in self._loaded:
            loaded = ", ".join(self._loaded) or "none"
            raise RequestError(
                f"adapter {name!r} is not loaded (loaded: {loaded}).{closest(str(name), self._loaded)}", field="adapter"
            )
        return self._loaded[name]

    def load(self, name: str, lora: Lora) -> None:
        """See `Engine.load_adapter`."""
        if not name:
            raise RequestError("an adapter needs a name", field="adapter")
        if self._pair or not isinstance(self._runner, AdaptingRunner):
            what = "an encoder-decoder" if self._pair else f"a {type(self._runner).__name__}"
            raise RequestError(f"adapter {name!r}: {what} computes without adapters; merge it", field="adapter")
        if lora.config != self._config:
            raise RequestError(
                f"adapter {name!r} was read for another configuration; read it for the model's own", field="adapter"
            )
        self._loaded[name] = LoadedAdapter(name, next(self._versions), lora, self._runner.adapt(lora))

    def unload(self, name: str, users: int) -> None:
        """See `Engine.unload_adapter`; `users` requests have it now."""
        self.find(name)
        if users:
            raise RequestError(
                f"adapter {name!r} is in use by {users} request{'s' * (users > 1)}; unload it when they are done",
                field="adapter",
                code="adapter_in_use",
            )
        del self._loaded[name]

"""From what a command line names to models in memory: each with the options of its kind, here or in workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gristmill.engine.classifier import is_classifier, load_servable
from gristmill.engine.encoders import is_encoder
from gristmill.engine.metrics.memory import give_back_freed
from gristmill.engine.scheduling.policies import policy_named
from gristmill.errors import GristmillError
from gristmill.serve.host import Source
from gristmill.serve.hosted import Servable
from gristmill.serve.routing.start import start_workers


def parse_sources(models: Sequence[str], adapters: Sequence[str] = ()) -> list[Source]:
    """Models, each MODEL or NAME=MODEL, with LoRA adapters, each NAME=DIRECTORY or MODEL:NAME=DIRECTORY.

    Raises GristmillError for two models of one name and an adapter that belongs to none.
    """
    named: dict[str, str] = {}
    for word in models:
        name, found, model = word.partition("=")
        if not found or "/" in name:
            name, found, model = word, "", word
        if not name.strip() or not model or (found and ":" in name):
            raise GristmillError(f"{word!r} has no name that can be asked for: write NAME=MODEL, without a colon")
        if name in named:
            raise GristmillError(f"two models are called {name!r}: give one another name, as in NAME={model}")
        named[name] = model
    theirs: dict[str, dict[str, str]] = {name: {} for name in named}
    for word in adapters:
        where, found, directory = word.partition("=")
        model, colon, adapter = where.rpartition(":")
        model = model if colon or len(named) > 1 else next(iter(named))
        if not directory or not adapter or model not in named:
            known = ", ".join(named)
            raise GristmillError(f"--adapters: {word!r} is not NAME=DIRECTORY, or MODEL:NAME=DIRECTORY of {known}")
        theirs[model][adapter] = directory
    return [Source(model, name, theirs[name]) for name, model in named.items()]


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Loads a source. generation: options of `LLM`, for models that generate; None stands for its own default.
    sources: what the server begins with. Where none of them generates, the others get the options, and refuse them by
    name. workers: processes for each model that generates, of Ray Serve with `ray`; 0 for none but this."""

    dtype: str = "float32"
    generation: Mapping[str, Any] = field(default_factory=dict)
    sources: Sequence[Source] = ()
    workers: int = 0
    ray: bool = False
    threads: int | None = None

    def __call__(self, source: Source) -> Servable:
        """The model. Raises what loading it raises."""
        options = {name: value for name, value in self.generation.items() if value is not None}
        if not _generates(source):
            if self.workers and not any(map(_generates, self.sources)):
                raise GristmillError("--workers and --ray are for models that generate; leave them out")
            theirs = {} if any(map(_generates, self.sources)) else {n: v for n, v in options.items() if n in _CHOSEN}
            return _load_here(source.model, {**theirs, "dtype": self.dtype})
        options |= {"dtype": self.dtype, "policy": policy_named("priority", ageing=1.0)}
        if not self.workers:
            return _load_here(source.model, options)
        return start_workers(
            source.model,
            options,
            workers=self.workers,
            on="ray" if self.ray else "processes",
            name=source.name,
            threads=self.threads,
        )


def _load_here(model: str, options: Mapping[str, Any]) -> Servable:
    loaded = load_servable(model, **options)
    give_back_freed()
    return loaded


_CHOSEN = ("quantization", "kv_cache_dtype", "speculation", "max_model_len", "kv_cache_tokens")
"""Options of generation that nobody has without asking for them."""


def _generates(source: Source) -> bool:
    return not is_classifier(source.model) and not is_encoder(source.model)

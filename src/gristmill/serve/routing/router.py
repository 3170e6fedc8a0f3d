"""A name that stands for two models: each request goes to the small or the large one, by its difficulty.

`--router name=auto,small=A,large=B,threshold=0.3,by=confidence`. A route may also set how long the model thinks:
`small=A@0,large=A@1024` is one model that thinks about hard requests only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args
from urllib.parse import quote

from gristmill.core import Message, Prompt, Renderer, RequestOutput, SamplingParams
from gristmill.engine.async_engine import RequestStream
from gristmill.engine.request import Standing
from gristmill.errors import GristmillError, RequestError, closest
from gristmill.serve.routing.difficulty import mean_doubt, surface_difficulty

By = Literal["confidence", "text"]


@dataclass(frozen=True)
class Route:
    """A served model and, where it is given, its thinking budget in tokens."""

    model: str
    thinking_budget: int | None = None


@dataclass(frozen=True)
class Choice:
    """Where a request goes, and why."""

    route: Route
    difficulty: float
    probe_tokens: int
    """Tokens that the small model generated to find out."""

    @property
    def headers(self) -> dict[str, str]:
        """What the answer's headers say of it."""
        return {
            "x-gristmill-model": quote(self.route.model, safe="/:"),
            "x-gristmill-difficulty": f"{self.difficulty:.4f}",
            "x-gristmill-probe-tokens": str(self.probe_tokens),
        }


class Submits(Protocol):
    """What is needed of an `AsyncEngine`."""

    async def submit(
        self, prompt: Prompt, params: SamplingParams, /, *, standing: Standing | None = None
    ) -> RequestStream:
        """Admit a request."""


@dataclass(frozen=True, kw_only=True)
class RequestRouter:
    """Requests for `name` that are harder than `threshold`, in [0, 1], go to `large`, the others to `small`.

    by: "text" looks at the last message of the user; "confidence" lets the small model begin, `probe_tokens` greedy
    tokens, and takes its doubt. It finds its prompt in its cache when it then answers. Raises GristmillError for a
    value out of range.
    """

    name: str
    small: Route
    large: Route
    threshold: float
    by: By = "confidence"
    probe_tokens: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise GristmillError(f"--router: threshold must be in [0, 1], got {self.threshold}")
        if self.probe_tokens < 1:
            raise GristmillError(f"--router: probe_tokens must be at least 1, got {self.probe_tokens}")
        if self.small == self.large or self.name in (self.small.model, self.large.model):
            raise GristmillError("--router: name, small and large must differ")

    async def choose(
        self, messages: Sequence[Message], engine: Submits, renderer: Renderer, standing: Standing | None = None
    ) -> Choice:
        """Decide where a conversation goes; what is too long for the small model goes to the large one.

        engine, renderer: the small model's. standing: of the request, for its priority and its own cache. Raises what
        they raise.
        """
        difficulty, spent = 0.0, 0
        if self.by == "text":
            difficulty = surface_difficulty(_last_of_user(messages))
        else:
            params = SamplingParams(temperature=0, max_tokens=self.probe_tokens, logprobs=0)
            prompt = await asyncio.to_thread(renderer.render_prompt, messages)
            params = params.ending_at(renderer.stop_token_ids)
            try:
                stream = await engine.submit(prompt, params, standing=standing)
            except RequestError as error:
                if error.code != "context_length_exceeded":
                    raise
                return Choice(self.large, 1.0, 0)
            answer = (await _last(stream)).outputs[0]
            difficulty, spent = mean_doubt(answer), len(answer.token_ids)
        return Choice(self.large if difficulty > self.threshold else self.small, difficulty, spent)


def parse_router(text: str) -> RequestRouter:
    """name=auto,small=A,large=B,threshold=0.3[,by=text][,probe_tokens=8], where A and B are MODEL or MODEL@BUDGET.

    Raises GristmillError naming the part that is wrong.
    """
    known = ("name", "small", "large", "threshold", "by", "probe_tokens")
    values: dict[str, str] = {}
    for part in text.split(","):
        key, found, value = part.partition("=")
        if key not in known:
            raise GristmillError(f"--router: unknown key {key!r}.{closest(key, known)} Known: {', '.join(known)}.")
        if not found or not value or key in values:
            raise GristmillError(f"--router: give {key}=VALUE once")
        values[key] = value
    if missing := [key for key in known[:4] if key not in values]:
        raise GristmillError(f"--router: {', '.join(missing)} is missing")
    by = values.get("by", "confidence")
    if by not in get_args(By):
        raise GristmillError(f"--router: by must be one of {', '.join(get_args(By))}, got {by!r}")
    try:
        return RequestRouter(
            name=values["name"],
            small=_route(values["small"]),
            large=_route(values["large"]),
            threshold=float(values["threshold"]),
            by="text" if by == "text" else "confidence",
            probe_tokens=int(values.get("probe_tokens", 8)),
        )
    except ValueError as error:
        raise GristmillError(f"--router: {error}") from error


def _route(text: str) -> Route:
    model, found, budget = text.rpartition("@")
    return Route(model, int(budget)) if found and budget.isdigit() else Route(text)


def _last_of_user(messages: Sequence[Message]) -> str:
    content = next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")
    return content if isinstance(content, str) else ""


async def _last(stream: RequestStream) -> RequestOutput:
    async with stream:
        outputs = [output async for output in stream]
    return outputs[-1]

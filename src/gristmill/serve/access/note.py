"""What the routes tell of their request, for its log line, the metrics and its caller's quota."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.types import Scope

from gristmill.core import RequestOutput
from gristmill.serve.access.traffic import Traffic


@dataclass(slots=True)
class Note:
    """One per request, at `request.state.note`. Routes call `serve` once they know the model, then `progress` with each
    output of the engine, or add to the counts themselves."""

    traffic: Traffic
    begun: float = field(default_factory=time.perf_counter)
    key: str | None = None
    """Name of the caller's key."""
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str | None = None
    left: bool = False
    """Whether the client left before the end."""
    at_end: list[Callable[[], None]] = field(default_factory=list)
    """Called when the request is over."""
    _seen: dict[tuple[str, int], tuple[int, float]] = field(default_factory=dict)

    def serve(self, model: str) -> None:
        """Tell which model answers; never a name that is only the client's."""
        assert self.model is None
        self.model = model
        self.traffic.running[model] += 1

    def progress(self, output: RequestOutput) -> None:
        """Count what is new in the cumulative output of an engine's request."""
        assert self.model is not None
        now = time.perf_counter()
        for choice in output.outputs:
            place = (output.request_id, choice.index)
            if not self._seen:
                self.traffic.first_token[self.model].add(now - self.begun)
            if place not in self._seen:
                self.prompt_tokens += len(output.prompt_token_ids) if choice.index == 0 else 0
                self._seen[place] = (0, now)
            count, before = self._seen[place]
            new = len(choice.token_ids) - count
            for _ in range(new if count else 0):
                self.traffic.between_tokens[self.model].add((now - before) / new)
            if new:
                self.completion_tokens += new
                self._seen[place] = (count + new, now)
            self.finish_reason = choice.finish_reason or self.finish_reason

    def close(self) -> None:
        """The request is over."""
        if self.model is not None:
            self.traffic.running[self.model] -= 1
            self.traffic.tokens[self.model, "prompt"] += self.prompt_tokens
            self.traffic.tokens[self.model, "completion"] += self.completion_tokens
            self.traffic.left[self.model] += self.left
        for call in self.at_end:
            call()


def note_of(scope: Scope) -> Note:
    """The note of a request."""
    note: Note = scope["state"]["note"]
    return note

"""How many prompt tokens a step may hold while others wait for their next token."""

from __future__ import annotations

_WEIGHT = 0.2
"""Of a new measurement in the running means."""
_SURPRISE = 2.0
"""A measurement counts as at most so many times the mean, or the reverse: a step may stall for reasons of its own."""
_PROBE = 16
"""Prompt tokens of a step as long as the costs are not known."""


class Pacing:
    """Keeps a step with prompt tokens within `stretch` times the duration of a step without.

    It learns two costs from the steps themselves: a step that only goes on with running sequences, and what each prompt
    token adds to one. Without a stretch there is no limit: prompts then go as fast as they can.
    """

    def __init__(self, stretch: float | None) -> None:
        self.stretch = stretch
        self._step: float | None = None  # seconds of a step without prompt tokens
        self._token: float | None = None  # seconds that a prompt token adds

    def limit(self, deciding: int) -> int | None:
        """Most prompt tokens of the next step, in which `deciding` sequences wait for a token; None for no limit."""
        if self.stretch is None or deciding == 0:
            return None
        if self._step is None or self._token is None:
            return _PROBE
        return max(1, int((self.stretch - 1.0) * self._step / self._token))

    def measured(self, seconds: float, deciding: int, prompt_tokens: int) -> None:
        """Learn from a step."""
        if deciding and not prompt_tokens:
            self._step = _mean(self._step, seconds)
        elif prompt_tokens:
            added = seconds - (self._step or 0.0 if deciding else 0.0)
            if added > 0:
                self._token = _mean(self._token, added / prompt_tokens)


def _mean(old: float | None, new: float) -> float:
    if old is None:
        return new
    return old + _WEIGHT * (min(max(new, old / _SURPRISE), old * _SURPRISE) - old)

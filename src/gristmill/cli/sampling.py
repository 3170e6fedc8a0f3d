"""The options that `generate` and `chat` share."""

from __future__ import annotations

from dataclasses import dataclass

from gristmill.core import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; a verb's options begin with these."""

    temperature: float = 0.7
    """0 is greedy; higher is more varied."""
    top_p: float = 0.95
    """Sample from the smallest set of tokens whose probability reaches this."""
    top_k: int = 0
    """Sample from the k most probable tokens; 0 is no limit."""
    min_p: float = 0.0
    """Leave out tokens below this share of the most probable one."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that were seen less likely."""
    max_tokens: int = 256
    """Most tokens to generate."""
    stop: tuple[str, ...] = ()
    """Strings that end the output."""
    seed: int | None = None
    """Seed of the draw; none means another output each time."""

    def params(self, *, room: int) -> SamplingParams:
        """The engine's parameters, with no more tokens than there is `room` for."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            max_tokens=min(self.max_tokens, max(1, room)),
            stop=self.stop,
            seed=self.seed,
        )

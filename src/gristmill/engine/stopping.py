"""When a completion ends. Each check is a small pure function; a `Stopper` composes those that a request asks for.

Stop strings are the detokeniser's, for they are about text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from gristmill.core import FinishReason, SamplingParams
from gristmill.errors import RequestError
from gristmill.model.accounting import flops_per_token
from gristmill.model.config import ModelConfig

Stop = tuple[FinishReason, int | str | None]
"""Why a completion ended: its finish reason, and what did it."""


def repeats(ids: Sequence[int], longest: int, count: int) -> bool:
    """Whether the last ids are one pattern of at most `longest` tokens, `count` times in a row."""
    for size in range(1, longest + 1):
        length = size * count
        if length > len(ids):
            return False
        if ids[-1] == ids[-1 - size] and ids[-length:-size] == ids[-length + size :]:
            return True
    return False


def generation_flops(config: ModelConfig, prompt_tokens: int) -> Callable[[int], float]:
    """Floating-point operations spent when so many output tokens stand: the last of them was not read yet."""

    def spent(output_tokens: int) -> float:
        read = prompt_tokens + output_tokens - 1
        return read * flops_per_token(config, (read + 1) / 2, training=False)  # a token attends to those up to itself

    return spent


class Stopper:
    """Tells after each token whether a completion ends with it. Made when the completion begins: its time counts from
    then on `clock`, in seconds.

    end_ids: tokens that end it, the model's and the request's own. flops: operations spent when so many output tokens
    stand; needed for `max_flops`, else RequestError.
    """

    def __init__(
        self,
        params: SamplingParams,
        end_ids: Collection[int],
        max_tokens: int,
        clock: Callable[[], float] = time.monotonic,
        flops: Callable[[int], float] | None = None,
    ) -> None:
        if params.max_flops is not None and flops is None:
            raise RequestError("max_flops: this model's operations are not counted; use max_tokens", field="max_flops")
        self._params, self._end_ids, self._max_tokens = params, frozenset(end_ids), max_tokens
        self._named = frozenset(params.stop_token_ids or ())
        self._clock, self._flops = clock, flops
        self._begin = clock() if params.max_time is not None else 0.0

    @property
    def needs_probability(self) -> bool:
        """Whether `check` wants the probability of each token."""
        return self._params.stop_below_probability > 0

    def backdate(self, seconds: float) -> None:
        """Count the time from so much earlier on: the completion began elsewhere."""
        self._begin -= seconds

    def check(self, output_ids: Sequence[int], probability: float | None = None) -> Stop | None:
        """Why the completion ends with the last of `output_ids`, or None. probability: the model's of that token."""
        params, length = self._params, len(output_ids)
        if length >= params.min_tokens and (stop := self._content(output_ids, probability)):
            return stop
        if length >= self._max_tokens:
            return "length", None
        if params.max_time is not None and self._clock() - self._begin > params.max_time:
            return "length", "max_time"
        if params.max_flops is not None and self._flops is not None and self._flops(length) > params.max_flops:
            return "length", "max_flops"
        return None

    def _content(self, output_ids: Sequence[int], probability: float | None) -> Stop | None:
        params, last = self._params, output_ids[-1]
        if last in self._end_ids:
            return "stop", last if last in self._named else None
        if self.needs_probability:
            if probability is None:
                raise ValueError("stop_below_probability needs the probability of each token")
            if probability < params.stop_below_probability:
                return "stop", "probability"
        if params.repetition_stop is not None and repeats(output_ids, *params.repetition_stop):
            return "stop", "repetition"
        return None

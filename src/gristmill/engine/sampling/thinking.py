"""How long a model thinks before it answers: at least, at most, and "wait" in the place of an early end.

Thinking begins with the output and ends with `think_end`. All follows from the output ids, so drafts change nothing.
Source: Muennighoff et al. 2025 (s1), section 3.1, budget forcing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from gristmill.core import LogitsRow, SamplingParams
from gristmill.engine.sampling.processors import History, SlotProcessor, check_ids
from gristmill.errors import RequestError
from gristmill.tokens.tokenizer import Tokenizer


class _Thought:
    """One slot's options, and where its output stands."""

    def __init__(self, params: SamplingParams, end: list[int], wait: int | None, end_ids: Collection[int]) -> None:
        self.least, self.waits, self.temperature = params.min_thinking_tokens, params.think_waits, params.temperature
        self.most = math.inf if params.thinking_budget is None else params.thinking_budget
        self.end, self.wait, self.end_ids = end, wait, sorted(end_ids)
        self._history = History()
        self._over = math.inf  # how many tokens stood when the thinking ended
        self._waited: list[int] = []  # positions of the wait token before that

    def follow(self, output_ids: Sequence[int]) -> None:
        """Account for these outputs."""
        self._history.follow(output_ids, self._add, self._drop)

    @property
    def over(self) -> bool:
        """Whether the answer has begun."""
        return len(self._history.ids) >= self._over

    @property
    def waits_left(self) -> bool:
        """Whether an early end is replaced once more. The model's own waits count too."""
        return len(self._waited) < self.waits

    def matched(self) -> int:
        """How many tokens of the end delimiter stand at the end of the output."""
        ids = self._history.ids
        sizes = range(min(len(self.end) - 1, len(ids)), 0, -1)
        return next((size for size in sizes if ids[-size:] == self.end[:size]), 0)

    def _add(self, token: int) -> None:
        ids = self._history.ids
        if not self.over and ids[-len(self.end) :] == self.end:
            self._over = len(ids)
        elif not self.over and token == self.wait:
            self._waited.append(len(ids))

    def _drop(self, token: int) -> None:
        length = len(self._history.ids)
        if self._over == length:
            self._over = math.inf
        if self._waited[-1:] == [length]:
            self._waited.pop()


class Thinking(SlotProcessor[_Thought]):
    """Forces `think_end` after `thinking_budget` tokens, masks it before `min_thinking_tokens`, and turns the first
    `think_waits` early ends into `think_wait`."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        super().__init__()
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    def _ids(self, value: str | int | Sequence[int]) -> list[int]:
        if isinstance(value, str):
            return self._tokenizer.encode(value, add_bos=False)
        return [value] if isinstance(value, int) else list(value)

    def validate(self, params: SamplingParams) -> None:
        """See SlotProcessor."""
        if not params.limits_thinking:
            return
        end = self._ids(params.think_end)
        check_ids("think_end", end, self._vocab_size)
        if not end:
            raise RequestError(f"think_end {params.think_end!r} has no tokens", field="think_end")
        limit = math.inf if params.max_tokens is None else params.max_tokens
        if params.thinking_budget is not None and params.thinking_budget + len(end) > limit:
            raise RequestError(
                f"thinking_budget {params.thinking_budget} and the {len(end)} tokens of think_end exceed max_tokens "
                f"({params.max_tokens})",
                field="thinking_budget",
            )
        if params.think_waits:
            wait = self._ids(params.think_wait)
            check_ids("think_wait", wait, self._vocab_size)
            if len(wait) != 1:
                raise RequestError(
                    f"think_wait must be one token, {params.think_wait!r} has {len(wait)}; give the id of one",
                    field="think_wait",
                )
            if wait[0] in end:
                raise RequestError("think_wait must not be a token of think_end", field="think_wait")

    def begin(self, params: SamplingParams, prompt_ids: Sequence[int], end_ids: Collection[int]) -> _Thought | None:
        """See SlotProcessor."""
        if not params.limits_thinking:
            return None
        wait = self._ids(params.think_wait)[0] if params.think_waits else None
        return _Thought(params, self._ids(params.think_end), wait, end_ids)

    def change(self, logits: Tensor, concerned: Sequence[tuple[int, LogitsRow, _Thought]]) -> None:
        """See SlotProcessor."""
        for number, row, thought in concerned:
            thought.follow(row.output_ids)
            if not thought.over:
                _steer(logits[number], thought, len(row.output_ids))


def _steer(logits: Tensor, thought: _Thought, length: int) -> None:
    matched = thought.matched()
    if length >= thought.most:
        logits.fill_(float("-inf"))
        logits[thought.end[matched]] = 0.0
        return
    ending = sorted({*thought.end_ids, *thought.end[matched:][: int(matched == len(thought.end) - 1)]})
    if thought.waits_left and thought.wait is not None:
        # the chance of ending goes to the wait token, whatever the temperature: a greedy end becomes a greedy wait
        index = torch.tensor([*ending, thought.wait], device=logits.device)
        heat = max(thought.temperature, torch.finfo(logits.dtype).tiny)
        scores = logits[index]
        best = scores.max()
        if bool(best.isfinite()):
            logits[thought.wait] = best + heat * ((scores - best) / heat).logsumexp(0)
    if thought.waits_left or length < thought.least:
        logits[torch.tensor(ending, dtype=torch.long, device=logits.device)] = float("-inf")

"""No run of n tokens twice. Source: Paulus et al. 2017, section 2.5, as transformers has it (prompt included)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from gristmill.core import LogitsRow, SamplingParams
from gristmill.engine.sampling.processors import History, SlotProcessor, ban, tail


class _Following:
    """Which tokens have followed each run of n - 1."""

    def __init__(self, size: int, prompt_ids: Sequence[int]) -> None:
        self._size = size
        self._last = list(prompt_ids[max(0, len(prompt_ids) - size + 1) :]) if size > 1 else []  # before the output
        self._history = History()
        self._following: dict[tuple[int, ...], list[int]] = {}
        for start in range(len(prompt_ids) - size + 1):
            *before, token = prompt_ids[start : start + size]
            self._following.setdefault(tuple(before), []).append(token)

    def banned(self, row: LogitsRow) -> list[int]:
        """Tokens that would end a run seen before."""
        self._history.follow(row.output_ids, self._add, self._drop)
        before = tail(row, self._size - 1) if self._size > 1 else []
        return list(self._following.get(tuple(before), ()))

    def _run(self) -> tuple[int, ...] | None:
        """What stands before the last output token, when that is long enough."""
        before = [*self._last, *self._history.ids[-self._size :]][-self._size : -1]
        return tuple(before) if len(before) == self._size - 1 else None

    def _add(self, token: int) -> None:
        if (before := self._run()) is not None:
            self._following.setdefault(before, []).append(token)

    def _drop(self, token: int) -> None:
        if (before := self._run()) is not None:
            self._following[before].pop()


class NoRepeatedNgrams(SlotProcessor[_Following]):
    """Bans what would complete a run of `no_repeat_ngram_size` tokens that is there already."""

    def begin(self, params: SamplingParams, prompt_ids: Sequence[int], end_ids: Collection[int]) -> _Following | None:
        """See SlotProcessor."""
        return _Following(params.no_repeat_ngram_size, prompt_ids) if params.no_repeat_ngram_size else None

    def change(self, logits: Tensor, concerned: Sequence[tuple[int, LogitsRow, _Following]]) -> None:
        """See SlotProcessor."""
        ban(logits, [number for number, _, _ in concerned], [state.banned(row) for _, row, state in concerned])

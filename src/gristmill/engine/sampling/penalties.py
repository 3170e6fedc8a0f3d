"""Penalties on tokens that were there already.

Sources: Keskar et al. 2019 (CTRL), section 4.1, in the sign-aware form of transformers and vLLM; OpenAI API reference.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gristmill.core import LogitsRow, SamplingParams
from gristmill.engine.sampling.processors import History, IdArray, SlotProcessor, places


def penalised(values: Tensor, counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
    """Logits of tokens that were seen: first divided (if positive) or multiplied by `repetition`, then less
    counts * frequency + (counts > 0) * presence, where `counts` are those in the output.

    All of one shape, or broadcast to one.
    """
    values = torch.where(values > 0, values / repetition, values * repetition)
    return values - (counts * frequency + (counts > 0) * presence)


class _Counts:
    """Tokens of one slot that a penalty falls on, and how often each is in the output. Grows by doubling."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self.penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        # presence and frequency are about the output only
        seen = dict.fromkeys(prompt_ids) if params.repetition_penalty != 1.0 else {}
        self._place = {token: place for place, token in enumerate(seen)}
        self._prompt = len(seen)
        self._ids = np.zeros(len(seen) + 64, np.int64)
        self._counts = np.zeros(len(seen) + 64, np.float32)
        self._ids[: len(seen)] = list(seen)
        self._history = History()

    def follow(self, output_ids: Sequence[int]) -> tuple[IdArray, np.ndarray[Any, np.dtype[np.float32]]]:
        """Ids and counts after these outputs."""
        self._history.follow(output_ids, self._add, self._drop)
        size = len(self._place)
        return self._ids[:size], self._counts[:size]

    def _add(self, token: int) -> None:
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token
        self._counts[place] += 1

    def _drop(self, token: int) -> None:
        place = self._place[token]
        self._counts[place] -= 1
        if place >= self._prompt and self._counts[place] == 0:  # the last in: places are given in order of appearance
            del self._place[token]


class Penalties(SlotProcessor[_Counts]):
    """Repetition penalty over prompt and output, presence and frequency penalties over the output."""

    def begin(self, params: SamplingParams, prompt_ids: Sequence[int], end_ids: Collection[int]) -> _Counts | None:
        """See SlotProcessor."""
        neutral = params.repetition_penalty == 1.0 and params.presence_penalty == params.frequency_penalty == 0.0
        return None if neutral else _Counts(params, prompt_ids)

    def change(self, logits: Tensor, concerned: Sequence[tuple[int, LogitsRow, _Counts]]) -> None:
        """See SlotProcessor."""
        ids: list[IdArray] = []
        counts: list[np.ndarray[Any, np.dtype[np.float32]]] = []
        for _, row, state in concerned:
            own, times = state.follow(row.output_ids)
            ids.append(own.copy())  # copies: another row of the same slot moves the state on
            counts.append(times.copy())
        sizes = [len(own) for own in ids]
        if not any(sizes):
            return
        index = places(logits, [number for number, _, _ in concerned], ids)
        strengths = np.repeat(np.array([state.penalties for _, _, state in concerned], np.float32), sizes, axis=0)
        repetition, presence, frequency = torch.from_numpy(strengths).to(logits.device).unbind(1)
        count = torch.from_numpy(np.concatenate(counts)).to(logits.device)
        flat = logits.view(-1)
        flat[index] = penalised(flat[index], count, repetition, presence, frequency)

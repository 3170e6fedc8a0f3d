"""How long the output gets: end tokens masked up to a minimum, and their logits raised or lowered after a start."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gristmill.core import LogitsRow, SamplingParams
from gristmill.engine.sampling.processors import IdArray, SlotProcessor, ban, places


class MinTokens(SlotProcessor[tuple[int, IdArray]]):
    """Masks the end tokens until `min_tokens` stand."""

    def begin(
        self, params: SamplingParams, prompt_ids: Sequence[int], end_ids: Collection[int]
    ) -> tuple[int, IdArray] | None:
        """See SlotProcessor."""
        return (params.min_tokens, np.array(sorted(end_ids), np.int64)) if params.min_tokens and end_ids else None

    def concerned(self, rows: Sequence[LogitsRow]) -> list[tuple[int, LogitsRow, tuple[int, IdArray]]]:
        """The rows that are still too short."""
        return [entry for entry in super().concerned(rows) if len(entry[1].output_ids) < entry[2][0]]

    def change(self, logits: Tensor, concerned: Sequence[tuple[int, LogitsRow, tuple[int, IdArray]]]) -> None:
        """See SlotProcessor."""
        ban(logits, [number for number, _, _ in concerned], [ends for _, _, (_, ends) in concerned])


_Decay = tuple[int, float, IdArray]


class LengthDecay(SlotProcessor[_Decay]):
    """Adds |logit| * (factor ** (tokens - start) - 1) to end tokens once more than `start` tokens stand.

    Source: transformers' exponential_decay_length_penalty.
    """

    def begin(self, params: SamplingParams, prompt_ids: Sequence[int], end_ids: Collection[int]) -> _Decay | None:
        """See SlotProcessor."""
        if params.length_decay is None or not end_ids:
            return None
        start, factor = params.length_decay
        return int(start), float(factor), np.array(sorted(end_ids), np.int64)

    def concerned(self, rows: Sequence[LogitsRow]) -> list[tuple[int, LogitsRow, _Decay]]:
        """The rows that are long enough."""
        return [entry for entry in super().concerned(rows) if len(entry[1].output_ids) > entry[2][0]]

    def change(self, logits: Tensor, concerned: Sequence[tuple[int, LogitsRow, _Decay]]) -> None:
        """See SlotProcessor."""
        numbers = [number for number, _, _ in concerned]
        index = places(logits, numbers, [ends for _, _, (_, _, ends) in concerned])
        growth: list[np.ndarray[Any, np.dtype[np.float32]]] = []
        for _, row, (start, factor, ends) in concerned:
            # up to 1e30: above every other logit, and finite, so that no NaN arises
            exponent = min((len(row.output_ids) - start) * math.log(factor), 69.0)
            growth.append(np.full(len(ends), math.expm1(exponent), np.float32))
        flat = logits.view(-1)
        values = flat[index]
        grown = values + values.abs() * torch.from_numpy(np.concatenate(growth)).to(logits.device)
        flat[index] = torch.where(values.isfinite(), grown.clamp(max=torch.finfo(values.dtype).max), values)

"""Logit bias: a number added to the logits of given tokens. Source: OpenAI API reference."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gristmill.core import LogitsRow, SamplingParams
from gristmill.engine.sampling.processors import IdArray, SlotProcessor, check_ids, places
from gristmill.errors import RequestError

_Bias = tuple[IdArray, np.ndarray[Any, np.dtype[np.float32]]]


_HIGHEST = float(np.finfo(np.float32).max)


class LogitBias(SlotProcessor[_Bias]):
    """Adds `logit_bias`; -inf bans a token."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self._vocab_size = vocab_size

    def validate(self, params: SamplingParams) -> None:
        """See SlotProcessor."""
        check_ids("logit_bias", params.logit_bias or (), self._vocab_size)
        for bias in (params.logit_bias or {}).values():
            if not bias <= _HIGHEST:
                raise RequestError(f"logit_bias {bias} is not a finite float32 or -inf", field="logit_bias")

    def begin(self, params: SamplingParams, prompt_ids: Sequence[int], end_ids: Collection[int]) -> _Bias | None:
        """See SlotProcessor."""
        bias = params.logit_bias
        return (np.array(list(bias), np.int64), np.array(list(bias.values()), np.float32)) if bias else None

    def change(self, logits: Tensor, concerned: Sequence[tuple[int, LogitsRow, _Bias]]) -> None:
        """See SlotProcessor."""
        index = places(logits, [number for number, _, _ in concerned], [ids for _, _, (ids, _) in concerned])
        values = torch.from_numpy(np.concatenate([values for _, _, (_, values) in concerned])).to(logits.device)
        logits.view(-1)[index] += values

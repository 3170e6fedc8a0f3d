"""Sampling from random logits under a constraint, one token at a time, without an engine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine import helpers
from gristmill.core import BatchUpdate, LogitsRow, SamplingParams, StructuredOutput
from gristmill.engine.constraints.processor import Constraints
from gristmill.tokens.tokenizer import Tokenizer

Logits = Callable[[int], Tensor]


@functools.cache
def constraints() -> Constraints:
    """Over the tiny byte-level vocabulary. Shared: tests free the slots they use."""
    return of(helpers.tokenizer())


def of(tokenizer: Tokenizer) -> Constraints:
    return Constraints(tokenizer, tokenizer.vocab_size, max_model_len=512)


def begin(target: Constraints, params: SamplingParams, slot: int = 0) -> SamplingParams:
    """Validate and put into a slot."""
    target.validate(params)
    target.update(BatchUpdate(removed=[slot], added=[(slot, params, [1])]))
    return params


def row(target: Constraints, logits: Tensor, output: list[int], slot: int = 0) -> Tensor:
    return target.apply(logits[None], [LogitsRow(slot, [1], output)])[0]


def random_logits(target: Constraints, seed: int, scale: float = 3.0) -> Logits:
    generator = torch.Generator().manual_seed(seed)
    return lambda _: torch.randn(target.vocab_size, generator=generator) * scale


def generate(target: Constraints, params: SamplingParams, logits: Logits, seed: int = 0) -> str:
    """The text of one output; it must end with an end token within max_tokens."""
    begin(target, params)
    ends = (*target.tokenizer.stop_token_ids, *(params.stop_token_ids or ()))
    generator = torch.Generator().manual_seed(seed)
    output: list[int] = []
    for step in range(params.max_tokens or target.max_model_len - 1):
        allowed = row(target, logits(step), output)
        assert allowed.max() > -torch.inf, f"nothing may follow {target.tokenizer.decode(output)!r}"
        token = int(torch.multinomial(allowed.softmax(-1), 1, generator=generator))
        if token in ends:
            return target.tokenizer.decode(output)
        output.append(token)
    raise AssertionError(f"not ended in time: {target.tokenizer.decode(output)!r}")


def asked(max_tokens: int | None = 64, **fields: Any) -> SamplingParams:
    return SamplingParams(structured=StructuredOutput(**fields), max_tokens=max_tokens)

"""Speculative decoding in its plainest form: two models, no cache, no batch, no engine. What the engine must equal.

Source: Leviathan et al. 2023, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from gristmill.engine.sampling.random import uniform
from gristmill.engine.speculation.proposer import Draft
from gristmill.engine.speculation.verify import DRAFT, draw, verify, verify_greedy
from gristmill.model.transformer import Transformer


@dataclass
class ReferenceRun:
    """The new tokens, and of each round how many were drafted and how many of them stood."""

    token_ids: list[int] = field(default_factory=list)
    rounds: list[tuple[int, int]] = field(default_factory=list)


@torch.inference_mode()
def speculative_reference(
    target: Transformer,
    draft: Transformer,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    draft_tokens: int = 5,
    temperature: float = 0.0,
    seed: int = 0,
    index: int = 0,
) -> ReferenceRun:
    """Continue `prompt` by `max_tokens` tokens: greedy at temperature 0, otherwise drawn with this seed."""
    run = ReferenceRun()
    while len(run.token_ids) < max_tokens:
        known = [*prompt, *run.token_ids]
        count = min(draft_tokens, max_tokens - len(run.token_ids) - 1)
        proposed = _draft(draft, known, count, temperature, seed, index)
        logits = target(torch.tensor([*known, *proposed.token_ids]))[len(known) - 1 :].float()
        if temperature == 0:
            tokens, accepted = verify_greedy(logits.argmax(-1).tolist(), proposed.token_ids)
        else:
            place = partial(_place, seed, index, len(run.token_ids))
            tokens, accepted = verify(_probs(logits, temperature), proposed, place)
        run.token_ids += tokens
        run.rounds.append((count, accepted))
    return run


def _draft(model: Transformer, known: Sequence[int], count: int, temperature: float, seed: int, index: int) -> Draft:
    tokens: list[int] = []
    probs: list[Tensor] = []
    for place in range(len(known), len(known) + count):
        logits = model(torch.tensor([*known, *tokens]))[-1:].float()
        if temperature == 0:
            tokens.append(int(logits.argmax()))
            continue
        probs.append(_probs(logits, temperature))
        tokens += draw(probs[-1], [uniform(seed, index, place, DRAFT)])
    return Draft(tokens, torch.cat(probs) if probs else None)


def _probs(logits: Tensor, temperature: float) -> Tensor:
    return ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)


def _place(seed: int, index: int, position: int, offset: int, stream: int) -> float:
    return uniform(seed, index, position + offset, stream)

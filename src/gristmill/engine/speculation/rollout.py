"""Drafting with a model: k tokens for every sequence of a batch in k forwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.engine.memory.paged_cache import Chunk
from gristmill.engine.runner import Runner
from gristmill.engine.sampling.random import uniforms
from gristmill.engine.speculation.proposer import Draft, DraftRequest
from gristmill.engine.speculation.verify import DRAFT, draw


@dataclass
class Drafting:
    """One sequence while its draft is made."""

    request: DraftRequest
    start: int
    """Tokens whose keys and values the drafting model has already."""
    limit: int
    """Most tokens to draft, at least 1."""
    token_ids: list[int] = field(default_factory=list)
    probs: list[Tensor] = field(default_factory=list)
    ended: bool = False
    """The drafting model's logits were not numbers."""

    @property
    def draft(self) -> Draft:
        """What was drafted."""
        return Draft(self.token_ids, torch.stack(self.probs) if self.probs else None)


def longest_draft(request: DraftRequest, block_size: int, context: int) -> int:
    """Most tokens that can be drafted: all but the last of a draft are written behind the last known token, where the
    sequence must have blocks and the drafting model positions."""
    room = min(len(request.block_table) * block_size, context) - len(request.token_ids)
    return min(request.limit, room + 1)


def roll_out(runner: Runner, draftings: Sequence[Drafting], *, vocab_size: int, most: int) -> None:
    """Fill in the drafts.

    vocab_size: the target's; a drafting model's further columns are padding and left out, missing ones have
    probability 0. most: tokens of one forward while the model catches up on tokens that it has not read.
    """
    for pieces in _pieces(draftings, most):
        ids = [token for one, start, end in pieces for token in one.request.token_ids[start:end]]
        chunks = [Chunk(one.request.block_table, start, end - start) for one, start, end in pieces]
        hidden = runner.hidden_states(ids, chunks)
        ready, rows, row = [], [], -1
        for one, start, end in pieces:
            row += end - start
            if end == len(one.request.token_ids):
                ready.append(one)
                rows.append(row)
        if ready:
            _extend(runner, ready, hidden[rows], vocab_size)
    while active := [one for one in draftings if len(one.token_ids) < one.limit and not one.ended]:
        chunks = [
            Chunk(one.request.block_table, len(one.request.token_ids) + len(one.token_ids) - 1, 1) for one in active
        ]
        _extend(runner, active, runner.hidden_states([one.token_ids[-1] for one in active], chunks), vocab_size)


def _pieces(draftings: Sequence[Drafting], most: int) -> Iterator[list[tuple[Drafting, int, int]]]:
    """The tokens to catch up on, cut into forwards: of each sequence from where to where."""
    pieces: list[tuple[Drafting, int, int]] = []
    budget = most
    for one in draftings:
        start, length = one.start, len(one.request.token_ids)
        while start < length:
            end = min(length, start + budget)
            pieces.append((one, start, end))
            budget -= end - start
            start = end
            if budget == 0:
                yield pieces
                pieces, budget = [], most
    if pieces:
        yield pieces


def _extend(runner: Runner, active: Sequence[Drafting], hidden: Tensor, vocab_size: int) -> None:
    """Add one token to each draft, from the states (drafts, hidden) before it."""
    if not any(one.request.draws for one in active):
        tokens, probs = runner.greedy(hidden), None
    else:
        logits = runner.logits(hidden)[:, :vocab_size]
        tokens, probs = _draw(active, F.pad(logits, (0, vocab_size - logits.shape[1]), value=float("-inf")))
    for row, (one, token) in enumerate(zip(active, tokens, strict=True)):
        if not 0 <= token < vocab_size:
            one.ended = True
            continue
        one.token_ids.append(token)
        if probs is not None and one.request.draws:
            one.probs.append(probs[row])


def _draw(active: Sequence[Drafting], logits: Tensor) -> tuple[list[int], Tensor]:
    temperatures = torch.tensor(
        [one.request.temperature if one.request.draws else 1.0 for one in active], device=logits.device
    )
    # the highest becomes 0 first, so that a temperature near 0 gives the most probable token and not infinities
    probs = ((logits - logits.amax(-1, keepdim=True)) / temperatures[:, None]).softmax(-1)
    requests = [one.request for one in active]
    positions = [len(one.request.token_ids) + len(one.token_ids) for one in active]
    numbers = uniforms([one.seed for one in requests], [one.index for one in requests], positions, DRAFT)
    drawn, best = draw(probs, numbers.tolist()), logits.argmax(-1).tolist()
    return [d if one.draws else b for one, b, d in zip(requests, best, drawn, strict=True)], probs

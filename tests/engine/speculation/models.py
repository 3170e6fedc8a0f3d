"""Tiny models that draft, and the plain loops that their drafts must equal."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gristmill.engine.memory.paged_cache import Chunk
from gristmill.engine.runner import TorchRunner
from gristmill.engine.speculation.draft_model import DraftModelProposer
from gristmill.engine.speculation.proposer import DraftRequest
from gristmill.model.transformer import Transformer
from model import tiny

BLOCK_SIZE = 4
BLOCKS = 24


@functools.cache
def target() -> Transformer:
    """The model that drafts are for. Shared: do not change it."""
    return tiny.model()


@functools.cache
def drafter() -> Transformer:
    """A smaller one of the same vocabulary that mostly disagrees with it."""
    return tiny.model(seed=5, num_hidden_layers=1)


class CountingRunner(TorchRunner):
    """Notes the tokens of each forward."""

    def __init__(self, model: Transformer) -> None:
        super().__init__(model, num_blocks=BLOCKS, block_size=BLOCK_SIZE, kv_dtype=torch.float32)
        for store in self.cache.stores:
            store.fill_(float("nan"))  # what nobody wrote must not be read
        self.forwards: list[int] = []

    def hidden_states(self, ids: Sequence[int], chunks: Sequence[Chunk]) -> Tensor:
        self.forwards.append(len(ids))
        return super().hidden_states(ids, chunks)


def proposer(model: Transformer | None = None, **options: Any) -> tuple[DraftModelProposer, CountingRunner]:
    """A draft model's proposer and its runner."""
    model = model or drafter()
    runner = CountingRunner(model)
    config = {"vocab_size": tiny.CONFIG.vocab_size, "context": model.config.context, "block_size": BLOCK_SIZE}
    return DraftModelProposer(runner, **{**config, **options}), runner


def request(tokens: Sequence[int], table: Sequence[int], limit: int = 4, **changes: Any) -> DraftRequest:
    """A request of slot 0."""
    return DraftRequest(
        **{"slot": 0, "token_ids": tokens, "limit": limit, "block_table": table, "seeded": False, **changes}
    )


@torch.inference_mode()
def continued(model: Transformer, tokens: Sequence[int], count: int) -> list[int]:
    """Greedy continuation, the whole sequence anew for each token."""
    known = list(tokens)
    for _ in range(count):
        known.append(int(model(torch.tensor(known))[-1].argmax()))
    return known[len(tokens) :]

"""The tiny model's hypotheses on a small block pool, watched: the pool is checked after every operation."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from gristmill.engine.memory.block_pool import BlockPool
from gristmill.engine.runner import TorchRunner
from gristmill.engine.search.model import Hypothesis
from gristmill.engine.search.paged import PagedHypotheses, PagedHypothesis
from gristmill.model.transformer import Transformer
from model import tiny

VOCABULARY = tiny.CONFIG.vocab_size


@functools.cache
def tiny_model() -> Transformer:
    """Shared: do not change it."""
    return tiny.model()


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    ids: list[int] = tiny.ids(length, seed, VOCABULARY).tolist()
    return ids


@torch.inference_mode()
def rescored(prompt_ids: Sequence[int], output_ids: Sequence[int]) -> float:
    """Log-probability of an output from one plain forward over everything."""
    logprobs = tiny_model()(torch.tensor([*prompt_ids, *output_ids])).log_softmax(-1)
    at = len(prompt_ids) - 1
    return sum(float(logprobs[at + i, token]) for i, token in enumerate(output_ids))


class CountingRunner(TorchRunner):
    calls = 0

    def hidden_states(self, *arguments: Any) -> torch.Tensor:
        self.calls += 1
        return super().hidden_states(*arguments)


class Watched(PagedHypotheses):
    runner: CountingRunner
    peak = 0

    def start(self, prompt_ids: Sequence[int]) -> PagedHypothesis:
        made = super().start(prompt_ids)
        self._check()
        return made

    def extend(self, choices: Sequence[tuple[Hypothesis, int]]) -> list[Hypothesis]:
        made = super().extend(choices)
        self._check()
        return made

    def free(self, hypotheses: Iterable[Hypothesis]) -> None:
        super().free(hypotheses)
        self._check()

    def _check(self) -> None:
        self.check_integrity()
        self.peak = max(self.peak, self.pool.num_blocks - self.pool.num_free)


def make(*, num_blocks: int = 128, block_size: int = 4, end_ids: Iterable[int] = (), **options: Any) -> Watched:
    runner = CountingRunner(tiny_model(), num_blocks=num_blocks, block_size=block_size, kv_dtype=torch.float32)
    options = {"max_model_len": 128, **options}
    return Watched(runner, BlockPool(num_blocks, block_size), vocab_size=VOCABULARY, end_ids=end_ids, **options)


@contextmanager
def paged(**options: Any) -> Iterator[Watched]:
    """Hypotheses over a fresh pool, which must be whole and all free afterwards."""
    model = make(**options)
    yield model
    assert not model.live
    assert model.pool.num_free == model.pool.num_blocks

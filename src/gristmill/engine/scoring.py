"""Scores and embeddings of whole texts, several in one forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gristmill.core import Score
from gristmill.engine.memory.block_pool import BlockPool
from gristmill.engine.memory.paged_cache import Chunk
from gristmill.engine.runner import Runner
from gristmill.errors import RequestError
from gristmill.model.attention.packed import PackedAttention, segment_positions
from gristmill.model.lora.low_rank import Lora, applied
from gristmill.model.transformer import Transformer

_BATCH_TOKENS = 4096
_HEAD_ROWS = 512
"""Rows of logits in memory at once: with a vocabulary of 50,000 about 100 MB."""


class Forward(Protocol):
    """Runs whole texts."""

    max_tokens: int
    """Most tokens of one call, unless a single text is longer."""

    def hidden(self, segments: Sequence[list[int]]) -> Tensor:
        """Final hidden states (tokens, hidden) of texts that lie one after another."""

    def predicting(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """Final states (completion tokens, hidden) that predict the completions' tokens, of (prompt, completion) pairs
        one after another."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, hidden) -> (rows, vocab), float32."""


class _Joined:
    """A model that reads a prompt and its completion as one text."""

    def hidden(self, segments: Sequence[list[int]]) -> Tensor:
        raise NotImplementedError

    def predicting(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """See `Forward.predicting`."""
        # the last completion token predicts nothing: it is left out of the forward
        segments = [(prompt + completion)[:-1] for prompt, completion in pairs]
        rows: list[int] = []
        offset = 0
        for segment, (_, completion) in zip(segments, pairs, strict=True):
            rows += range(offset + len(segment) - len(completion), offset + len(segment))
            offset += len(segment)
        return self.hidden(segments)[rows]


class PackedForward(_Joined):
    """Without a key-value memory: the very path training takes, so the values are the trainer's bit for bit. lora: an
    adapter that all texts are read with."""

    def __init__(self, model: Transformer, lora: Lora | None = None) -> None:
        self.model, self.lora, self.max_tokens = model, lora, _BATCH_TOKENS

    def hidden(self, segments: Sequence[list[int]]) -> Tensor:
        """See `Forward.hidden`."""
        device = self.model.embed_tokens.weight.device
        ids = torch.tensor([token for segment in segments for token in segment], device=device)
        lengths = [len(segment) for segment in segments]
        with applied(self.model, [] if self.lora is None else [(slice(None), self.lora)]):
            return self.model.hidden_states(ids, segment_positions(lengths, device), PackedAttention(lengths, device))

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Forward.logits`."""
        return self.model.logits(hidden).float()


class PagedForward(_Joined):
    """Through an engine's runner, in blocks that are free at the time. adapter: as the runner's chunks name it."""

    def __init__(self, runner: Runner, pool: BlockPool, adapter: object | None = None) -> None:
        self.runner, self.pool, self.adapter = runner, pool, adapter
        self.max_tokens = min(_BATCH_TOKENS, pool.num_blocks * pool.block_size // 2)

    def hidden(self, segments: Sequence[list[int]]) -> Tensor:
        """See `Forward.hidden`. Raises RequestError when running requests leave too few blocks."""
        needed = sum(self.pool.blocks_for(len(segment)) for segment in segments)
        if needed > self.pool.num_free:
            raise RequestError(
                f"{needed} blocks are needed and {self.pool.num_free} are free; wait for running requests, or raise "
                "kv_cache_tokens",
                field="kv_cache_tokens",
            )
        tables = [self.pool.take(self.pool.blocks_for(len(segment))) for segment in segments]
        try:
            chunks = [
                Chunk(table, 0, len(segment), adapter=self.adapter)
                for table, segment in zip(tables, segments, strict=True)
            ]
            return self.runner.hidden_states([token for segment in segments for token in segment], chunks).clone()
        finally:
            for table in tables:
                self.pool.release(table)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Forward.logits`."""
        return self.runner.logits(hidden)


@torch.inference_mode()
def score_completions(forward: Forward, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
    """Log-probability of each completion after its prompt; both non-empty ids. Sorted by length inside, not outside."""
    scores: list[Score | None] = [None] * len(pairs)
    for members in batches_of([len(prompt) + len(completion) for prompt, completion in pairs], forward.max_tokens):
        states = forward.predicting([pairs[i] for i in members])
        targets = [token for i in members for token in pairs[i][1]]
        logprobs, greedy = _score_rows(forward, states, torch.tensor(targets, device=states.device))
        at = 0
        for i in members:
            end = at + len(pairs[i][1])
            scores[i] = Score(pairs[i][1], logprobs[at:end], all(greedy[at:end]))
            at = end
    return [score for score in scores if score is not None]


def _score_rows(forward: Forward, hidden: Tensor, targets: Tensor) -> tuple[list[float], list[bool]]:
    """Log-probability of each target and whether it is the most probable token; few rows of logits at a time."""
    logprobs: list[float] = []
    greedy: list[bool] = []
    for part, wanted in zip(hidden.split(_HEAD_ROWS), targets.split(_HEAD_ROWS), strict=True):
        logits = forward.logits(part)
        logprobs += (logits.gather(1, wanted[:, None]).squeeze(1) - logits.logsumexp(dim=-1)).tolist()
        greedy += (logits.argmax(dim=-1) == wanted).tolist()
    return logprobs, greedy


@torch.inference_mode()
def mean_embeddings(forward: Forward, hidden_size: int, texts: Sequence[list[int]]) -> np.ndarray:
    """Mean of the final hidden states of each text, unit length; shape (texts, hidden), float32."""
    out = np.empty((len(texts), hidden_size), dtype=np.float32)
    for members in batches_of([len(ids) for ids in texts], forward.max_tokens):
        hidden = forward.hidden([texts[i] for i in members]).float()
        for i, part in zip(members, hidden.split([len(texts[i]) for i in members]), strict=True):
            mean = part.mean(dim=0)
            out[i] = (mean / mean.norm()).cpu().numpy()
    return out


def batches_of(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices grouped into forwards of at most so many tokens, short ones first."""
    batch: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and tokens + lengths[i] > max_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += lengths[i]
    if batch:
        yield batch

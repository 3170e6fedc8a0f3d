"""Hypotheses of the engine's model, whose keys and values lie in the shared block pool.

A child holds all blocks of its parent, by reference count. Its own token goes behind them: into a new block where the
last one is full, else into the last one in place, unless a brother has written there before; only then is that one
block copied. No hypothesis reads beyond its own length, so a parent and its first child share even the block that the
child still fills.

Source: Kwon et al. 2023 (PagedAttention), section 4.4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gristmill.engine.memory.block_pool import BlockPool
from gristmill.engine.memory.paged_cache import Chunk
from gristmill.engine.runner import Runner
from gristmill.engine.search.model import Hypothesis
from gristmill.errors import RequestError


@dataclass
class _Tail:
    """How far the last block of a table is written, as a position; one object for all who hold the block."""

    end: int


@dataclass(eq=False)
class PagedHypothesis:
    """See `Hypothesis`. `table` holds the keys and values of the first `length` tokens, prompt and output."""

    token_ids: tuple[int, ...]
    length: int
    table: list[int]
    tail: _Tail
    logprobs: Tensor = field(default_factory=lambda: torch.empty(0))
    hidden: Tensor | None = None


class PagedHypotheses:
    """A `NextTokenModel` over a runner and a block pool; other users of the pool are welcome beside it.

    vocab_size: of the runner's logits. end_ids: tokens that complete an output. max_model_len: most tokens of a prompt
    and its output. max_num_batched_tokens: most tokens of one forward. keep_hidden: hypotheses give their final
    states, as contrastive search needs.
    """

    def __init__(
        self,
        runner: Runner,
        pool: BlockPool,
        *,
        vocab_size: int,
        end_ids: Iterable[int],
        max_model_len: int,
        max_num_batched_tokens: int = 2048,
        keep_hidden: bool = False,
    ) -> None:
        self.runner, self.pool = runner, pool
        self.vocab_size, self.end_ids = vocab_size, frozenset(end_ids)
        self.max_model_len, self.max_num_batched_tokens = max_model_len, max_num_batched_tokens
        self.keep_hidden = keep_hidden
        self.live: dict[int, PagedHypothesis] = {}
        self.blocks_copied = 0

    def most_blocks(self, prompt_tokens: int, width: int, max_tokens: int) -> int:
        """Blocks that a search of so many paths can need at its peak, when parents and children are alive."""
        return self.pool.blocks_for(prompt_tokens) + 2 * width * (self.pool.blocks_for(max_tokens) + 1)

    def start(self, prompt_ids: Sequence[int]) -> PagedHypothesis:
        """See `NextTokenModel.start`. Raises RequestError for an empty prompt or one that leaves no room."""
        if not 0 < len(prompt_ids) < self.max_model_len:
            raise RequestError(
                f"a prompt of {len(prompt_ids)} tokens: it takes 1 to {self.max_model_len - 1} to search after it",
                field="prompt",
            )
        self._need(self.pool.blocks_for(len(prompt_ids)))
        table = self.pool.take(self.pool.blocks_for(len(prompt_ids)))
        root = PagedHypothesis((), len(prompt_ids), table, _Tail(len(prompt_ids)))
        self.live[id(root)] = root
        try:
            hidden = []
            for start in range(0, len(prompt_ids), self.max_num_batched_tokens):
                part = prompt_ids[start : start + self.max_num_batched_tokens]
                states = self.runner.hidden_states(part, [Chunk(table, start, len(part))])
                hidden.append((states if self.keep_hidden else states[-1:]).clone())
            self._finish([root], [torch.cat(hidden)], hidden[-1][-1:])
        except BaseException:
            self.free([root])
            raise
        return root

    def extend(self, choices: Sequence[tuple[Hypothesis, int]]) -> list[Hypothesis]:
        """See `NextTokenModel.extend`. More rows than one forward takes are computed in several."""
        parents = [self._own(parent) for parent, _ in choices]
        if any(parent.length >= self.max_model_len for parent in parents):
            raise RequestError(f"the search leaves the context of {self.max_model_len} tokens", field="max_tokens")
        children, copies = self._fork(parents, [token for _, token in choices])
        try:
            self.runner.copy_blocks(copies)
            self.blocks_copied += len(copies)
            for begin in range(0, len(children), self.max_num_batched_tokens):
                part = children[begin : begin + self.max_num_batched_tokens]
                ids = [child.token_ids[-1] for child in part]
                states = self.runner.hidden_states(ids, [Chunk(c.table, c.length - 1, 1) for c in part])
                self._finish(part, list(states.clone().split(1)), states)
        except BaseException:
            self.free(children)
            raise
        return list(children)

    def free(self, hypotheses: Iterable[Hypothesis]) -> None:
        """See `NextTokenModel.free`."""
        for hypothesis in hypotheses:
            own = self._own(hypothesis)
            del self.live[id(own)]
            self.pool.release(own.table)

    def check_integrity(self, others: Iterable[Sequence[int]] = ()) -> None:
        """Every block is held by as many living hypotheses and `others` as it counts. Raises AssertionError."""
        for hypothesis in self.live.values():
            assert len(hypothesis.table) == self.pool.blocks_for(hypothesis.length), "a table of the wrong length"
            assert hypothesis.length <= hypothesis.tail.end, "a hypothesis longer than what is written"
        self.pool.check_integrity([*(hypothesis.table for hypothesis in self.live.values()), *others])

    def _fork(
        self, parents: Sequence[PagedHypothesis], tokens: Sequence[int]
    ) -> tuple[list[PagedHypothesis], list[tuple[int, int]]]:
        """Children with tables of their own, and the blocks to copy before they are computed."""
        appended: set[int] = set()  # tails that a child of this call writes behind
        ways: list[str] = []
        for parent in parents:
            if parent.length % self.pool.block_size == 0:
                ways.append("new")
            elif parent.tail.end == parent.length and id(parent.tail) not in appended:
                appended.add(id(parent.tail))
                ways.append("append")
            else:
                ways.append("copy")
        self._need(len(ways) - len(appended))
        children, copies = [], []
        for parent, token, way in zip(parents, tokens, ways, strict=True):
            kept = parent.table[:-1] if way == "copy" else parent.table
            self.pool.share(kept)
            table = kept + ([] if way == "append" else self.pool.take(1))
            if way == "copy":
                copies.append((parent.table[-1], table[-1]))
            tail = parent.tail if way == "append" else _Tail(0)
            tail.end = parent.length + 1
            child = PagedHypothesis((*parent.token_ids, token), parent.length + 1, table, tail)
            self.live[id(child)] = child
            children.append(child)
        return children, copies

    def _finish(self, made: Sequence[PagedHypothesis], hidden: Sequence[Tensor], last: Tensor) -> None:
        """Give new hypotheses their distributions and states; `last` (rows, hidden) are their final states."""
        logprobs = self.runner.logits(last).log_softmax(dim=-1)
        if bool(logprobs.isnan().any()):
            raise RequestError("no token can be chosen: the logits are not numbers", field="prompt")
        for hypothesis, row, states in zip(made, logprobs, hidden, strict=True):
            hypothesis.logprobs, hypothesis.hidden = row, states if self.keep_hidden else None

    def _need(self, blocks: int) -> None:
        if blocks > self.pool.num_free:
            raise RequestError(
                f"the search needs {blocks} more blocks of keys and values, {self.pool.num_free} are free: "
                "lower width or max_tokens, or raise kv_cache_tokens",
                field="width",
            )

    def _own(self, hypothesis: Hypothesis) -> PagedHypothesis:
        own = self.live.get(id(hypothesis))
        if own is None or own is not hypothesis:
            raise ValueError("a hypothesis of another model, or one already freed")
        return own

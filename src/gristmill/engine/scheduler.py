"""Iteration-level scheduler.

There is no prefill phase and no decode phase. Every sequence has tokens it knows and tokens it has computed; a step
gives each running sequence as many of the missing ones as the token budget and the block pool allow. Chunked prefill,
mixed batches and resumption after preemption all follow from that rule.

Source: Yu et al. 2022 (Orca); Kwon et al. 2023 (vLLM).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from gristmill.engine.kv_cache import BlockPool, blocks_for


@dataclass(eq=False)
class Sequence:
    """What the scheduler knows of one completion in the making."""

    token_ids: list[int]
    """Prompt and output."""
    num_computed_tokens: int = 0
    """How many of them have keys and values in the cache."""
    block_table: list[int] = field(default_factory=list)
    """Blocks this sequence owns, in order of position."""

    @property
    def num_missing_tokens(self) -> int:
        """Tokens still to compute before the next one can be sampled."""
        return len(self.token_ids) - self.num_computed_tokens


class Scheduler:
    """First come, first served. The newest running sequence is preempted when the pool runs dry: its blocks go back
    to the pool and it is computed again later."""

    def __init__(self, pool: BlockPool, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. The caller has checked that it fits into an empty pool."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that is finished or aborted; its blocks are free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.pool.give_back(sequence.block_table)

    def schedule(self) -> list[tuple[Sequence, int]]:
        """The sequences of the next step and how many tokens each computes. Their blocks are allocated."""
        step: list[tuple[Sequence, int]] = []
        budget = self.max_num_batched_tokens
        preempted = False
        for sequence in list(self.running):
            if budget == 0:
                break
            if sequence not in self.running:  # preempted for an older one of this loop
                continue
            count = min(sequence.num_missing_tokens, budget)
            while not self._allocate(sequence, count):
                self._preempt(self.running[-1])
                preempted = True
                if sequence not in self.running:
                    break
            else:
                step.append((sequence, count))
                budget -= count
        # whoever was preempted must not take its blocks back in the same step
        while self.waiting and not preempted and budget > 0 and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            count = min(sequence.num_missing_tokens, budget)
            if not self._allocate(sequence, count):
                break
            self.running.append(self.waiting.popleft())
            step.append((sequence, count))
            budget -= count
        return step

    def _allocate(self, sequence: Sequence, count: int) -> bool:
        needed = blocks_for(sequence.num_computed_tokens + count) - len(sequence.block_table)
        if needed > self.pool.num_free:
            return False
        sequence.block_table += self.pool.take(max(0, needed))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.give_back(sequence.block_table)
        sequence.num_computed_tokens = 0
        self.waiting.appendleft(sequence)

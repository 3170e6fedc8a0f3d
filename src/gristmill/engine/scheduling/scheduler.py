"""Iteration-level scheduler.

There is no prefill phase and no decode phase. Every sequence has tokens it knows and tokens it has computed; a step
gives each running sequence as many of the missing ones as the token budget and the block pool allow. Chunked prefill,
mixed batches, prefix caching, verification of drafts and resumption after preemption all follow from that rule.

Source: Yu et al. 2022 (Orca); Kwon et al. 2023 (vLLM).
"""

from __future__ import annotations

from typing import NamedTuple

from gristmill.engine.memory.block_pool import BlockPool
from gristmill.engine.memory.sources import SourcePool
from gristmill.engine.scheduling.policies import FirstCome, Policy
from gristmill.engine.scheduling.sequence import Sequence


class Scheduled(NamedTuple):
    """A sequence of the next step, and how many tokens after its computed ones the step computes."""

    sequence: Sequence
    tokens: int


class Scheduler:
    """Decides what each step computes, and owns the block tables.

    policy: who goes first, and whether running or new sequences get the token budget first. When the pool runs dry, the
    running sequence that the policy puts last is preempted: its blocks go back to the pool and it is computed again
    later, as far as the prefix cache has not kept it.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        policy: Policy | None = None,
        prefix_caching: bool = True,
        sources: SourcePool | None = None,
    ) -> None:
        self.pool, self.sources = pool, sources
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.policy: Policy = policy or FirstCome()
        self.prefix_caching = prefix_caching
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.copies: list[tuple[int, int]] = []
        """Blocks to copy, (from, to), before the step that was scheduled last is computed."""
        self.num_preempted = 0
        self.source_tokens = 0
        """Tokens that the encoder reads in the step that was scheduled last."""
        self._budget = self._prompt_budget = 0
        self._kept_free = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. The caller has checked that it fits into an empty pool."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that is finished or aborted; its blocks are free, or cached, at once."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

    def schedule(self, now: float = 0.0, prompt_limit: int | None = None) -> list[Scheduled]:
        """The sequences of the next step and how many tokens each computes. Their blocks are allocated.

        A sequence whose known tokens are all in the step also has blocks for `num_lookahead` further ones, which is
        lowered where budget or blocks do not allow them. prompt_limit: most tokens of sequences that are behind by more
        than one token.
        """
        self.copies, self.source_tokens = [], 0
        self._budget = self.max_num_batched_tokens
        self._prompt_budget = self._budget if prompt_limit is None else prompt_limit
        step: list[Scheduled] = []
        if self.policy.running_first:
            if not self._advance(step, self.running, now):
                self._admit(step, now)
            return step
        # what runs keeps the blocks of its next tokens: a newcomer that took them would have it preempted
        self._kept_free = sum(self._needed(sequence, self._share(sequence)) for sequence in self.running)
        self._admit(step, now)
        self._kept_free = 0
        behind = [sequence for sequence in self.running if sequence.num_missing_tokens > 1]
        admitted = {id(entry.sequence) for entry in step}
        order = behind + [sequence for sequence in self.running if sequence.num_missing_tokens <= 1]
        self._advance(step, [sequence for sequence in order if id(sequence) not in admitted], now)
        return step

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Let a waiting sequence of the same tokens share what `parent` has computed. False when no seat is free."""
        if len(self.running) >= self.max_num_seqs:
            return False
        self.waiting.remove(child)
        child.block_table = parent.block_table[: self.pool.blocks_for(parent.num_computed_tokens)]
        self.pool.share(child.block_table)
        child.num_computed_tokens = parent.num_computed_tokens
        child.num_cached_tokens = parent.num_computed_tokens
        child.block_hashes = list(parent.block_hashes)
        if self.sources is not None and parent.source is not None:
            child.source = self.sources.share(parent.source)
        self.running.append(child)
        return True

    def has_room(self, blocks: int) -> bool:
        """Whether another sequence with so many blocks can run now."""
        return len(self.running) < self.max_num_seqs and blocks <= self.pool.num_free

    def adopt(self, sequence: Sequence, blocks: int) -> None:
        """Let a waiting sequence run in so many new blocks, which the caller fills with what was computed elsewhere."""
        self.waiting.remove(sequence)
        sequence.block_table = self.pool.take(blocks)
        self.running.append(sequence)

    def computed(self, sequence: Sequence, num_computed_tokens: int) -> None:
        """Record how far a sequence is computed; blocks that became full can be found by others from now on."""
        sequence.num_computed_tokens = num_computed_tokens
        if self.sources is not None and sequence.source is not None:
            self.sources.was_read(sequence.source)
        if sequence.cache_root is None or not self.prefix_caching:
            return
        size, hashes = self.pool.block_size, sequence.block_hashes
        while (len(hashes) + 1) * size <= num_computed_tokens:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else sequence.cache_root
            block = sequence.block_table[len(hashes)]
            hashes.append(self.pool.register(block, parent, sequence.token_ids[start : start + size]))

    def _advance(self, step: list[Scheduled], running: list[Sequence], now: float) -> bool:
        """Give running sequences their tokens; True when one of them was preempted."""
        order = sorted(running, key=lambda sequence: self.policy.running_key(sequence, now))
        preempted = False
        position = 0
        while position < len(order) and self._budget > 0:
            sequence = order[position]
            position += 1
            count = self._share(sequence)
            if count == 0:
                continue
            while not self._allocate(sequence, count):
                victim = order.pop()  # it stands behind all that are scheduled, or is this one
                self._preempt(victim)
                preempted = True
                if victim is sequence:
                    break
            else:
                self._take(step, sequence, count)
        return preempted

    def _admit(self, step: list[Scheduled], now: float) -> None:
        """Let waiting sequences run while seats, budget and blocks last."""
        if len(self.waiting) > 1:
            self.waiting.sort(key=lambda sequence: self.policy.key(sequence, now))
        admitted: list[Sequence] = []
        for sequence in self.waiting:
            if self._budget <= 0 or len(self.running) >= self.max_num_seqs:
                break
            if sequence.leader is not None and sequence.leader.num_output_tokens == 0:
                continue  # it will share the prompt that its leader computes
            self._find_prefix(sequence)
            count = self._share(sequence)
            if count == 0 or not self._hold_source(sequence) or not self._allocate(sequence, count):
                self._reset(sequence)
                break
            if sequence.source is not None and not sequence.source.is_read:
                self.source_tokens += len(sequence.source.ids)
            if not sequence.was_preempted:
                sequence.num_cached_tokens = sequence.num_computed_tokens
            admitted.append(sequence)
            self.running.append(sequence)
            self._take(step, sequence, count)
        if admitted:
            gone = {id(sequence) for sequence in admitted}
            self.waiting = [sequence for sequence in self.waiting if id(sequence) not in gone]

    def _share(self, sequence: Sequence) -> int:
        """How many known tokens of a sequence this step can compute; lowers its lookahead to what fits."""
        missing = sequence.num_missing_tokens
        count = min(missing, self._budget)
        if missing > 1:
            count = min(count, self._prompt_budget)
        if count < missing:
            sequence.num_lookahead = 0
        else:
            sequence.num_lookahead = min(sequence.num_lookahead, self._budget - count)
        return count

    def _take(self, step: list[Scheduled], sequence: Sequence, count: int) -> None:
        self._budget -= count + sequence.num_lookahead
        if sequence.num_missing_tokens > 1:
            self._prompt_budget -= count
        self.policy.serve(sequence, count)
        step.append(Scheduled(sequence, count))

    def _find_prefix(self, sequence: Sequence) -> None:
        if sequence.cache_root is None or not self.prefix_caching:
            return
        # at least one token is computed, for its state is what the next token is chosen from
        most = len(sequence.token_ids) - 1
        blocks, hashes = self.pool.match(sequence.token_ids, sequence.cache_root, most)
        self.pool.share(blocks)
        sequence.block_table, sequence.block_hashes = blocks, hashes
        sequence.num_computed_tokens = len(blocks) * self.pool.block_size

    def _hold_source(self, sequence: Sequence) -> bool:
        """Blocks for the source of a sequence. False when there are too few, or when the encoder has enough to read in
        this step: as many tokens as its prompts may have, or one source however long, for it cannot be cut."""
        if self.sources is None or sequence.source is None:
            return True
        if not self.sources.hold(sequence.source):
            return False
        total = self.source_tokens + len(sequence.source.ids)
        limit = min(self.max_num_batched_tokens, self._prompt_budget)
        return sequence.source.is_read or self.source_tokens == 0 or total <= limit

    def _allocate(self, sequence: Sequence, count: int) -> bool:
        """Blocks for `count` tokens and the lookahead, all writable by this sequence alone. False when there are too
        few, and nothing is changed then but the lookahead, which is given up first."""
        free = self.pool.num_free - self._kept_free
        needed = self._needed(sequence, count + sequence.num_lookahead)
        if needed > free and sequence.num_lookahead:
            sequence.num_lookahead = 0
            needed = self._needed(sequence, count)
        if needed > free:
            return False
        if self._writes_shared(sequence):  # the others go on reading the old block
            table, first = sequence.block_table, sequence.num_computed_tokens // self.pool.block_size
            (own,) = self.pool.take(1)
            self.copies.append((table[first], own))
            self.pool.release([table[first]])
            table[first] = own
            needed -= 1
        sequence.block_table += self.pool.take(needed)
        return True

    def _needed(self, sequence: Sequence, tokens: int) -> int:
        """Blocks to take before so many further tokens can be computed."""
        held = len(sequence.block_table)
        more = max(0, self.pool.blocks_for(sequence.num_computed_tokens + tokens) - held)
        return more + self._writes_shared(sequence)

    def _writes_shared(self, sequence: Sequence) -> bool:
        """Whether the next token goes into a block that others read."""
        table, first = sequence.block_table, sequence.num_computed_tokens // self.pool.block_size
        return first < len(table) and self.pool.is_shared(table[first])

    def requeue(self, sequence: Sequence) -> None:
        """Let a running sequence wait and be computed again, as after a preemption."""
        self._preempt(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preempted += 1
        self.running.remove(sequence)
        sequence.was_preempted = True
        self._reset(sequence)
        self.waiting.insert(0, sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        if self.sources is not None and sequence.source is not None:
            self.sources.release(sequence.source)

    def _reset(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.block_hashes = []
        sequence.num_computed_tokens = sequence.num_lookahead = 0

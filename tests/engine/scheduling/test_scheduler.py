"""Whatever runs gets on: no order of preemptions goes round in a circle."""

from __future__ import annotations

import random

import pytest

from gristmill.engine.memory.block_pool import BlockPool
from gristmill.engine.scheduling.policies import POLICY_NAMES, policy_named
from gristmill.engine.scheduling.scheduler import Scheduler
from gristmill.engine.scheduling.sequence import Sequence


@pytest.mark.parametrize("prefill_first", [False, True])
@pytest.mark.parametrize("name", POLICY_NAMES)
def test_all_finish_in_a_pool_that_holds_few(name: str, prefill_first: bool) -> None:
    for seed in range(40):
        chance = random.Random(seed)
        pool = BlockPool(chance.randint(4, 24), chance.choice([1, 4]))
        scheduler = Scheduler(
            pool,
            max_num_seqs=chance.choice([2, 8]),
            max_num_batched_tokens=chance.choice([1, 2, 3, 8]),
            policy=policy_named(name, prefill_first=prefill_first),
            prefix_caching=False,
        )
        left: dict[Sequence, int] = {}
        total = pool.num_blocks * pool.block_size
        for number in range(5):
            length = chance.randint(1, total - 1)
            sequence = Sequence(
                token_ids=[0] * length,
                num_prompt_tokens=length,
                arrival=number,
                user=chance.choice("ab"),
                priority=chance.randint(0, 1),
                deadline=chance.choice([None, 1.0, 2.0]),
            )
            left[sequence] = chance.randint(1, total - length)
            scheduler.add(sequence)
        limit = 100 * total
        while left and limit:
            limit -= 1
            running = sorted(scheduler.running, key=lambda sequence: scheduler.policy.running_key(sequence, 0.0))
            step = scheduler.schedule()
            assert not running or running[0] in scheduler.running, f"seed {seed}: the first one was preempted"
            for sequence, count in step:
                scheduler.computed(sequence, sequence.num_computed_tokens + count)
                if sequence.num_missing_tokens == 0:
                    sequence.token_ids.append(0)
                    left[sequence] -= 1
                    if not left[sequence]:
                        scheduler.remove(sequence)
                        del left[sequence]
        assert not left, f"seed {seed}: {len(left)} sequences preempt each other without end"
        assert pool.num_free == pool.num_blocks

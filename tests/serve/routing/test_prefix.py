"""Requests go where the beginning of their prompt is known, until the queue there is too long."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gristmill.engine.scheduling.balance import LeastOutstanding, Load, PrefixAware
from gristmill.serve.routing.prefix import BLOCK, WarmWorker, block_hashes

ids = st.builds(
    lambda blocks, rest: [*(token for token in blocks for _ in range(BLOCK)), *rest],
    st.lists(st.integers(0, 2), max_size=6),
    st.lists(st.integers(0, 2), max_size=BLOCK - 1),
)


def shared_blocks(a: list[int], b: list[int]) -> int:
    count = 0
    while count < min(len(a), len(b)) // BLOCK and a[: (count + 1) * BLOCK] == b[: (count + 1) * BLOCK]:
        count += 1
    return count


@given(ids, ids, st.integers(0, 6))
def test_cached_is_the_longest_common_beginning_in_blocks(a: list[int], b: list[int], common: int) -> None:
    b = a[: common * BLOCK] + b
    worker = WarmWorker()
    worker.remember(block_hashes(a))
    assert worker.cached(block_hashes(b)) == shared_blocks(a, b)


def test_tenants_and_adapters_share_nothing() -> None:
    worker, prompt = WarmWorker(), [1] * 64
    worker.remember(block_hashes(prompt, "one"))
    assert worker.cached(block_hashes(prompt, "one")) == 4
    assert worker.cached(block_hashes(prompt, "two")) == 0


@given(st.lists(ids, max_size=8), st.integers(1, 8))
def test_memory_is_bounded_and_keeps_the_last_prompts_beginning(prompts: list[list[int]], capacity: int) -> None:
    worker = WarmWorker(capacity=capacity)
    for prompt in prompts:
        worker.remember(block_hashes(prompt))
    assert len(worker.known) <= capacity
    if prompts:
        last = block_hashes(prompts[-1])
        assert worker.cached(last) == min(len(last), capacity)


def test_a_known_beginning_attracts_until_the_queue_is_longer_than_it_saves() -> None:
    prompt = block_hashes(list(range(160)))  # 10 blocks
    workers = [WarmWorker(), WarmWorker()]
    workers[1].remember(prompt)
    load = Load(12.0, prompt=prompt)
    for queue, chosen in [(0.0, 1), (9.0, 1), (11.0, 0)]:
        workers[1].outstanding = queue
        assert PrefixAware().choose(load, workers) == chosen
    workers[1].known.clear()
    workers[0].outstanding, workers[1].outstanding = 3.0, 2.0
    assert PrefixAware().choose(load, workers) == LeastOutstanding().choose(load, workers) == 1

"""The pool: blocks are counted, shared, found again and evicted, and none is ever lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gristmill.engine.memory.block_pool import ROOT, BlockPool, salt


def fill(pool: BlockPool, tokens: list[int], root: bytes = ROOT) -> list[int]:
    """Take and register the full blocks of a text; returns the table."""
    size, table, parent = pool.block_size, pool.take(pool.blocks_for(len(tokens))), root
    for number in range(len(tokens) // size):
        parent = pool.register(table[number], parent, tokens[number * size : (number + 1) * size])
    return table


def test_blocks_are_counted_and_waste_stays_below_one() -> None:
    pool = BlockPool(4, 16)
    assert [pool.blocks_for(tokens) for tokens in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]
    assert all(pool.blocks_for(tokens) * 16 - tokens < 16 for tokens in range(200))
    small = BlockPool(4, 4)
    assert small.blocks_for(7) + small.blocks_for(10) == 5  # 20 slots for 17 tokens: 3 wasted


def test_what_was_computed_is_found_again() -> None:
    pool = BlockPool(8, 2)
    table = fill(pool, [0, 1, 2, 3])
    blocks = list(table)
    pool.release(table)
    assert (pool.num_free, pool.num_cached) == (8, 2)
    assert pool.match([0, 1, 2, 9, 10], ROOT, 4)[0] == blocks[:1]  # two tokens of three in common: one block
    assert pool.match([0, 1, 2, 3], ROOT, 3)[0] == blocks[:1]  # the last token is always computed
    assert pool.match([0, 1, 2, 3, 4], ROOT, 4)[0] == blocks
    assert pool.match([2, 3, 0, 1], ROOT, 4)[0] == []  # same blocks in another place are another text


def test_block_size_one_matches_token_by_token() -> None:
    pool = BlockPool(8, 1)
    fill(pool, [0, 1, 2, 3])
    assert len(pool.match([0, 1, 2, 9, 10], ROOT, 4)[0]) == 3


def test_another_salt_finds_nothing() -> None:
    pool = BlockPool(8, 2)
    fill(pool, [0, 1, 2, 3], salt("adapter-a"))
    assert pool.match([0, 1, 2, 3, 4], salt("adapter-b"), 4)[0] == []
    assert pool.match([0, 1, 2, 3, 4], ROOT, 4)[0] == []
    assert len(pool.match([0, 1, 2, 3, 4], salt("adapter-a"), 4)[0]) == 2


def test_the_least_recently_used_goes_first_and_used_ones_never() -> None:
    pool = BlockPool(2, 1)
    a, b = fill(pool, [10]), fill(pool, [20])
    pool.release(a)
    pool.release(b)
    (found,), _ = pool.match([10, 0], ROOT, 1)  # get A
    pool.share([found])
    held = [found]
    c = fill(pool, [30])  # put C: B is evicted, A is in use
    assert pool.match([20, 0], ROOT, 1)[0] == []
    assert pool.match([10, 0], ROOT, 1)[0] == [found]
    assert pool.num_free == 0
    pool.release(held)
    pool.release(c)
    pool.check_integrity([])


def test_the_end_of_a_text_is_evicted_before_its_beginning() -> None:
    pool = BlockPool(4, 1)
    pool.release(fill(pool, [1, 2, 3, 4]))
    taken = pool.take(2)
    assert len(pool.match([1, 2, 3, 4, 5], ROOT, 4)[0]) == 2
    pool.release(taken)


def test_two_texts_of_one_hash_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gristmill.engine.memory.block_pool._hash", lambda parent, content: b"same")
    pool = BlockPool(4, 2)
    first = fill(pool, [1, 2])
    second = fill(pool, [3, 4])
    assert pool.match([3, 4, 5], ROOT, 2)[0] == []
    assert pool.match([1, 2, 5], ROOT, 2)[0] == first
    pool.check_integrity([first, second])


def test_integrity_notices_a_leak_and_a_double_owner() -> None:
    pool = BlockPool(4, 16)
    table = pool.take(2)
    for wrong in ([], [table, table], [table, [3]], [table[:1]], [[*table, table[0]]]):
        with pytest.raises(AssertionError):
            pool.check_integrity(wrong)
    pool.check_integrity([table])


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), max_size=8),
    st.lists(st.integers(0, 1), min_size=1, max_size=9),
    st.sampled_from([1, 2, 3]),
)
def test_the_longest_common_beginning_is_found(texts: list[list[int]], new: list[int], size: int) -> None:
    pool = BlockPool(80, size)
    for text in texts:
        pool.release(fill(pool, text))
    longest = max((common(new[:-1], text) // size for text in texts), default=0)
    assert len(pool.match(new, ROOT, len(new) - 1)[0]) == longest


class PoolMachine(RuleBasedStateMachine):
    """Texts over two letters come, share what they have in common and go, in a pool of twelve blocks of two."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, 2)
        self.texts: list[tuple[list[int], list[int]]] = []
        self.seen: list[list[int]] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def begin(self, tokens: list[int]) -> None:
        blocks, hashes = self.pool.match(tokens, ROOT, len(tokens) - 1)
        known = max((common(tokens, text) for text in self.seen), default=0)
        assert len(blocks) * 2 <= min(known, len(tokens) - 1)  # never more than somebody computed
        self.pool.share(blocks)
        needed = self.pool.blocks_for(len(tokens)) - len(blocks)
        if needed > self.pool.num_free:
            self.pool.release(blocks)
            return
        table = blocks + self.pool.take(needed)
        parent = hashes[-1] if hashes else ROOT
        for number in range(len(blocks) if hashes else 0, len(tokens) // 2):
            parent = self.pool.register(table[number], parent, tokens[2 * number : 2 * number + 2])
        self.texts.append((tokens, table))
        self.seen.append(tokens)

    @precondition(lambda self: self.texts)
    @rule(which=st.integers(0, 99))
    def end(self, which: int) -> None:
        _, table = self.texts.pop(which % len(self.texts))
        self.pool.release(table)
        assert table == []

    @rule()
    def forget(self) -> None:
        if not self.texts:
            self.pool.forget_cached()
            self.seen.clear()
            assert self.pool.num_cached == 0

    @invariant()
    def whole(self) -> None:
        self.pool.check_integrity([table for _, table in self.texts])
        used = {block for _, table in self.texts for block in table}
        assert self.pool.num_free + len(used) == 12


def common(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)

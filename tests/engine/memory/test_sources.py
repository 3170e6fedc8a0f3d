"""Blocks of what an encoder has read: shared, found again, and never in part."""

from __future__ import annotations

from gristmill.engine.memory.sources import Source, SourcePool


def read(pool: SourcePool, length: int, first: int = 0) -> Source:
    source = Source(list(range(first, first + length)), b"root %d %d" % (first, length))
    assert pool.hold(source)
    pool.was_read(source)
    return source


def test_a_source_is_found_again_until_a_part_of_it_is_gone() -> None:
    pool = SourcePool(4, 4)
    first = read(pool, 11)
    pool.release(first)
    assert not first.is_read
    again = Source(first.ids, first.root)
    assert pool.hold(again)
    assert again.is_read
    pool.release(again)
    pool.release(read(pool, 5, first=50))  # one block that was free, and one of the three
    assert pool.hold(again)
    assert not again.is_read
    pool.pool.check_integrity([again.block_table])


def test_only_all_the_tokens_make_a_source_the_same() -> None:
    pool = SourcePool(8, 4)
    held = [read(pool, 8), read(pool, 7), read(pool, 8, first=1)]
    assert len({block for source in held for block in source.block_table}) == 6
    shared = pool.share(held[0])
    assert shared.block_table == held[0].block_table
    pool.pool.check_integrity([source.block_table for source in (*held, shared)])


def test_a_source_for_which_there_is_no_room_holds_nothing() -> None:
    pool = SourcePool(2, 4)
    held = read(pool, 5)
    late = Source([1], b"late")
    assert not pool.hold(late)
    assert late.block_table == []
    pool.release(held)
    assert pool.hold(late)

"""The keys and values of a text's beginning, taken from one engine's prefix cache and put into another's: an engine
that starts need not compute again what the others know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gristmill.engine.engine import Engine
from gristmill.engine.handover import Blocks
from gristmill.engine.memory.block_pool import salt
from gristmill.errors import RequestError


@dataclass(frozen=True, eq=False)
class Prefix:
    """The whole blocks of a text's beginning that an engine knows."""

    token_ids: list[int]
    cache_salt: str | None
    blocks: Blocks


def export_prefix(engine: Engine, token_ids: Sequence[int], cache_salt: str | None = None) -> Prefix:
    """What `engine` has cached of the beginning of `token_ids`; no blocks where it knows nothing of it."""
    ids, pool = list(token_ids), engine.pool
    found, _ = pool.match(ids, _root(engine, cache_salt), len(ids))
    known = len(found) * pool.block_size
    return Prefix(ids[:known], cache_salt, Blocks.of(engine.runner, pool, found, known))


def import_prefix(engine: Engine, prefix: Prefix) -> int:
    """Put a prefix into the cache of an engine of the same model, as far as free blocks reach; what was used longest
    ago makes room. Returns the tokens that are cached now.

    Raises RequestError for blocks of another size or model, or an engine without prefix caching.
    """
    pool, parent = engine.pool, _root(engine, prefix.cache_salt)
    prefix.blocks.check(engine.runner, pool)
    held, hashes = pool.match(prefix.token_ids, parent, len(prefix.token_ids))
    pool.share(held)
    known, size = len(held), pool.block_size
    new = pool.take(min(prefix.blocks.num_blocks - known, pool.num_free))
    slots = slice(known * size, (known + len(new)) * size)
    engine.runner.write_blocks(new, [x[:, slots] for x in prefix.blocks.data])
    parent = hashes[-1] if hashes else parent
    for number, block in enumerate(new, known):
        parent = pool.register(block, parent, prefix.token_ids[number * size : (number + 1) * size])
    held += new
    known = len(held) * size
    pool.release(held)
    return known


def _root(engine: Engine, cache_salt: str | None) -> bytes:
    if not engine.scheduler.prefix_caching or engine.pair is not None:
        raise RequestError("only an engine with prefix caching, of a decoder, has prefixes", field="prefix_caching")
    return salt(*filter(None, [cache_salt]))

"""Paged memory: where tokens live, and attention through any placement of the blocks."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import helpers
from gristmill.engine.memory.paged_cache import Chunk, PagedKVCache
from gristmill.model.attention.kernel import reference_attention
from model import tiny

CPU = torch.device("cpu")


def make_cache(num_blocks: int, block_size: int = 16, dtype: torch.dtype = torch.float32) -> PagedKVCache:
    cache = PagedKVCache(tiny.CONFIG, num_blocks, block_size, dtype, CPU)
    for store in cache.stores:  # what nobody wrote must never be read
        store.fill_(float("nan") if store.dtype.is_floating_point else 99)
    return cache


def test_a_token_lives_where_its_table_says() -> None:
    cache = make_cache(6, block_size=4)
    cache.plan([Chunk([3, 0, 5], 0, 10)])
    key = torch.arange(10.0)[:, None, None].expand(10, 2, 16)
    cache.attend(0, torch.zeros(10, 4, 16), key, key)
    assert float(cache.keys[0, 5 * 4 + 1, 0, 0]) == 9
    assert float(cache.keys[0, 0 * 4 + 2, 0, 0]) == 6
    assert int(cache.keys[0, :, 0, 0].isfinite().sum()) == 10


def test_memory_is_what_the_configuration_says() -> None:
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        cache = make_cache(7, dtype=dtype)
        assert cache.keys.nbytes + cache.values.nbytes == 7 * 16 * tiny.CONFIG.kv_bytes_per_token(size)
        assert cache.bytes_per_token == tiny.CONFIG.kv_bytes_per_token(size)
    eight = make_cache(7, dtype=torch.int8)
    assert eight.keys.nbytes * 4 == make_cache(7).keys.nbytes
    assert eight.bytes_per_token == tiny.CONFIG.kv_bytes_per_token(1) + 2 * 4 * 2 * tiny.CONFIG.num_hidden_layers


@given(
    st.sampled_from([1, 3, 4, 16]),
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.randoms(),
    st.sampled_from([(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.int8, 0.03)]),
)
@settings(max_examples=40, deadline=None)
def test_attention_does_not_depend_on_blocks_chunks_or_placement(
    block_size: int, lengths: list[int], choose: random.Random, kept: tuple[torch.dtype, float]
) -> None:
    """Sequences fed in random chunks, through shuffled blocks of any size, equal plain attention."""
    dtype, tolerance = kept
    sizes = [-(-length // block_size) for length in lengths]
    blocks = list(range(sum(sizes) + 3))
    choose.shuffle(blocks)
    cache = make_cache(len(blocks), block_size, dtype)
    tables = [[blocks.pop() for _ in range(size)] for size in sizes]
    generator = torch.Generator().manual_seed(0)
    inputs = [[torch.randn(length, n, 16, generator=generator) for n in (4, 2, 2)] for length in lengths]
    found: list[list[torch.Tensor]] = [[] for _ in lengths]
    done = [0] * len(lengths)
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        step = [(i, choose.randint(1, lengths[i] - done[i])) for i in range(len(lengths)) if done[i] < lengths[i]]
        cache.plan([Chunk(tables[i], done[i], count) for i, count in step])
        flat = [torch.cat([inputs[i][part][done[i] : done[i] + n] for i, n in step]) for part in range(3)]
        for (i, count), out in zip(step, cache.attend(1, *flat).split([n for _, n in step]), strict=True):
            found[i].append(out)
            done[i] += count
    for parts, (query, key, value) in zip(found, inputs, strict=True):
        mask = torch.ones(len(query), len(query), dtype=torch.bool).tril()
        assert torch.allclose(torch.cat(parts), reference_attention(query, key, value, mask), atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_what_is_kept_in_fewer_bits_does_not_depend_on_the_chunks(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(30, n, 16, generator=torch.Generator().manual_seed(n)) for n in (4, 2, 2))
    outs = []
    for size in (1, 7, 30):
        cache = make_cache(2, dtype=dtype)
        parts = []
        for start in range(0, 30, size):
            part = slice(start, min(start + size, 30))
            cache.plan([Chunk([1, 0], start, part.stop - start)])
            parts.append(cache.attend(0, query[part], key[part], value[part]))
        outs.append(torch.cat(parts))
    assert torch.allclose(outs[0], outs[1], atol=1e-5)
    assert torch.allclose(outs[0], outs[2], atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 4, 30])
@torch.inference_mode()
def test_cached_logits_equal_one_forward(chunk: int) -> None:
    model, tokens = helpers.model(), tiny.ids(30)
    cache = make_cache(2)
    rows = []
    for start in range(0, 30, chunk):
        part = tokens[start : start + chunk]
        cache.plan([Chunk([1, 0], start, len(part))])
        positions = torch.arange(start, start + len(part))
        rows.append(model.lm_head(model.hidden_states(part, positions, cache)))
    assert torch.allclose(torch.cat(rows), model(tokens), atol=1e-4, rtol=1e-5)
    assert int(cache.keys[0, :, 0, 0].isfinite().sum()) == 30


@torch.inference_mode()
def test_a_prefill_and_two_decodes_share_one_forward() -> None:
    model, cache = helpers.model(), make_cache(9)
    sequences = [tiny.ids(20, 1), tiny.ids(33, 2), tiny.ids(12, 3)]
    tables = [[8, 1], [0, 5, 2], [4]]
    for table, tokens in list(zip(tables, sequences, strict=True))[:2]:
        cache.plan([Chunk(table, 0, len(tokens) - 1)])
        model.hidden_states(tokens[:-1], torch.arange(len(tokens) - 1), cache)
    cache.plan([Chunk(tables[0], 19, 1), Chunk(tables[2], 0, 12), Chunk(tables[1], 32, 1)])
    flat = torch.cat((sequences[0][-1:], sequences[2], sequences[1][-1:]))
    positions = torch.cat((torch.tensor([19]), torch.arange(12), torch.tensor([32])))
    logits = model.lm_head(model.hidden_states(flat, positions, cache))
    expected = torch.cat((model(sequences[0])[-1:], model(sequences[2]), model(sequences[1])[-1:]))
    assert torch.allclose(logits, expected, atol=1e-4, rtol=1e-5)

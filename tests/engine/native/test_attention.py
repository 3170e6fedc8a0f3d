"""The attention kernel alone, against the model's own attention, for every kind of cache and both builds."""

from __future__ import annotations

import ctypes
import functools
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill.core import AttentionRule
from gristmill.engine.native.build import NATIVE, PORTABLE, SOURCES, compile_library, native_refusal
from gristmill.model.attention.kernel import rule_attention
from gristmill.model.int8 import dequantise, quantise

pytestmark = [
    pytest.mark.peer,  # needs a C++ compiler
    pytest.mark.skipif(native_refusal() is not None, reason=str(native_refusal())),
]

ENTRY = """
#include "attention.h"
using namespace gristmill;
extern "C" void attend_chunks(long heads, long kv_heads, long dim, int kind, long window, int threads, long chunks,
                              const long* starts, const long* lengths, const int* slots, char* keys, char* values,
                              float* key_scales, float* value_scales, const float* query, float* out) {
    Heads sizes{heads, kv_heads, dim, 1.0f / std::sqrt((float)dim)};
    Cache cache{kind, keys, values, key_scales, value_scales};
    std::vector<Span> spans;
    for (long i = 0, row = 0; i < chunks; row += lengths[i++]) {
        spans.push_back({row, starts[i], lengths[i], slots, -1});
        slots += starts[i] + lengths[i];
    }
    std::vector<Item> items;
    std::vector<float> parts(plan_items(sizes, spans, threads, items) + 1);
    Scratch scratch(sizes, (uint32_t*)aligned_alloc(64, round_up(Scratch::words(sizes) * 4, 64)));
    const long ld = heads * dim;
    for (const Item& item : items)
        attend(sizes, cache, spans[item.span], window, scratch, item, query, ld, out, ld, parts.data());
    for (const Span& span : spans)
        for (long t = 0; span.parts >= 0 && t < span.length; t++)
            merge_parts(sizes, span, window, t, parts.data(), out + (span.row + t) * ld);
    free(scratch.query);
}
"""
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
BOUNDS = (1e-5, 3e-2, 3e-2)
"""Largest error for values up to about 4; queries and weights are rounded to bfloat16 for the last two."""


@functools.cache
def library(flags: tuple[str, ...]) -> ctypes.CDLL:
    """The kernel with an entry of its own, compiled once for the machine."""
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder)
        for header in SOURCES.glob("*.h"):
            shutil.copy(header, sources)
        (sources / "entry.cpp").write_text(ENTRY)
        return ctypes.CDLL(str(compile_library(flags, sources=sources)))


def native(
    query: Tensor,
    stores: list[Tensor],
    slots: Tensor,
    chunks: list[tuple[int, int]],
    window: int,
    flags: tuple[str, ...],
    threads: int = 2,
) -> Tensor:
    """query (tokens, heads, dim) of all chunks; stores (slots, kv_heads, dim or 1)."""
    out = torch.full_like(query, float("nan"))
    starts, lengths = (torch.tensor(column) for column in zip(*chunks, strict=True))
    pointers = [store.data_ptr() for store in stores] + [0] * (4 - len(stores))
    ints = [ctypes.c_long(n) for n in (query.shape[1], stores[0].shape[1], query.shape[2])]
    library(flags).attend_chunks(
        *ints, DTYPES.index(stores[0].dtype), ctypes.c_long(window), threads, ctypes.c_long(len(chunks)),
        *(ctypes.c_void_p(x) for x in (starts.data_ptr(), lengths.data_ptr(), slots.data_ptr(), *pointers)),
        *(ctypes.c_void_p(x.data_ptr()) for x in (query, out)),
    )  # fmt: skip
    return out


def case(
    seed: int, chunks: list[tuple[int, int]], heads: int, group: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Random queries, a cache whose slots no sequence shares, and where positions lie in it."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(start + length for start, length in chunks)
    slots = torch.randperm(total + 5, generator=generator)[:total].int()
    stores = [torch.randn(total + 5, heads // group, dim, generator=generator) for _ in range(2)]
    if dtype == torch.int8:
        (keys, key_scales), (values, value_scales) = (quantise(store) for store in stores)
        stores = [keys, values, key_scales, value_scales]
    else:
        stores = [store.to(dtype) for store in stores]
    return torch.randn(sum(n for _, n in chunks), heads, dim, generator=generator), stores, slots


def reference(query: Tensor, stores: list[Tensor], slots: Tensor, chunks: list[tuple[int, int]], window: int) -> Tensor:
    """The same in float64, chunk by chunk."""
    scales = stores[2:] or [torch.ones(1), torch.ones(1)]
    keys, values = (dequantise(x, scale).double() for x, scale in zip(stores, scales, strict=False))
    rule, out, row, at = AttentionRule(window=window or None), [], 0, 0
    for start, length in chunks:
        own = slots[at : at + start + length].long()
        rows = query[None, row : row + length].double(), keys[None, own], values[None, own]
        out.append(rule_attention(*rows, rule, query_start=start)[0])
        row, at = row + length, at + start + length
    return torch.cat(out).float()


CHUNKS = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 50)), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1000), CHUNKS, st.sampled_from([(9, 3), (4, 1), (8, 8), (10, 5)]),
    st.sampled_from([16, 20, 64, 128]), st.sampled_from([0, 0, 1, 70, 200]), st.sampled_from([0, 1, 2]),
)  # fmt: skip
def test_equals_the_reference_within_the_rounding_of_the_cache(
    seed: int, chunks: list[tuple[int, int]], shape: tuple[int, int], dim: int, window: int, kind: int
) -> None:
    query, stores, slots = case(seed, chunks, *shape, dim, DTYPES[kind])
    expected = reference(query, stores, slots, chunks, window)
    found = native(query, stores, slots, chunks, window, NATIVE)
    torch.testing.assert_close(found, expected, rtol=0, atol=BOUNDS[kind])


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_long_chunks_and_the_portable_build(kind: int) -> None:
    chunks = [(0, 200), (130, 1), (3, 140)]
    query, stores, slots = case(kind, chunks, 6, 3, 64, DTYPES[kind])
    expected = reference(query, stores, slots, chunks, 0)
    for flags in (NATIVE, PORTABLE):
        found = native(query, stores, slots, chunks, 0, flags)
        torch.testing.assert_close(found, expected, rtol=0, atol=BOUNDS[kind])


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("window", [0, 40])
def test_a_row_does_not_depend_on_chunks_neighbours_or_threads(kind: int, window: int) -> None:
    whole = [(0, 300)]
    query, stores, slots = case(kind, whole, 6, 3, 64, DTYPES[kind])
    expected = native(query, stores, slots, whole, window, NATIVE)
    for start, length, threads in ((299, 1, 1), (299, 1, 64), (295, 5, 8), (100, 200, 2), (127, 2, 3)):
        end = start + length
        neighbours = [(start, length), (50, 1)]
        both = torch.cat((slots[:end], slots[:51]))
        rows = torch.cat((query[start:end], query[50:51]))
        found = native(rows, stores, both, neighbours, window, NATIVE, threads)
        assert torch.equal(found, torch.cat((expected[start:end], expected[50:51])))


def test_what_is_not_a_number_stays_in_its_own_sequence() -> None:
    chunks = [(140, 1), (140, 1)]
    query, stores, slots = case(0, chunks, 4, 2, 16, torch.float32)
    clean = native(query, stores, slots, chunks, 0, NATIVE)
    stores[0][slots[7]] = float("nan")
    found = native(query, stores, slots, chunks, 0, NATIVE)
    assert found[0].isnan().all()
    assert torch.equal(found[1], clean[1])

"""Numbers that follow from the request alone: the published test vectors, independence, uniformity."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.engine.sampling.random import philox, uniform, uniforms


def test_known_answers_of_philox() -> None:
    """The test vectors that its authors publish."""
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert philox((ones,) * 4, (ones, ones)) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox(counter, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@given(st.lists(st.tuples(st.integers(-(2**63), 2**64), st.integers(0, 2**40), st.integers(0, 2**40)), min_size=30))
@settings(max_examples=20, deadline=None)
def test_many_at_once_are_the_same_numbers(keys: list[tuple[int, int, int]]) -> None:
    seeds, indices, positions = zip(*((seed % 2**64, index, position) for seed, index, position in keys), strict=True)
    found = uniforms(seeds, indices, positions, 3)
    assert found.tolist() == [uniform(*key, 3) for key in keys]
    assert 0 <= found.min() <= found.max() < 1
    assert uniforms(seeds[:2], indices[:2], positions[:2], 3).tolist() == found[:2].tolist()


def test_every_part_of_the_key_gives_independent_uniform_numbers() -> None:
    """Positions, completions, seeds and streams that are neighbours have nothing in common."""
    count = 20_000
    line, zero = range(count), [0] * count
    series = {
        "positions": uniforms(zero, zero, line),
        "completions": uniforms(zero, line, zero),
        "seeds": uniforms(line, zero, zero),
        "next seed": uniforms([1] * count, zero, line),
        "negative seed": uniforms([-1] * count, zero, line),
        "next stream": uniforms(zero, zero, line, 1),
        "next completion": uniforms(zero, [1] * count, line),
    }
    for name, numbers in series.items():
        counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
        assert ((counts - count / 50) ** 2 / (count / 50)).sum() < 95, name  # 49 degrees: once in ten thousand times
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.03, name
    for name in ("next seed", "negative seed", "next stream", "next completion", "seeds", "completions"):
        assert abs(np.corrcoef(series["positions"][1:], series[name][1:])[0, 1]) < 0.03, name

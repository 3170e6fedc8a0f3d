"""Random numbers that depend on the request alone: a pure function of seed, completion, position and purpose.

No generator has a state, so a draw is the same whatever else is in the batch, after a preemption and on any device.
Source: Salmon et al. 2011, Philox4x32-10.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

DRAW = 0
"""The stream that chooses tokens. Speculation uses others, so that drafts and their tests are independent of it."""

_MASK = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_SCALAR = 16
"""Up to so many numbers, one by one is faster than arrays."""


def uniform(seed: int, index: int, position: int, stream: int = DRAW) -> float:
    """A number in [0, 1) with 53 random bits, for token `position` of completion `index` of a request.

    All are taken modulo 2^32, the seed modulo 2^64.
    """
    high, low, _, _ = philox((position & _MASK, index & _MASK, stream & _MASK, 0), (seed & _MASK, seed >> 32 & _MASK))
    return float((high << 21 | low >> 11) * 2.0**-53)


def uniforms(
    seeds: Sequence[int], indices: Sequence[int], positions: Sequence[int], stream: int = DRAW
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`uniform` for many, shape (numbers,)."""
    if len(seeds) <= _SCALAR:
        each = zip(seeds, indices, positions, strict=True)
        return np.array([uniform(seed, index, position, stream) for seed, index, position in each])
    keys, second, first = (
        np.array([value & 0xFFFFFFFFFFFFFFFF for value in values], np.uint64) for values in (seeds, indices, positions)
    )
    mask, constant = np.uint64(_MASK), np.zeros_like(keys)
    high, low, _, _ = philox(
        (first & mask, second & mask, constant + np.uint64(stream & _MASK), constant),
        (keys & mask, keys >> np.uint64(32)),
    )
    result: np.ndarray[Any, np.dtype[np.float64]] = (high << 21 | low >> 11).astype(np.float64) * 2.0**-53
    return result


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Ten rounds of Philox4x32 on 32-bit words, which are ints or uint64 arrays."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        one, two = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (two >> 32) ^ b ^ k, two & _MASK, (one >> 32) ^ d ^ m, one & _MASK
        k, m = (k + _WEYL[0]) & _MASK, (m + _WEYL[1]) & _MASK
    return a, b, c, d

"""The shortest way from an unfinished output to one that its grammar accepts.

A grammar may allow an output to grow without end; a budget of tokens does not. So each unfinished output has a plan,
bytes that would end it, and a token is chosen only when an end that fits the budget is known after it.

The search runs over single bytes: a mask of 256 takes a microsecond, and any tokens may spell the bytes it finds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

END = 256
"""The byte vocabulary's end token."""
_STRUCTURE = frozenset(b'"}],:0')
_BLANKS = frozenset(b" \t\r\n")
_FREE = b"\n<[aZ~"
_FEW = 16
_WALKS = 16
_EFFORT = dict.fromkeys(b'"}]', 0) | dict.fromkeys(b",:", 1)


class _Bytes:
    """The vocabulary of single bytes, as llguidance wants a tokenizer described."""

    eos_token_id = END
    bos_token_id = None
    tokens = (*(bytes([value]) for value in range(256)), b"<end>")
    special_token_ids = (END,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@cache
def byte_tokenizer() -> LLTokenizer:
    """llguidance's tokenizer over single bytes."""
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes()), slices=[])


def way_to_end(
    matcher: LLMatcher,
    fits: Callable[[bytes], bool],
    *,
    blanks: bool,
    tails: Sequence[bytes] = (),
    walks: Iterable[int] = range(4),
    most_steps: int = 1_000,
    longest: float = math.inf,
    closings: Sequence[bytes] = (),
) -> bytes | None:
    """Bytes that `fits` and after which the grammar accepts; None when so many walks of so many steps, and of no more
    than `longest` bytes, find none.

    `tails` are likely endings, tried after each step. Without `blanks` no way leads over white space where there is
    another, as in JSON. `closings` end free text, of which any byte would do and none shows the way.
    """
    for walk in walks:
        state, path = matcher.deep_copy(), b""
        taken: Counter[tuple[bytes, bytes]] = Counter()
        for _ in range(most_steps):
            if len(path) > longest:
                break
            for tail in (b"", *tails):
                if _ends(state, tail) and fits(path + tail):
                    return path + tail
            piece = _step(state, walk, taken, blanks, closings)
            if piece is None or not state.consume_tokens(list(piece)):
                break
            path += piece
    return None


def _step(
    state: LLMatcher, walk: int, taken: Counter[tuple[bytes, bytes]], blanks: bool, closings: Sequence[bytes]
) -> bytes | None:
    """Where a walk goes next. Even walks take the bytes that close first; each prefers other bytes among equals.

    A choice that was taken 15, 255 ... times from states that look alike falls behind, so that a walk leaves every
    recursion that can be left, and counts of repetitions are reached.
    """
    if forced := state.compute_ff_bytes():
        return forced
    mask = state.compute_bitmask()
    for closing in closings if _is_free(mask) else ():
        if state.validate_tokens(list(closing)) == len(closing):
            return closing
    pieces = _continuations(mask, blanks)
    if not pieces:
        return None

    def reluctance(item: tuple[int, bytes]) -> tuple[int, int]:
        index, piece = item
        often = (taken[mask, piece] + 1).bit_length() - 1
        effort = 0 if walk % 2 else _EFFORT.get(piece[0], 2)
        return effort + often // 4, (index - walk // 2) % len(pieces)

    _, chosen = min(enumerate(pieces), key=reluctance)
    taken[mask, chosen] += 1
    return chosen


def shortest_end(matcher: LLMatcher, *, blanks: bool, closings: Sequence[bytes] = ()) -> bytes | None:
    """The shortest way to the end that some walks find; None when they find none."""
    best: bytes | None = None
    for walk in range(_WALKS):
        longest = math.inf if best is None else len(best) - 1
        found = way_to_end(
            matcher,
            lambda _: True,
            blanks=blanks,
            walks=range(walk, walk + 1),
            most_steps=4_000,
            longest=longest,
            closings=closings,
        )
        best = best if found is None else found
        if best is None and walk >= 3:
            break
    return best


def next_plan(
    matcher: LLMatcher,
    plan: bytes,
    text: bytes,
    fits: Callable[[bytes], bool],
    *,
    blanks: bool,
    walks: int,
    most_steps: int,
    closings: Sequence[bytes] = (),
) -> bytes | None:
    """A plan that `fits`, for the state that `text` led to from one with this `plan`; None when none is found.

    `matcher` has consumed the text. Most texts follow the plan, or go before it, or take the place of its beginning.
    """
    skips = [len(text)] if plan.startswith(text) else range(min(4, len(plan)) + 1)
    tails = [plan[skip:] for skip in skips]
    return way_to_end(
        matcher, fits, blanks=blanks, tails=tails, walks=range(walks), most_steps=most_steps, closings=closings
    )


def _ends(matcher: LLMatcher, text: bytes) -> bool:
    """Whether the grammar accepts after `text`."""
    return matcher.validate_tokens([*text, END]) == len(text) + 1 if text else matcher.is_accepting()


def _is_free(mask: bytes) -> bool:
    """Whether the mask allows bytes that only free text allows together."""
    return all(mask[value >> 3] >> (value & 7) & 1 for value in _FREE)


@lru_cache(maxsize=4096)
def _continuations(mask: bytes, blanks: bool) -> tuple[bytes, ...]:
    """One byte of each kind that the mask allows."""
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    allowed: list[int] = bits[:END].nonzero()[0].tolist()
    allowed = [value for value in allowed if value < 128] or allowed
    if not blanks:
        allowed = [value for value in allowed if value not in _BLANKS] or allowed
    if len(allowed) > _FEW:  # ranges of letters: the first stands for the rest
        present = set(allowed)
        allowed = [value for value in allowed if value in _STRUCTURE or value - 1 not in present]
    return tuple(bytes([value]) for value in allowed)

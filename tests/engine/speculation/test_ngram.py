"""Prompt lookup finds what a search through the whole sequence finds, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.engine.speculation.ngram import NgramProposer
from gristmill.engine.speculation.proposer import Draft, DraftRequest
from gristmill.errors import RequestError


def propose(proposer: NgramProposer, tokens: Sequence[int], limit: int = 8, slot: int = 0) -> list[int]:
    (draft,) = proposer.propose([DraftRequest(slot, tokens, limit)])
    assert draft.probs is None
    return draft.token_ids


def searched(tokens: Sequence[int], limit: int, min_n: int, max_n: int) -> list[int]:
    """The plain way: longest ending first, most recent place first, and copying that may overlap."""
    for n in range(max_n, min_n - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if list(tokens[end - n : end]) == list(tokens[len(tokens) - n :]):
                copy = list(tokens)
                for place in range(limit):
                    copy.append(copy[end + place])
                return copy[len(tokens) :]
    return []


@settings(max_examples=200, deadline=None)
@given(
    first=st.lists(st.integers(0, 2), min_size=1, max_size=20),
    rounds=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=8),
    limit=st.integers(0, 6),
    low=st.integers(1, 3),
    more=st.integers(0, 2),
)
def test_equals_a_search_through_the_sequence(
    first: list[int], rounds: list[list[int]], limit: int, low: int, more: int
) -> None:
    proposer = NgramProposer(max_tokens=5, min_n=low, max_n=low + more)
    tokens = list(first)
    for new in ([], *rounds):
        tokens += new
        wanted = searched(tokens, min(limit, 5), low, low + more)
        assert propose(proposer, tokens, limit) == wanted
        assert propose(NgramProposer(max_tokens=5, min_n=low, max_n=low + more), tokens, limit) == wanted


def test_the_longest_ending_wins_and_then_the_most_recent_place() -> None:
    proposer = NgramProposer(max_tokens=2, min_n=1, max_n=2)
    assert propose(proposer, [1, 2, 7, 7, 2, 8, 8, 1, 2]) == [7, 7]
    assert propose(NgramProposer(max_tokens=2, min_n=1, max_n=1), [1, 2, 7, 7, 2, 8, 8, 1, 2]) == [8, 8]
    assert propose(NgramProposer(min_n=1), [1, 2, 3]) == []


def test_a_loop_is_continued_beyond_what_has_been_said() -> None:
    assert propose(NgramProposer(max_tokens=5), [9, 1, 2, 3, 1, 2, 3]) == [1, 2, 3, 1, 2]


def test_slots_are_apart_and_forgotten() -> None:
    proposer = NgramProposer(max_tokens=1, min_n=1)
    assert propose(proposer, [5, 6, 5], slot=0) == [6]
    assert propose(proposer, [5, 7, 5], slot=1) == [7]
    proposer.forget(0)
    proposer.forget(0)
    assert propose(proposer, [8, 9, 8, 3, 5], slot=0) == []
    assert propose(proposer, [5, 7, 5, 7], slot=1) == [5]


class Noticing(list[int]):
    """Counts how many tokens are read."""

    reads = 0

    def __getitem__(self, key: object) -> object:  # type: ignore[override]
        found = super().__getitem__(key)  # type: ignore[index]
        self.reads += len(found) if isinstance(found, list) else 1
        return found


def test_a_step_does_not_read_the_whole_sequence_again() -> None:
    tokens = Noticing(range(8000))
    proposer = NgramProposer(min_n=2, max_n=4)
    propose(proposer, tokens)
    tokens += [10, 11, 12]
    tokens.reads = 0
    assert propose(proposer, tokens, limit=4) == [13, 14, 15, 16]
    assert tokens.reads < 50


def test_a_batch_has_one_draft_each() -> None:
    requests = [DraftRequest(slot, [1, 2, slot, 1, 2], 1) for slot in range(3)]
    assert NgramProposer().propose(requests) == [Draft([0]), Draft([1]), Draft([2])]


@pytest.mark.parametrize(
    ("options", "field"), [({"max_tokens": 0}, "max_tokens"), ({"min_n": 0}, "min_n"), ({"min_n": 5}, "min_n")]
)
def test_options_out_of_range_are_refused(options: dict[str, int], field: str) -> None:
    with pytest.raises(RequestError) as refused:
        NgramProposer(**options)
    assert refused.value.field == field

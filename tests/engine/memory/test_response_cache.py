"""The cache of whole answers: exact, bounded, and only where a repetition is right."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import helpers
from gristmill.core import CompletionOutput, RequestOutput, SamplingParams, StructuredOutput
from gristmill.engine.memory.response_cache import ResponseCache, _bytes_of
from gristmill.errors import RequestError

GREEDY = SamplingParams(temperature=0)
CHANGES: list[dict[str, Any]] = [
    {"max_tokens": 17}, {"seed": 1}, {"top_p": 0.5}, {"n": 2}, {"stop": "x"}, {"logit_bias": {3: 1.0}}, {"min_p": 0.1},
    {"logprobs": 0}, {"bad_words": ["a"]}, {"ignore_eos": True},
    {"stop_token_ids": [5]}, {"skip_special_tokens": False},
    {"structured": StructuredOutput(json_schema={"a": 1, "b": 2})},
    {"structured": StructuredOutput(json_schema={"b": 2, "a": 1})},
]  # fmt: skip


def answer(text: str = "far", reason: Any = "stop", finished: bool = True) -> RequestOutput:
    completion = CompletionOutput(index=0, text=text, token_ids=[1, 2], finish_reason=reason)
    return RequestOutput("id", "prompt", [1], [completion], finished)


def test_a_second_equal_request_computes_nothing_and_gives_the_same() -> None:
    """Wired by hand to an engine whose steps are counted."""
    target, cache, steps = helpers.engine(), ResponseCache(8), 0

    def ask(prompt: list[int], params: SamplingParams) -> list[CompletionOutput]:
        nonlocal steps
        key = cache.key("m", prompt, params)
        if (found := cache.get(key)) is None:
            target.add(prompt, params)
            while target.has_unfinished():
                steps += 1
                for output in target.step():
                    if output.finished:
                        found = output
            assert found is not None
            cache.put(key, found)
        return found.outputs

    prompt, params = helpers.prompt(6), helpers.greedy()
    first = ask(prompt, params)
    done = steps
    assert ask(list(prompt), dataclasses.replace(params)) == first
    assert steps == done
    assert (cache.hits, cache.misses, cache.hit_rate) == (1, 1, 0.5)
    ask([*prompt[:-1], prompt[-1] + 1], params)  # one token differs
    assert steps > done
    assert (cache.hits, cache.misses) == (1, 2)


def test_the_key_holds_model_ids_and_every_parameter() -> None:
    keys = [ResponseCache.key("m", [1, 2], dataclasses.replace(GREEDY, **change)) for change in [{}, *CHANGES]]
    keys += [ResponseCache.key(*key, GREEDY) for key in (("other", [1, 2]), ("m", [1]), ("m", [1, 2, 3]))]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert ResponseCache.key("m", (1, 2), SamplingParams(temperature=0)) == keys[0]


def test_only_repeatable_requests_are_kept() -> None:
    assert ResponseCache.key("m", [1], SamplingParams(temperature=1)) is None
    assert ResponseCache.key("m", [1], SamplingParams(temperature=1, seed=3)) is not None
    assert ResponseCache.key("m", [1], SamplingParams(temperature=0, max_time=1.0)) is None
    cache = ResponseCache(4)
    cache.put(None, answer())
    assert cache.get(None) is None
    for output in (answer(reason="error"), answer(reason="abort"), answer(reason=None, finished=False)):
        cache.put("k", output)
        assert cache.get("k") is None
    assert (len(cache), cache.hits, cache.misses) == (0, 0, 3)


def test_the_least_recently_used_leaves_first() -> None:
    cache = ResponseCache(2)
    cache.put("a", answer("a"))
    cache.put("b", answer("b"))
    assert cache.get("a") is not None
    cache.put("c", answer("c"))
    assert [cache.get(key) is not None for key in "abc"] == [True, False, True]


def test_what_is_handed_out_is_a_copy() -> None:
    cache, given_answer = ResponseCache(2), answer()
    cache.put("k", given_answer)
    given_answer.outputs[0].text = "changed"
    found = cache.get("k")
    assert found is not None
    found.outputs[0].token_ids.append(9)
    assert cache.get("k") == answer()


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.integers(0, 3000))), st.integers(1, 4))
def test_it_equals_a_plain_model_and_stays_within_its_limits(calls: list[tuple[bool, int, int]], entries: int) -> None:
    limit = 4000
    cache, plain = ResponseCache(entries, limit), OrderedDict[int, tuple[RequestOutput, int]]()
    for put, key, length in calls:
        if put:
            output = copy.deepcopy(answer("x" * length))
            cache.put(key, output)
            size = _bytes_of(output) + _bytes_of(key)
            if size <= limit:
                plain.pop(key, None)
                plain[key] = output, size
            while len(plain) > entries or sum(size for _, size in plain.values()) > limit:
                plain.popitem(last=False)
        else:
            found = cache.get(key)
            assert found == (plain[key][0] if key in plain else None)
            if key in plain:
                plain.move_to_end(key)
        assert cache.num_bytes == sum(size for _, size in plain.values()) <= limit
        assert len(cache) == len(plain) <= entries


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (-1, 1)])
def test_a_capacity_below_one_is_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(RequestError, match="at least 1"):
        ResponseCache(*sizes)

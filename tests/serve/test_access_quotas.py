"""Token buckets: exact, whatever the order of requests and the clock."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.serve.access.keys import Key
from gristmill.serve.access.quotas import Bucket, Quota, Quotas
from gristmill.serve.errors import ApiError

SECOND = 10**9


class Clock:
    """Nanoseconds that a test moves."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


def key(**limits: int) -> Key:
    return Key(name="ann", sha256="0" * 64, **limits)


@given(
    limit=st.integers(1, 20),
    seconds=st.sampled_from([60, 86_400]),
    steps=st.lists(st.tuples(st.sampled_from([0, 0, 1]) | st.integers(0, 10**11), st.integers(0, 20)), max_size=60),
)
def test_no_more_than_burst_and_rate_in_any_span(limit: int, seconds: int, steps: list[tuple[int, int]]) -> None:
    clock = Clock()
    bucket = Bucket(limit, seconds, clock)
    taken: list[tuple[int, int]] = []
    for pause, amount in steps:
        clock.now += pause
        if bucket.wait(amount) == 0:
            bucket.take(amount)
            taken.append((clock.now, amount))
    for first in range(len(taken)):
        total = 0
        for now, amount in taken[first:]:
            total += amount
            assert total <= limit + Fraction((now - taken[first][0]) * limit, seconds * SECOND)


@given(limit=st.integers(1, 10**6), spent=st.integers(0, 10**6), asked=st.integers(1, 10**6))
def test_the_wait_is_exactly_long_enough(limit: int, spent: int, asked: int) -> None:
    clock = Clock()
    bucket = Bucket(limit, 60, clock)
    bucket.take(spent)
    wait = bucket.wait(asked)
    if asked > limit:
        assert wait == math.inf
        return
    clock.now += math.ceil(wait * SECOND) + 1000
    assert bucket.wait(asked) == 0
    if wait > 0.001:
        again = Bucket(limit, 60, late := Clock())
        again.take(spent)
        late.now = math.floor(wait * SECOND) - 1000
        assert again.wait(asked) > 0


@given(requests=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400), st.integers(0, 20 * SECOND)), max_size=40))
def test_settled_use_counts_and_nothing_else(requests: list[tuple[int, int, int]]) -> None:
    """A quota that reserves and settles is where one is that took the true use at once, once all are over."""
    clock = Clock()
    quota, plain = Quota(key(tokens_per_minute=500), clock), Bucket(500, 60, clock)
    for reserve, used, pause in requests:
        try:
            quota.reserve(reserve)
        except ApiError:
            pass
        else:
            quota.settle(reserve, used)  # in the same instant
            plain.take(used)
        assert quota.headers()["x-ratelimit-remaining-tokens"] == str(max(0, plain.left))
        clock.now += pause


def test_a_quota_takes_of_all_buckets_or_of_none() -> None:
    clock = Clock()
    quota = Quota(key(tokens_per_minute=100, tokens_per_day=150), clock)
    quota.reserve(100)
    clock.now += 60 * SECOND  # the minute is full again, the day is not
    with pytest.raises(ApiError) as refused:
        quota.reserve(100)
    assert refused.value.status_code == 429
    assert "per day" in refused.value.detail
    assert quota.headers()["x-ratelimit-remaining-tokens"] == "100"
    quota.settle(100, 0)  # the first one failed after all
    quota.reserve(100)


def test_what_was_used_beyond_the_reserve_is_owed() -> None:
    clock = Clock()
    quota = Quota(key(tokens_per_minute=60), clock)
    quota.reserve(10)
    quota.settle(10, 120)
    assert quota.headers()["x-ratelimit-remaining-tokens"] == "0"
    clock.now += 60 * SECOND
    with pytest.raises(ApiError) as refused:
        quota.reserve(1)
    assert refused.value.headers == {"retry-after": "1"}
    clock.now += SECOND
    quota.reserve(1)


def test_requests_are_counted_apart() -> None:
    clock = Clock()
    quota = Quota(key(requests_per_minute=2), clock)
    quota.request()
    quota.request()
    quota.reserve(10**9)  # no limit of tokens
    with pytest.raises(ApiError) as refused:
        quota.request()
    assert refused.value.headers == {"retry-after": "30"}
    assert quota.headers() == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "60.000s",
    }
    clock.now += 30 * SECOND
    quota.request()


def test_a_request_that_never_fits_is_told_so_and_not_to_wait() -> None:
    quota = Quota(key(tokens_per_minute=10), Clock())
    with pytest.raises(ApiError, match="max_tokens") as refused:
        quota.reserve(11)
    assert refused.value.status_code == 413


def test_the_quota_of_a_key_lasts_until_its_entry_changes() -> None:
    quotas = Quotas(Clock())
    first = quotas.of(key(tokens_per_minute=10))
    assert quotas.of(key(tokens_per_minute=10)) is first
    assert quotas.of(key(tokens_per_minute=11)) is not first

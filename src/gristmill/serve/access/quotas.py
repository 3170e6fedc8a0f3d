"""What a key may use: requests and tokens per minute, tokens per day, as token buckets.

A bucket holds as much as its limit and fills at the rate of the limit, so that in any t seconds no more is taken than
limit + rate * t. A request takes its prompt and the most that it may generate before it begins, and gives back at its
end what it did not use. Levels are integers (tokens times nanoseconds), so nothing is lost or won by rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from gristmill.serve.access.keys import Key
from gristmill.serve.errors import ApiError

Clock = Callable[[], int]
"""Nanoseconds that never go back."""


class Bucket:
    """Holds up to `limit` and gains as much again in `seconds`. It may owe, and is then below zero for a while."""

    def __init__(self, limit: int, seconds: int, clock: Clock = time.monotonic_ns) -> None:
        self.limit, self.seconds, self._clock = limit, seconds, clock
        self._unit = seconds * 10**9  # of one token
        self._level = limit * self._unit
        self._then = clock()

    @property
    def left(self) -> int:
        """Whole tokens in it, below zero when it owes."""
        return self._now() // self._unit

    def wait(self, amount: int) -> float:
        """Seconds until `amount` can be taken; 0 when it can be taken now, infinite when it never can."""
        missing = amount * self._unit - self._now()
        return math.inf if amount > self.limit else max(0, missing) / (self.limit * 10**9)

    def take(self, amount: int) -> None:
        """Take so much, or give it back when it is negative."""
        self._level = self._now() - amount * self._unit

    def _now(self) -> int:
        now = self._clock()
        self._level = min(self._level + (now - self._then) * self.limit, self.limit * self._unit)
        self._then = now
        return self._level


class Quota:
    """The buckets of one key."""

    def __init__(self, key: Key, clock: Clock = time.monotonic_ns) -> None:
        self.key = key
        self._requests = [Bucket(key.requests_per_minute, 60, clock)] if key.requests_per_minute else []
        limits = ((key.tokens_per_minute, 60), (key.tokens_per_day, 86_400))
        self._tokens = [Bucket(limit, seconds, clock) for limit, seconds in limits if limit]

    def request(self) -> None:
        """Count a request. Raises ApiError 429 when there were too many."""
        self._take(self._requests, 1, "requests")

    def reserve(self, tokens: int) -> None:
        """Take tokens of all buckets, or of none.

        Raises ApiError 429 when it is too early for so many, and 413 when they are more than the key may ever use.
        """
        self._take(self._tokens, tokens, "tokens")

    def settle(self, reserved: int, used: int) -> None:
        """Give back what was reserved and not used; what was used above it is owed."""
        for bucket in self._tokens:
            bucket.take(used - reserved)

    def headers(self) -> dict[str, str]:
        """x-ratelimit-* of the limits per minute (of tokens per day where there is no other), as OpenAI names them."""
        found: dict[str, str] = {}
        for kind, buckets in (("requests", self._requests), ("tokens", self._tokens)):
            for bucket in buckets[:1]:
                found[f"x-ratelimit-limit-{kind}"] = str(bucket.limit)
                found[f"x-ratelimit-remaining-{kind}"] = str(max(0, bucket.left))
                found[f"x-ratelimit-reset-{kind}"] = f"{bucket.wait(bucket.limit):.3f}s"
        return found

    def _take(self, buckets: list[Bucket], amount: int, kind: str) -> None:
        for bucket in buckets:
            wait = bucket.wait(amount)
            if wait == 0:
                continue
            span = "minute" if bucket.seconds == 60 else "day"
            rule = f"key {self.key.name!r} may use {bucket.limit} {kind} per {span}"
            if wait == math.inf:
                message = f"{rule}, and this request alone may need {amount}; ask for fewer with max_tokens"
                raise ApiError(413, message, code="request_too_large")
            message, headers = f"{rule}; try again in {wait:.1f} s", {"retry-after": str(math.ceil(wait))}
            raise ApiError(429, message, code="rate_limit_exceeded", headers=headers)
        for bucket in buckets:
            bucket.take(amount)


class Quotas:
    """The quota of each key, kept from request to request. A changed entry begins anew."""

    def __init__(self, clock: Clock = time.monotonic_ns) -> None:
        self._clock = clock
        self._quotas: dict[str, Quota] = {}

    def of(self, key: Key) -> Quota:
        """The quota of a key."""
        known = self._quotas.get(key.name)
        if known is None or known.key != key:
            known = self._quotas[key.name] = Quota(key, self._clock)
        return known

"""n-gram language models: the next token from the few before it, by counting. The baseline that neural ones must beat.

Unsmoothed relative counts, add-k, or interpolated Kneser-Ney, where a shorter context counts how many different tokens
it follows instead of how often it occurs.

Source: Shannon 1951; Kneser and Ney 1995; Chen and Goodman 1999, section 3.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

from gristmill.errors import DataError, RequestError

T = TypeVar("T", bound=Hashable)
Context = tuple[T | None, ...]
"""Tokens before the one to predict, oldest first; None stands before the beginning of a sequence."""
Counts = dict[Context[T], Counter[T]]


class NGram(Generic[T]):
    """Probabilities of a token of `vocabulary` after the `order` - 1 tokens before it, from the counts of `fit`.

    Without an option: relative counts, uniform after a context that was never seen. `add` k > 0: k is added to every
    count. `discount` in (0, 1): that much is taken from every count and given to the shorter context (Kneser-Ney).
    `end` is a token that closes every sequence; without one nothing says where a sequence stops. `unknown` stands for
    every token outside the vocabulary; without one such a token is a DataError.

    Raises RequestError for an order below 1, or smoothing out of range or of both kinds.
    """

    def __init__(
        self,
        order: int,
        vocabulary: Iterable[T],
        *,
        add: float = 0.0,
        discount: float | None = None,
        end: T | None = None,
        unknown: T | None = None,
    ) -> None:
        self.order, self.add, self.discount = order, add, discount
        self.vocabulary, self.end, self.unknown = frozenset(vocabulary), end, unknown
        if order < 1:
            raise RequestError(f"order must be 1 (no context) or more, got {order}", field="order")
        if not 0 <= add < math.inf:
            raise RequestError(f"add must be 0 or more, got {add}", field="add")
        if discount is not None and (add or not 0 < discount < 1):
            raise RequestError(
                f"discount must be in (0, 1) and excludes add, got {discount} and add {add}", field="discount"
            )
        for name, token in (("end", end), ("unknown", unknown)):
            if token is not None and token not in self.vocabulary:
                raise RequestError(f"{name} {token!r} is not in the vocabulary; put it there", field=name)
        # tables[n] holds the counts after contexts of n tokens; without Kneser-Ney only the longest is used
        self.tables: list[Counts[T]] = [defaultdict(Counter) for _ in range(order)]

    def fit(self, sequences: Iterable[Sequence[T]]) -> NGram[T]:
        """Add the counts of `sequences`, each a document of its own; returns self."""
        longest = self.tables[-1]
        for sequence in sequences:
            for context, token in self._events(sequence):
                longest[context][token] += 1
        if self.discount is not None:
            for size in range(self.order - 1, 0, -1):
                self.tables[size - 1] = _continuations(self.tables[size])
        return self

    def probability(self, token: T, context: Sequence[T | None]) -> float:
        """Of `token` after the last order - 1 entries of `context` (None: before the beginning). Sums to 1 over the
        vocabulary. Raises DataError for fewer entries."""
        size = self.order - 1
        if len(context) < size:
            raise DataError(
                f"an {self.order}-gram model needs {size} tokens of context, got {len(context)}; pad with None"
            )
        known = tuple(None if item is None else self._known(item) for item in context[len(context) - size :])
        return self._probability(self._known(token), known)

    def logprob(self, sequence: Sequence[T]) -> float:
        """Log-probability of a whole sequence (and its `end`), in nats; -inf when a step was never seen."""
        found = [self._probability(token, context) for context, token in self._events(sequence)]
        return sum(map(math.log, found)) if all(found) else -math.inf

    def cross_entropy(self, sequences: Sequence[Sequence[T]]) -> float:
        """Nats per token of `sequences`, their ends counted. On the text of `fit`, without smoothing, this is the
        empirical entropy of a token given the order - 1 before it (Shannon's F_order), which cannot rise with the
        order. inf when a step was never seen. Raises DataError when there is no token."""
        tokens = sum(len(sequence) + (self.end is not None) for sequence in sequences)
        if tokens == 0:
            raise DataError("no token to predict: every sequence is empty")
        return -sum(map(self.logprob, sequences)) / tokens

    def perplexity(self, sequences: Sequence[Sequence[T]]) -> float:
        """exp of `cross_entropy`."""
        return math.exp(self.cross_entropy(sequences))

    def _probability(self, token: T, context: Context[T]) -> float:
        uniform = 1 / len(self.vocabulary)
        seen = self.tables[len(context)].get(context)
        if self.discount is None:
            total = (seen.total() if seen else 0) + self.add * len(self.vocabulary)
            return ((seen[token] if seen else 0) + self.add) / total if total else uniform
        shorter = self._probability(token, context[1:]) if context else uniform
        if not seen:
            return shorter
        kept = max(seen[token] - self.discount, 0.0)
        return (kept + self.discount * len(seen) * shorter) / seen.total()

    def _events(self, sequence: Sequence[T]) -> Iterable[tuple[Context[T], T]]:
        known: list[T | None] = [None] * (self.order - 1)
        known += [self._known(token) for token in sequence]
        if self.end is not None:
            known.append(self.end)
        for last in range(self.order - 1, len(known)):
            token = known[last]
            assert token is not None
            yield tuple(known[last - self.order + 1 : last]), token

    def _known(self, token: T) -> T:
        if token in self.vocabulary:
            return token
        if self.unknown is None:
            raise DataError(f"token {token!r} is not in the vocabulary; name an unknown token to stand for it")
        return self.unknown


def _continuations(table: Counts[T]) -> Counts[T]:
    """How many different tokens stand before each shorter n-gram. What begins a sequence has nothing before it: there
    the count itself is kept."""
    shorter: Counts[T] = defaultdict(Counter)
    for context, counts in table.items():
        begins = len(context) > 1 and context[1] is None
        for token, count in counts.items():
            shorter[context[1:]][token] += count if begins else 1
    return shorter

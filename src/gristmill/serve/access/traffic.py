"""What the server counts of its requests. Only its event loop writes here."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from gristmill.engine.metrics.counters import Histogram


def _histograms() -> defaultdict[str, Histogram]:
    return defaultdict(Histogram)


@dataclass
class Traffic:
    """Totals since the server began. Routes are path templates and models names of ours, so there are few of each."""

    requests: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    """By method, route and status; a status of 0 is a request that was cut off without an answer."""
    seconds: defaultdict[str, Histogram] = field(default_factory=_histograms)
    """By route, from the first byte of the request to the last of the answer."""
    open: int = 0
    """Requests that are not over."""
    running: Counter[str] = field(default_factory=Counter)
    """Of these, by model, those that it answers."""
    tokens: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By model and kind (prompt, completion), of requests that are over."""
    left: Counter[str] = field(default_factory=Counter)
    """By model, requests whose client left before the end."""
    first_token: defaultdict[str, Histogram] = field(default_factory=_histograms)
    """By model, seconds from a request to its first token."""
    between_tokens: defaultdict[str, Histogram] = field(default_factory=_histograms)
    """By model, seconds from a token of an answer to the next."""

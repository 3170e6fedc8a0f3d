"""Whole answers kept for requests that come again word for word: no model call at all.

Only where a repetition is right: a greedy request, or one with a seed, gives the same answer each time; any other asks
for another draw. Requests are equal when model, prompt ids and every sampling parameter are.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from gristmill.core import RequestOutput, SamplingParams
from gristmill.errors import RequestError

Key = Hashable


class ResponseCache:
    """At most `max_entries` answers in at most `max_bytes` of memory; the least recently used one leaves first.

    Raises RequestError for a capacity below 1. `hits` and `misses` count the lookups of requests that may be kept.
    """

    def __init__(self, max_entries: int, max_bytes: int = 64 << 20) -> None:
        for name, value in (("max_entries", max_entries), ("max_bytes", max_bytes)):
            if value < 1:
                raise RequestError(f"response cache: {name} must be at least 1, got {value}", field=name)
        self.max_entries, self.max_bytes = max_entries, max_bytes
        self.num_bytes = self.hits = self.misses = 0
        self._entries: OrderedDict[Key, tuple[RequestOutput, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def hit_rate(self) -> float:
        """Share of the lookups that found an answer; 0 before the first."""
        return self.hits / max(1, self.hits + self.misses)

    @staticmethod
    def key(model: str, prompt_ids: Sequence[int], params: SamplingParams) -> Key | None:
        """What tells requests apart; None when the answer is not to be repeated: it was drawn without a seed, or a
        limit of time may cut it elsewhere."""
        drawn = params.temperature > 0 and params.seed is None
        if drawn or params.max_time is not None:
            return None
        # the order of keys is kept, for that of a schema's properties is the order of the output
        return model, tuple(prompt_ids), json.dumps(dataclasses.asdict(params), default=_plain)

    def get(self, key: Key | None) -> RequestOutput | None:
        """The answer, a copy that the caller may change, or None. Request id and prompt are those it was put with."""
        if key is None:
            return None
        if key not in self._entries:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return copy.deepcopy(self._entries[key][0])

    def put(self, key: Key | None, output: RequestOutput) -> None:
        """Keep a finished answer. One that failed, was aborted or is larger than the cache is not kept."""
        reasons = [completion.finish_reason for completion in output.outputs]
        if key is None or not output.finished or not all(reason in ("stop", "length") for reason in reasons):
            return
        kept = copy.deepcopy(output)
        size = _bytes_of(kept) + _bytes_of(key)
        if size > self.max_bytes:
            return
        self._drop(key)
        self._entries[key] = kept, size
        self.num_bytes += size
        while len(self._entries) > self.max_entries or self.num_bytes > self.max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: Key) -> None:
        _, size = self._entries.pop(key, (None, 0))
        self.num_bytes -= size


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else list(value)


def _bytes_of(value: Any) -> int:
    """Memory of a value and all that it holds."""
    size = sys.getsizeof(value)
    if dataclasses.is_dataclass(value):
        return size + sum(_bytes_of(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, Mapping):
        return size + sum(_bytes_of(part) for item in value.items() for part in item)
    if isinstance(value, list | tuple):
        return size + sum(map(_bytes_of, value))
    return size

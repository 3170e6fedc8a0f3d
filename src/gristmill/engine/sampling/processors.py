"""What the processors of this folder share: state per slot, the ids it accounts for, and sparse changes of logits.

A step touches only the rows whose slots a processor concerns, and of those only the logits that change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from gristmill.core import BatchUpdate, LogitsRow, SamplingParams
from gristmill.errors import RequestError

State = TypeVar("State")
IdArray = np.ndarray[Any, np.dtype[np.int64]]


class SlotProcessor(ABC, Generic[State]):
    """A processor with a state for each slot it concerns."""

    is_argmax_invariant = False

    def __init__(self) -> None:
        self._states: dict[int, State] = {}

    def validate(self, params: SamplingParams) -> None:
        """Raises RequestError, naming the field, for parameters that cannot be served."""
        del params

    @abstractmethod
    def begin(self, params: SamplingParams, prompt_ids: Sequence[int], end_ids: Collection[int]) -> State | None:
        """The state of a slot that begins; None when it is not concerned."""

    @abstractmethod
    def change(self, logits: Tensor, concerned: Sequence[tuple[int, LogitsRow, State]]) -> None:
        """Change logits (rows, vocab) in place, in the rows named: (number, row, state)."""

    def update(self, change: BatchUpdate) -> None:
        """Follow the batch."""
        for slot in change.removed:
            self._states.pop(slot, None)
        for old, new in change.moved:
            if old in self._states:
                self._states[new] = self._states.pop(old)
        for slot, params, prompt_ids in change.added:
            state = self.begin(params, prompt_ids, change.end_ids.get(slot, ()))
            if state is not None:
                self._states[slot] = state

    def concerned(self, rows: Sequence[LogitsRow]) -> list[tuple[int, LogitsRow, State]]:
        """The rows whose slots have a state."""
        states = self._states
        if not states:
            return []
        return [(i, row, states[row.slot]) for i, row in enumerate(rows) if row.slot in states]

    def apply(self, logits: Tensor, rows: Sequence[LogitsRow]) -> Tensor:
        """New logits, shape (rows, vocab); the input itself when no row is concerned."""
        concerned = self.concerned(rows)
        if concerned:
            logits = logits.clone()
            self.change(logits, concerned)
        return logits


class History:
    """The output ids that a state accounts for. Drafts that were refused are taken back, the new ids put in."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def follow(self, ids: Sequence[int], add: Callable[[int], None], drop: Callable[[int], None]) -> None:
        """Call `drop` for each id that no longer stands, last first, then `add` for each new one, in order.

        `ids` of this object then hold the change already (add) or still (drop).
        """
        own, known = self.ids, len(self.ids)
        new = list(ids)
        if new[:known] != own:  # the common case is one more id at the end; comparing costs nanoseconds per id
            same = next((i for i, (a, b) in enumerate(zip(own, new, strict=False)) if a != b), min(known, len(new)))
            while len(own) > same:
                drop(own[-1])
                own.pop()
            known = same
        for token in new[known:]:
            own.append(token)
            add(token)


def tail(row: LogitsRow, count: int) -> list[int]:
    """The last `count` ids of prompt and output, or all of them."""
    missing = count - len(row.output_ids)
    end = list(row.output_ids[max(0, -missing) :])
    return [*row.prompt_ids[-missing:], *end] if missing > 0 else end


def places(logits: Tensor, numbers: Sequence[int], ids: Sequence[IdArray | Sequence[int]]) -> Tensor:
    """Where in the flat logits (rows * vocab) the `ids` of each row number lie, as one index."""
    vocab = logits.shape[1]
    parts = [np.asarray(own, np.int64) + number * vocab for number, own in zip(numbers, ids, strict=True)]
    return torch.from_numpy(np.concatenate(parts)).to(logits.device)


def ban(logits: Tensor, numbers: Sequence[int], ids: Sequence[IdArray | Sequence[int]]) -> None:
    """Set the logits of each row's `ids` to minus infinity, in place."""
    if any(len(own) for own in ids):
        logits.view(-1)[places(logits, numbers, ids)] = float("-inf")


def check_ids(field: str, ids: Collection[int], vocab_size: int) -> None:
    """Raises RequestError for an id that is not in the vocabulary."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise RequestError(f"{field}: token id {token} is not in the vocabulary of {vocab_size}", field=field)

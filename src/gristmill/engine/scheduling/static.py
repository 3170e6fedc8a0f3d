"""Request-level batching on a model: prompts padded on the left, decoded together until the longest answer ends.

The plain way, kept as the reference that iteration-level scheduling is compared with. Pads are hidden from attention
and do not count as positions, so every row is what it would be alone. Also here: how many pads a batching costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gristmill.core import CAUSAL, AttentionRule
from gristmill.engine.memory.paged_cache import check_servable
from gristmill.errors import RequestError
from gristmill.model.attention.kernel import masked_attention, visible
from gristmill.model.config import ModelConfig
from gristmill.model.transformer import Transformer


class LeftPadded:
    """A key-value memory of rows of equal width whose first `pads` places are no tokens. Call `extend` before each
    forward. Real tokens never see a pad; a pad sees itself alone, so that its softmax is a number."""

    keeps = True

    def __init__(self, config: ModelConfig, pads: Sequence[int], device: torch.device | str = "cpu") -> None:
        check_servable(config)
        self._slots, self._pads = config.cache_slots, torch.tensor(list(pads), device=device)[:, None]
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._width = self._new = 0

    def extend(self, tokens: int) -> Tensor:
        """Announce a step of so many places in each row; returns its flat position ids (rows * tokens,)."""
        columns = torch.arange(self._width, self._width + tokens, device=self._pads.device)
        self._width, self._new = self._width + tokens, tokens
        return (columns - self._pads).clamp(min=0).flatten()

    @property
    def lengths(self) -> Tensor:
        """See `KVCache.lengths`; pads do not count."""
        return (self._width - self._pads).expand(-1, self._new).flatten()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule = CAUSAL) -> Tensor:
        """See `KVCache.attend`."""
        query, key, value = (x.unflatten(0, (-1, self._new)).transpose(1, 2) for x in (query, key, value))
        slot = self._slots[layer]
        if slot not in self._keys:
            self._keys[slot], self._values[slot] = key, value
        elif self._keys[slot].shape[2] < self._width:  # otherwise a layer that shares this memory has stored it
            self._keys[slot] = torch.cat((self._keys[slot], key), dim=2)
            self._values[slot] = torch.cat((self._values[slot], value), dim=2)
        group = query.shape[1] // key.shape[1]
        keys, values = (x[slot].repeat_interleave(group, dim=1) for x in (self._keys, self._values))
        columns = torch.arange(self._width, device=query.device)
        new = columns[-self._new :]
        seen = visible(rule, new - self._pads, columns - self._pads)  # positions before 0 are pads
        real = (columns >= self._pads)[:, None, :]
        seen = real if seen is None else seen & real
        seen = seen | (new[:, None] == columns)
        bias = None if rule.bias is None else rule.bias(new, columns)  # of distances, which pads do not change
        return masked_attention(query, keys, values, rule, seen[:, None], bias).transpose(1, 2).flatten(0, 1)

    def recur(self, layer: int, mixer: Callable[[Tensor, Any], tuple[Tensor, Any]], x: Tensor) -> Tensor:
        """Never reached: a model with recurrent layers is refused at construction."""
        raise RequestError("left padding would run through a recurrent state", field="layers")


@dataclass(frozen=True, slots=True)
class StaticRun:
    """Answers in the order of the prompts, and what the batches cost.

    prompt_slots and pads: places of all prefills, and those that held no token. steps: tokens chosen one after the
    other. decode_slots and wasted: places of all steps, and those of rows that had ended.
    """

    outputs: list[list[int]]
    prompt_slots: int
    pads: int
    steps: int
    decode_slots: int
    wasted: int

    @property
    def busy(self) -> float:
        """Share of the decode slots that gave a token that was asked for."""
        return 1 - self.wasted / self.decode_slots


@torch.inference_mode()
def generate_static(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_tokens: Sequence[int],
    *,
    batch_size: int,
    buckets: bool = False,
    end_ids: Sequence[int] = (),
) -> StaticRun:
    """Greedy answers of at most `max_tokens[i]` tokens to prompt i, batch after batch, each until its longest ends.

    An answer ends with one of `end_ids`, which is part of it. `buckets`: prompts of like length share a batch. Raises
    RequestError for an empty prompt, no prompts, or a length out of range.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 1 or len(max_tokens) != len(prompts) or min(max_tokens) < 1:
        raise RequestError("every prompt needs a token or more, and max_tokens of 1 or more", field="prompts")
    outputs: list[list[int]] = [[] for _ in prompts]
    batches = form_batches(lengths, batch_size, buckets=buckets)
    steps = slots = 0
    for batch in batches:
        answers = _run_batch(model, [prompts[i] for i in batch], [max_tokens[i] for i in batch], frozenset(end_ids))
        for index, answer in zip(batch, answers, strict=True):
            outputs[index] = answer
        longest = max(map(len, answers))
        steps, slots = steps + longest, slots + longest * len(batch)
    pads = count_pads(lengths, batches)
    return StaticRun(outputs, sum(lengths) + pads, pads, steps, slots, slots - sum(map(len, outputs)))


def _run_batch(
    model: Transformer, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int], end_ids: frozenset[int]
) -> list[list[int]]:
    width = max(map(len, prompts))
    pads = [width - len(prompt) for prompt in prompts]
    device = model.embed_tokens.weight.device
    cache = LeftPadded(model.config, pads, device)
    ids = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)], device=device)
    answers: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    while True:
        hidden = model.hidden_states(ids.flatten(), cache.extend(ids.shape[1]), cache)
        last = hidden.view(*ids.shape, -1)[:, -1]
        chosen: list[int] = model.logits(last).argmax(-1).tolist()
        for row in list(open_rows):
            answers[row].append(chosen[row])
            if chosen[row] in end_ids or len(answers[row]) == max_tokens[row]:
                open_rows.remove(row)
        if not open_rows:
            return answers
        ids = torch.tensor(chosen, device=device)[:, None]  # rows that have ended go on, for nothing


def form_batches(lengths: Sequence[int], batch_size: int, *, buckets: bool = False) -> list[list[int]]:
    """Indices of the prompts of each batch: in the order of arrival, or those of like length together. Raises
    RequestError for a batch size below 1."""
    if batch_size < 1:
        raise RequestError(f"batch_size must be at least 1, got {batch_size}", field="batch_size")
    order = sorted(range(len(lengths)), key=lambda i: lengths[i]) if buckets else list(range(len(lengths)))
    return [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]


def count_pads(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> int:
    """Pads that bring the prompts of each batch to the length of its longest."""
    return sum(max(lengths[i] for i in batch) - lengths[j] for batch in batches for j in batch)

"""How far a compressed model is from the one that it was made of, on held-out text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.errors import RequestError
from gristmill.model.transformer import Transformer


@dataclass(frozen=True)
class Comparison:
    """Both models on the same windows of text. perplexity_*: exp of the mean nats per token. added_nats: the mean of
    what a token costs more, and its standard error over windows. largest_difference: of any two logits; spread: the
    standard deviation of the original's logits. greedy_agreement: share of tokens after which both choose the same.
    speed_*: tokens per second of these forward passes."""

    tokens: int
    perplexity_before: float
    perplexity_after: float
    added_nats: float
    standard_error: float
    largest_difference: float
    spread: float
    greedy_agreement: float
    speed_before: float
    speed_after: float


@torch.inference_mode()
def compare_models(
    before: Transformer,
    after: Transformer,
    windows: Sequence[Sequence[int]],
    advance: Callable[..., None] = lambda done, note="": None,
) -> Comparison:
    """Run both on every window (token ids, two or more), one at a time. Raises RequestError for fewer than two windows,
    or one that is too short."""
    if len(windows) < 2 or min(map(len, windows)) < 2:
        raise RequestError("the text has too few tokens to compare on; give a longer one", field="text")
    costs, seconds, largest, same, variance = [], [0.0, 0.0], 0.0, 0, 0.0
    for number, window in enumerate(windows, start=1):
        ids = torch.tensor(list(window), device=next(before.parameters()).device)
        pair = []
        for side, model in enumerate((before, after)):
            began = time.perf_counter()
            pair.append(_checked(model(ids)[:-1].float()))  # the check waits for a device
            seconds[side] += time.perf_counter() - began
        left, right = pair
        costs.append((len(ids) - 1, *(float(F.cross_entropy(x, ids[1:], reduction="sum")) for x in (left, right))))
        largest = max(largest, float((left - right).abs().max()))
        same += int((left.argmax(-1) == right.argmax(-1)).sum())
        variance += float(left.var()) / len(windows)
        advance(number)
    tokens, first, second = (sum(column) for column in zip(*costs, strict=True))
    added = (second - first) / tokens
    residues = [(b - a) - added * count for count, a, b in costs]
    error = math.sqrt(sum(x * x for x in residues) * len(costs) / (len(costs) - 1)) / tokens
    return Comparison(
        tokens=tokens,
        perplexity_before=math.exp(first / tokens),
        perplexity_after=math.exp(second / tokens),
        added_nats=added,
        standard_error=error,
        largest_difference=largest,
        spread=math.sqrt(variance),
        greedy_agreement=same / tokens,
        speed_before=(tokens + len(costs)) / seconds[0],
        speed_after=(tokens + len(costs)) / seconds[1],
    )


def _checked(logits: Tensor) -> Tensor:
    if not bool(logits.isfinite().all()):
        raise RequestError("a logit is not a finite number: the models cannot be compared", field="text")
    return logits

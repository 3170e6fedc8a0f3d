"""Which candidates stay: the step of the driver that tells one search from another.

Each function makes a `Prune`: candidates are all tokens after all open paths, ranked by accumulated score. Equal
scores are won by the earlier path, then by the lower token id.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gristmill.engine.search.driver import Choice, Prune, Search


def best(scores: Tensor, count: int) -> list[Choice]:
    """The `count` best candidates of all paths, best first; fewer where fewer are possible."""
    flat, vocab = scores.flatten(), scores.shape[-1]
    least = flat.topk(min(count, flat.numel())).values[-1]
    # topk leaves open which of several equal scores it returns
    indices = ((flat >= least) & (flat > -math.inf)).nonzero().flatten()
    ranked = sorted(zip((-flat[indices]).tolist(), indices.tolist(), strict=True))[:count]
    return [Choice(index // vocab, index % vocab, -value) for value, index in ranked]


def top(width: int) -> Prune:
    """Keep the `width` best candidates, finished or not: 1 is greedy search."""
    return lambda search, scores: best(scores, width)


def everything(search: Search, scores: Tensor) -> list[Choice]:
    """Keep all candidates that are possible: exhaustive search."""
    return best(scores, scores.numel())


def sample(generator: torch.Generator, pool: Callable[[Tensor], Tensor] | None = None) -> Prune:
    """Keep one candidate of each path, drawn in proportion to the exponential of what its token adds to the score.

    `pool` maps scores (paths, vocab) to scores with -inf for tokens outside the pool, as top-k or top-p does; what is
    left is renormalised.
    """

    def prune(search: Search, scores: Tensor) -> list[Choice]:
        kept = scores if pool is None else pool(scores)
        rows = kept.isfinite().any(dim=-1).nonzero().flatten().tolist()
        if not rows:
            return []
        tokens = torch.multinomial(kept[rows].softmax(dim=-1).cpu(), 1, generator=generator).flatten().tolist()
        return [Choice(row, token, float(scores[row, token])) for row, token in zip(rows, tokens, strict=True)]

    return prune


def beam(width: int) -> Prune:
    """Keep `width` candidates that go on, and of those that end the ones among the `width` best of all.

    Enough candidates are ranked that `width` go on even if every path can end in each of its ways. Ended ones lower
    in rank are dropped: they are there only to be passed over, as in transformers.
    """

    def prune(search: Search, scores: Tensor) -> list[Choice]:
        if search.is_last_step:
            return best(scores, width)
        ranked = best(scores, (1 + max(1, len(search.end_ids))) * width)
        ends = [choice for choice in ranked[:width] if choice.token in search.end_ids]
        return ends + [choice for choice in ranked if choice.token not in search.end_ids][:width]

    return prune

"""Searches that keep one path: greedy search and sampling, as instances of the one driver."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gristmill.engine.search.driver import Objective, Search, SearchResult, log_probability, run
from gristmill.engine.search.model import NextTokenModel
from gristmill.engine.search.prune import sample, top


def greedy_search(
    model: NextTokenModel, prompt_ids: Sequence[int], max_tokens: int, *, objective: Objective = log_probability
) -> SearchResult | None:
    """The output that takes the best token at each step. None when all tokens of some step are impossible.

    Source: Xiao and Zhu 2025, eq. 5.19-5.21.
    """
    search = Search(
        prompt_ids=prompt_ids, prune=top(1), max_tokens=max_tokens, end_ids=model.end_ids, objective=objective
    )
    run(model, [search])
    return next(iter(search.results()), None)


def sample_outputs(
    model: NextTokenModel,
    prompt_ids: Sequence[int],
    max_tokens: int,
    n: int,
    *,
    seed: int,
    pool: Callable[[Tensor], Tensor] | None = None,
    objective: Objective = log_probability,
) -> list[SearchResult]:
    """n independent draws in the same forwards; equal beginnings are computed once. `pool`: see `prune.sample`.

    A draw that comes to a step where all tokens are impossible is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    searches = [
        Search(
            prompt_ids=prompt_ids,
            prune=sample(generator, pool),
            max_tokens=max_tokens,
            end_ids=model.end_ids,
            objective=objective,
        )
        for _ in range(n)
    ]
    run(model, searches)
    return [found for search in searches for found in search.results()]

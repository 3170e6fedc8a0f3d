"""Stochastic beam search: a sample of outputs without replacement, by the Gumbel top-k trick over the search tree.

Every leaf of the tree has its log-probability and a Gumbel variable of its own added; the k leaves with the highest
sums are a sample of k without replacement. They are found from the root down: a node's value is the maximum of its
leaves', so its children's values are drawn under the condition that their maximum is the node's.

Source: Kool, van Hoof and Welling 2019, section 4 and appendix B.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gristmill.engine.search.driver import Choice, Objective, Prune, Search, SearchResult, run, total_logprobs
from gristmill.engine.search.model import NextTokenModel
from gristmill.engine.search.prune import best
from gristmill.errors import RequestError


def stochastic_beam_search(
    model: NextTokenModel, prompt_ids: Sequence[int], width: int, max_tokens: int, *, seed: int
) -> list[SearchResult]:
    """`width` different outputs, drawn without replacement from the model's distribution over outputs.

    Their order is that of the draw; `score` is the perturbed log-probability. Outputs cut at `max_tokens` are leaves as
    others. Fewer are returned where fewer have a probability above 0.
    """
    if width < 1:
        raise RequestError(f"width must be at least 1, got {width}", field="width")
    search = Search(
        prompt_ids=prompt_ids,
        prune=_best_leaves(width),
        max_tokens=max_tokens,
        end_ids=model.end_ids,
        objective=perturbed(torch.Generator().manual_seed(seed)),
        keep=width,
    )
    run(model, [search])
    return search.results()


def perturbed(generator: torch.Generator) -> Objective:
    """Each candidate's perturbed log-probability, given its parent's; the root's is 0."""

    def score(search: Search) -> Tensor:
        logprobs = total_logprobs(search).cpu()
        uniform = torch.rand(logprobs.shape, generator=generator, dtype=torch.float64).clamp_min(1e-300)
        free = logprobs - torch.log(-torch.log(uniform))
        return _with_maximum(free, free.new_tensor([[path.score] for path in search.paths]))

    return score


def _with_maximum(values: Tensor, maximum: Tensor) -> Tensor:
    """Gumbel variables (paths, vocab) under the condition that each row's maximum is `maximum` (paths, 1).

    -log(exp(-maximum) - exp(-row's own maximum) + exp(-value)), in the form that does not overflow.
    """
    top = values.max(dim=-1, keepdim=True).values
    v = maximum - values + torch.log(-torch.expm1(values - top))
    shifted = maximum - v.clamp_min(0) - torch.log1p(torch.exp(-v.abs()))
    return torch.where(values == -math.inf, -math.inf, shifted)


def _best_leaves(width: int) -> Prune:
    """Candidates among the `width` best of themselves and the finished outputs, which keep their places."""

    def prune(search: Search, scores: Tensor) -> list[Choice]:
        choices = best(scores, width)
        places = sorted([choice.score for choice in choices] + [found.score for found in search.finished], reverse=True)
        least = places[width - 1] if len(places) > width else -math.inf
        return [choice for choice in choices if choice.score >= least]

    return prune

"""Penalised objectives: log Pr(y|x) - weight * penalty(x, y), for any search of the one driver.

The penalty is taken from the log-probability. Taken from the probability itself, as some texts print it, it would rule
alone: whole outputs have probabilities like exp(-20). An infinite penalty is a hard constraint, a finite one a soft
one.

Source: Xiao and Zhu 2025, eq. 5.33, corrected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gristmill.engine.search.driver import Objective, Search, total_logprobs
from gristmill.errors import RequestError

Penalty = Callable[[Sequence[int], Sequence[int]], Tensor]
"""Penalties of the output with each token of the vocabulary added, (vocab,), from the prompt and the output so far."""


def penalised_score(logprob: float, penalty: float, weight: float) -> float:
    """log Pr(y|x) - weight * penalty; a weight of 0 leaves the log-probability, whatever the penalty."""
    return logprob - weight * penalty if weight else logprob


def penalised(penalty: Penalty, weight: float) -> Objective:
    """The objective that ranks every candidate by its log-probability less `weight` times its whole penalty.

    Raises RequestError for a negative or infinite weight.
    """
    if not 0 <= weight < math.inf:
        raise RequestError(f"the weight of a penalty must be finite and not negative, got {weight}", field="weight")

    def score(search: Search) -> Tensor:
        scores = total_logprobs(search)
        if weight:
            rows = [penalty(search.prompt_ids, path.hypothesis.token_ids) for path in search.paths]
            scores = scores - weight * torch.stack(rows).to(scores)
        return scores

    return score


def of_each_token(penalty: Callable[[Sequence[int], Sequence[int]], float], vocab_size: int) -> Penalty:
    """A `Penalty` from one of whole outputs, called once for every token: for small vocabularies."""

    def rows(prompt_ids: Sequence[int], output_ids: Sequence[int]) -> Tensor:
        values = [penalty(prompt_ids, [*output_ids, token]) for token in range(vocab_size)]
        return torch.tensor(values, dtype=torch.float64)

    return rows


def repetitions(vocab_size: int) -> Penalty:
    """Tokens of the output that were in it before: each further occurrence counts 1."""

    def rows(prompt_ids: Sequence[int], output_ids: Sequence[int]) -> Tensor:
        seen = torch.zeros(vocab_size, dtype=torch.float64)
        seen[list(set(output_ids))] = 1
        return seen + (len(output_ids) - len(set(output_ids)))

    return rows


def occurrences(phrases: Sequence[Sequence[int]], vocab_size: int) -> Penalty:
    """How often phrases, as token ids, occur in the output: unwanted words, wrong terms."""

    def rows(prompt_ids: Sequence[int], output_ids: Sequence[int]) -> Tensor:
        counts = torch.full((vocab_size,), float(_count(output_ids, phrases)), dtype=torch.float64)
        for phrase in phrases:
            begun = len(phrase) - 1
            if tuple(output_ids[len(output_ids) - begun :]) == tuple(phrase[:-1]):
                counts[phrase[-1]] += 1
        return counts

    return rows


def only(allowed: Callable[[Sequence[int]], Sequence[int]], objective: Objective) -> Objective:
    """The hard constraint: after an output only the tokens `allowed(output_ids)` are possible.

    Scores are not renormalised, so allowed tokens keep their ratios and outputs their log-probabilities.
    """

    def score(search: Search) -> Tensor:
        scores = objective(search)
        masked = torch.full_like(scores, -math.inf)
        for row, path in enumerate(search.paths):
            tokens = list(allowed(path.hypothesis.token_ids))
            masked[row, tokens] = scores[row, tokens]
        return masked

    return score


def _count(ids: Sequence[int], phrases: Sequence[Sequence[int]]) -> int:
    return sum(
        tuple(ids[start : start + len(phrase)]) == tuple(phrase)
        for phrase in phrases
        for start in range(len(ids) - len(phrase) + 1)
    )

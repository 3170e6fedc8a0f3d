"""Diverse beam search: groups of paths, each pushed away from what earlier groups chose at the same step.

Source: Vijayakumar et al. 2018, with Hamming diversity; the penalty stays in the accumulated score, as in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gristmill.engine.search.driver import Objective, Search, log_probability


def away_from_earlier_groups(
    earlier: Sequence[Search], penalty: float, objective: Objective = log_probability
) -> Objective:
    """`objective` less `penalty` for each path of the `earlier` groups that a token was chosen for in this step.

    The groups' searches must be run in their order. Those in `earlier` at the time of the call count.
    """
    before = list(earlier)

    def score(search: Search) -> Tensor:
        scores = objective(search)
        chosen = torch.tensor([token for group in before for token in group.latest], dtype=torch.long)
        counts = torch.bincount(chosen, minlength=scores.shape[-1])
        return scores - penalty * counts.to(scores)

    return score

"""Contrastive decoding: what a large model likes more than a small one does, among what the large finds plausible.

    score(v) = log Pr_expert(v) - log Pr_amateur(v)   where Pr_expert(v) >= plausibility * max Pr_expert, else -inf

Two models are made into one `NextTokenModel`, whose log-probabilities are the expert's; `contrast` is the objective for
any search over it: greedy, beam or sampling.

Source: Li et al. 2023.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gristmill.engine.search.driver import Objective, Search
from gristmill.engine.search.model import Hypothesis, NextTokenModel
from gristmill.errors import RequestError


def contrastive_logits(expert: Tensor, amateur: Tensor, plausibility: float) -> Tensor:
    """Scores (..., vocab) from both models' log-probabilities (..., vocab)."""
    least = expert.max(dim=-1, keepdim=True).values + math.log(plausibility)
    return torch.where(expert >= least, expert - amateur, -math.inf)


@dataclass(frozen=True, eq=False)
class PairHypothesis:
    """The same output as both models see it."""

    expert: Hypothesis
    amateur: Hypothesis

    @property
    def token_ids(self) -> Sequence[int]:
        """See `Hypothesis`."""
        return self.expert.token_ids

    @property
    def logprobs(self) -> Tensor:
        """The expert's."""
        return self.expert.logprobs

    @property
    def hidden(self) -> Tensor | None:
        """The expert's."""
        return self.expert.hidden


class ContrastivePair:
    """Two models over one vocabulary as one `NextTokenModel`. Raises RequestError when their vocabularies differ."""

    def __init__(self, expert: NextTokenModel, amateur: NextTokenModel) -> None:
        if expert.vocab_size != amateur.vocab_size:
            raise RequestError(
                f"the models have vocabularies of {expert.vocab_size} and {amateur.vocab_size} tokens; contrastive "
                "decoding needs one tokenizer for both",
                field="amateur",
            )
        self.expert, self.amateur = expert, amateur
        self.vocab_size, self.end_ids = expert.vocab_size, expert.end_ids

    def start(self, prompt_ids: Sequence[int]) -> PairHypothesis:
        """See `NextTokenModel.start`."""
        expert = self.expert.start(prompt_ids)
        try:
            return PairHypothesis(expert, self.amateur.start(prompt_ids))
        except BaseException:
            self.expert.free([expert])
            raise

    def extend(self, choices: Sequence[tuple[Hypothesis, int]]) -> list[Hypothesis]:
        """See `NextTokenModel.extend`; one forward of each model."""
        pairs = [(_pair(parent), token) for parent, token in choices]
        experts = self.expert.extend([(pair.expert, token) for pair, token in pairs])
        try:
            amateurs = self.amateur.extend([(pair.amateur, token) for pair, token in pairs])
        except BaseException:
            self.expert.free(experts)
            raise
        return [PairHypothesis(*both) for both in zip(experts, amateurs, strict=True)]

    def free(self, hypotheses: Iterable[Hypothesis]) -> None:
        """See `NextTokenModel.free`."""
        pairs = [_pair(hypothesis) for hypothesis in hypotheses]
        self.expert.free([pair.expert for pair in pairs])
        self.amateur.free([pair.amateur for pair in pairs])


def contrast(plausibility: float = 0.1) -> Objective:
    """Accumulated contrastive score, for searches over a `ContrastivePair`.

    A plausibility of 1 leaves only the expert's most probable token. Raises RequestError outside (0, 1].
    """
    if not 0 < plausibility <= 1:
        raise RequestError(f"plausibility must be above 0 and at most 1, got {plausibility}", field="plausibility")

    def score(search: Search) -> Tensor:
        pairs = [_pair(path.hypothesis) for path in search.paths]
        expert = torch.stack([pair.expert.logprobs for pair in pairs]).double()
        amateur = torch.stack([pair.amateur.logprobs for pair in pairs]).to(expert)
        return expert.new_tensor([[path.score] for path in search.paths]) + contrastive_logits(
            expert, amateur, plausibility
        )

    return score


def _pair(hypothesis: Hypothesis) -> PairHypothesis:
    if not isinstance(hypothesis, PairHypothesis):
        raise TypeError("contrastive decoding searches over a ContrastivePair")
    return hypothesis

"""Beam search: the best few outputs of all parents together go on, and finished ones are set aside.

At each step the expansions of all open paths are ranked by their accumulated scores. Taking the best tokens of each
parent alone, as some texts print it, either lets the beam grow without bound or never compares the parents.

Source: Xiao and Zhu 2025, section 5.1.3.2, corrected; stopping and normalisation as in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gristmill.engine.search.diverse_beam import away_from_earlier_groups
from gristmill.engine.search.driver import Normalise, Objective, Search, SearchResult, log_probability, run
from gristmill.engine.search.lexical_beam import check_phrases, lexical
from gristmill.engine.search.model import NextTokenModel
from gristmill.engine.search.prune import beam
from gristmill.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """How to search after one prompt. Raises RequestError, naming the field, for a value out of range."""

    width: int = 4
    """Paths that are open at once; over all groups."""
    max_tokens: int = 16
    """Most tokens of an output, its end token included."""
    n: int = 1
    """Outputs to return, at most `width`."""
    length_penalty: float = 1.0
    """alpha: finished scores are divided by length ** alpha, so above 0 favours longer outputs; 0 is the plain sum."""
    normalisation: Literal["length", "gnmt"] = "length"
    """What is raised to alpha: the number of tokens, or (5 + tokens) / 6."""
    early_stopping: bool | Literal["never"] = False
    """When `stop_after` outputs are finished: True ends; False ends once no open path beats the worst of them at its
    present length; "never" once none can at any length."""
    stop_after: int | None = None
    """Finished outputs that are enough; None for `width` (for each group its share)."""
    groups: int = 1
    """Groups of `width / groups` paths; each avoids the tokens that earlier ones chose at the same step."""
    diversity_penalty: float = 0.0
    """Taken from a token's score for each path of earlier groups that chose it."""
    required: Sequence[Sequence[int]] = ()
    """Phrases, as token ids, that every output holds."""
    ignore_eos: bool = False
    """The model's end tokens are tokens as others."""

    def __post_init__(self) -> None:
        def need(name: str, fine: bool, what: str) -> None:
            if not fine:
                raise RequestError(f"{name} must be {what}, got {getattr(self, name)!r}", field=name)

        for name in ("width", "max_tokens", "n", "groups"):
            value = getattr(self, name)
            need(name, isinstance(value, int) and not isinstance(value, bool) and value >= 1, "a whole number above 0")
        need("n", self.n <= self.width, f"at most the width of {self.width}")
        need("groups", self.width % self.groups == 0, f"a divisor of the width of {self.width}")
        need("length_penalty", math.isfinite(self.length_penalty), "finite")
        need("normalisation", self.normalisation in ("length", "gnmt"), '"length" or "gnmt"')
        need("early_stopping", self.early_stopping in (True, False, "never"), 'True, False or "never"')
        most = self.width // self.groups
        need("stop_after", self.stop_after is None or 1 <= self.stop_after <= most, f"1 to {most}")
        need("diversity_penalty", 0 <= self.diversity_penalty < math.inf, "0 or more")
        need("diversity_penalty", self.groups > 1 or not self.diversity_penalty, "0 without groups")
        need("required", all(len(phrase) > 0 for phrase in self.required), "without empty phrases")
        need("required", self.groups == 1 or not self.required, "empty with groups")
        needed = sum(len(phrase) for phrase in self.required)
        need("required", needed <= self.max_tokens, f"no longer than max_tokens ({self.max_tokens}) together")

    @property
    def normalise(self) -> Normalise:
        """Score of a finished output from its accumulated one."""
        return length_normalised(self.length_penalty) if self.normalisation == "length" else gnmt(self.length_penalty)


def length_normalised(alpha: float) -> Normalise:
    """score / length ** alpha, where length counts generated tokens with the end token. Source: transformers, vLLM."""
    return lambda score, length: score / length**alpha


def gnmt(alpha: float) -> Normalise:
    """score / ((5 + length) / 6) ** alpha. Source: Wu et al. 2016, eq. 14."""
    return lambda score, length: score / ((5 + length) / 6) ** alpha


def beam_search(
    model: NextTokenModel,
    prompt_ids: Sequence[int],
    params: BeamSearchParams,
    *,
    objective: Objective = log_probability,
) -> list[SearchResult]:
    """The n best outputs after a prompt, best first; fewer where fewer have a probability above 0.

    Raises RequestError for a required phrase with a token that ends outputs or is none of the model's, and what the
    model raises for the prompt or for want of memory.
    """
    return beam_search_batch(model, [prompt_ids], params, objective=objective)[0]


def beam_search_batch(
    model: NextTokenModel,
    prompts: Sequence[Sequence[int]],
    params: BeamSearchParams,
    *,
    objective: Objective = log_probability,
) -> list[list[SearchResult]]:
    """`beam_search` for several prompts, whose paths share their forwards; the results are those of each alone."""
    all_groups = [_searches(model, prompt, params, objective) for prompt in prompts]
    run(model, [search for groups in all_groups for search in groups])
    results = []
    for groups in all_groups:
        found = [result for group, search in enumerate(groups) for result in search.results(group=group)]
        results.append(sorted(found, key=lambda result: -result.score)[: params.n])
    return results


def _searches(
    model: NextTokenModel, prompt_ids: Sequence[int], params: BeamSearchParams, objective: Objective
) -> list[Search]:
    """One search for each group; each sees those before it."""
    searches: list[Search] = []
    width = params.width // params.groups
    end_ids: frozenset[int] = frozenset() if params.ignore_eos else model.end_ids
    check_phrases(params.required, model.vocab_size, end_ids)
    for _ in range(params.groups):
        away = away_from_earlier_groups(searches, params.diversity_penalty, objective)
        searches.append(
            Search(
                prompt_ids=prompt_ids,
                prune=lexical(width, params.required) if params.required else beam(width),
                max_tokens=params.max_tokens,
                end_ids=end_ids,
                objective=away if searches and params.diversity_penalty else objective,
                normalise=params.normalise,
                enough=lambda search: _enough(search, params),
                keep=width,
            )
        )
    return searches


def _enough(search: Search, params: BeamSearchParams) -> bool:
    """True when enough outputs are finished and, as `early_stopping` tells, no better one is to come."""
    enough = params.stop_after or params.width // params.groups
    if len(search.finished) < enough:
        return False
    if params.early_stopping is True or not search.paths:
        return True
    # accumulated scores only fall, so a positive penalty makes the longest output the one with the highest bound
    at_best = params.early_stopping == "never" and params.length_penalty > 0
    length = params.max_tokens if at_best else search.length
    bound = params.normalise(max(path.score for path in search.paths), length)
    return bound <= search.finished[enough - 1].score

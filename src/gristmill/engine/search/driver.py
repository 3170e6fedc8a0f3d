"""The one driver of every left-to-right search: expand all open paths, prune, set the finished aside, repeat.

    Y[i] = prune(Y[i-1] x vocabulary)

A method is its objective (what a candidate scores) and its prune (which candidates stay). Top-1 is greedy, top-K of
all parents together is beam search, one draw is sampling, and no pruning at all is exhaustive search. The score that
a path has accumulated is never computed again: a child's is its parent's and what the new token adds.

Source: Xiao and Zhu 2025, eq. 5.15-5.18; the candidates of all parents are ranked together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gristmill.core import FinishReason
from gristmill.engine.search.model import Hypothesis, NextTokenModel
from gristmill.errors import RequestError


@dataclass(frozen=True, eq=False)
class Path:
    """An open path from the root: an output that may still grow."""

    hypothesis: Hypothesis
    logprob: float
    """Of the whole output given the prompt, in nats."""
    score: float
    """What the search ranks by: the log-probability, unless its objective is another one."""


@dataclass(frozen=True)
class Choice:
    """A candidate that stays: a token after the path of number `row`, and the score of both together."""

    row: int
    token: int
    score: float


@dataclass(frozen=True)
class SearchCost:
    """What a search took: forwards it had a part in, nodes whose next token was computed, candidates kept per level."""

    forwards: int
    expanded: int
    levels: tuple[int, ...]


@dataclass(frozen=True)
class SearchResult:
    """One output of a search, its end token included.

    `finish_reason` is "stop" for a complete output and "length" for one that was cut at the limit, which is outside
    the space of complete outputs but returned all the same.
    """

    token_ids: list[int]
    logprob: float
    """Of the output given the prompt, by the model alone, in nats."""
    score: float
    """What the results are ranked by: the objective, normalised by length."""
    finish_reason: FinishReason
    cost: SearchCost
    group: int = 0
    """Which group of a diverse beam search found it."""


@dataclass(frozen=True)
class Finished:
    """An output set aside, with its score normalised."""

    token_ids: list[int]
    logprob: float
    score: float
    finish_reason: FinishReason


Objective = Callable[["Search"], Tensor]
"""Scores of all candidates, float64 (paths, vocab); -inf for one that cannot be."""
Prune = Callable[["Search", Tensor], list[Choice]]
"""The candidates that stay, best first."""
Normalise = Callable[[float, int], float]
"""A finished output's score, from the accumulated one and the number of its tokens."""


def next_logprobs(search: Search) -> Tensor:
    """Log-probabilities of the next token after each open path, float64 (paths, vocab)."""
    return torch.stack([path.hypothesis.logprobs for path in search.paths]).double()


def total_logprobs(search: Search) -> Tensor:
    """Log-probabilities of all candidates as whole outputs, float64 (paths, vocab)."""
    logprobs = next_logprobs(search)
    return logprobs.new_tensor([[path.logprob] for path in search.paths]) + logprobs


def log_probability(search: Search) -> Tensor:
    """The plain objective: what the path has scored so far and the log-probability of the token."""
    logprobs = next_logprobs(search)
    return logprobs.new_tensor([[path.score] for path in search.paths]) + logprobs


def unnormalised(score: float, length: int) -> float:
    """The score as it is."""
    return score


def to_the_end(search: Search) -> bool:
    """Go on until no path is open."""
    return False


@dataclass(eq=False, kw_only=True)
class Search:
    """A search after one prompt: its rules, its open paths, and what it found.

    keep: how many finished outputs stay, the best ones; None keeps all.
    enough: asked after each step; True ends the search, its open paths are dropped.
    """

    prompt_ids: Sequence[int]
    prune: Prune
    max_tokens: int
    end_ids: frozenset[int]
    objective: Objective = log_probability
    normalise: Normalise = unnormalised
    enough: Callable[[Search], bool] = to_the_end
    keep: int | None = None

    paths: list[Path] = field(default_factory=list, init=False)
    finished: list[Finished] = field(default_factory=list, init=False)
    length: int = field(default=0, init=False)
    """Tokens of each open path."""
    latest: list[int] = field(default_factory=list, init=False)
    """Tokens chosen in this step, without those that end an output."""
    forwards: int = field(default=0, init=False)
    expanded: int = field(default=0, init=False)
    levels: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, got {self.max_tokens}", field="max_tokens")

    @property
    def is_last_step(self) -> bool:
        """True when the tokens about to be chosen are the last ones allowed, so that every candidate ends."""
        return self.length + 1 == self.max_tokens

    def open(self, paths: list[Path]) -> None:
        """Go on from these paths, whose next-token distributions one forward has computed."""
        self.forwards += 1
        self.expanded += len(paths)
        self.paths = paths

    def step(self) -> list[tuple[Path, int]]:
        """Choose candidates, set aside those that end, and return the others: paths that still have their parents'
        hypotheses, each with the token that extends it. They are open again once `open` has the extended ones."""
        choices = self.prune(self, self.objective(self))
        self.levels.append(len(choices))
        last, growing = self.is_last_step, []
        for choice in choices:
            parent = self.paths[choice.row]
            logprob = parent.logprob + float(parent.hypothesis.logprobs[choice.token])
            if choice.token in self.end_ids or last:
                reason: FinishReason = "stop" if choice.token in self.end_ids else "length"
                ids = [*parent.hypothesis.token_ids, choice.token]
                self.finished.append(Finished(ids, logprob, self.normalise(choice.score, len(ids)), reason))
            else:
                growing.append((Path(parent.hypothesis, logprob, choice.score), choice.token))
        self.finished.sort(key=lambda found: -found.score)
        if self.keep is not None:
            del self.finished[self.keep :]
        self.length += 1
        self.paths = [path for path, _ in growing]
        if self.enough(self):
            growing, self.paths = [], []
        self.latest = [choice.token for choice in choices if choice.token not in self.end_ids]
        return growing

    def results(self, n: int | None = None, *, group: int = 0) -> list[SearchResult]:
        """The n best outputs found, all when None; best first."""
        cost = SearchCost(self.forwards, self.expanded, tuple(self.levels))
        return [
            SearchResult(found.token_ids, found.logprob, found.score, found.finish_reason, cost, group)
            for found in self.finished[:n]
        ]


@torch.inference_mode()
def run(model: NextTokenModel, searches: Sequence[Search]) -> None:
    """Run searches to their end, all in the same forwards; each then holds what it found.

    Searches after the same prompt share its root, and equal paths of theirs are computed once. Every hypothesis is
    freed, also when something is raised.
    """
    roots: dict[tuple[int, ...], Hypothesis] = {}
    live: list[Hypothesis] = []
    try:
        for search in searches:
            prompt = tuple(search.prompt_ids)
            if prompt not in roots:
                roots[prompt] = model.start(prompt)
                live.append(roots[prompt])
            search.open([Path(roots[prompt], 0.0, 0.0)])
        while any(search.paths for search in searches):
            for search in searches:
                search.latest = []
            grown = [(search, search.step()) for search in searches if search.paths]
            pairs = {(id(path.hypothesis), token): (path.hypothesis, token) for _, new in grown for path, token in new}
            # until here `live` are the parents; they are freed once their children hold what they share
            children = model.extend(list(pairs.values())) if pairs else []
            parents, live = live, children
            made = dict(zip(pairs, children, strict=True))
            for search, new in grown:
                if new:
                    search.open([replace(path, hypothesis=made[id(path.hypothesis), token]) for path, token in new])
            model.free(parents)
    finally:
        model.free(live)

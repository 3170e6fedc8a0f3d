"""Exhaustive search: every output up to a length, the oracle by which other searches are judged.

Its size grows exponentially with length: (vocab - 1) ** (i - 1) complete outputs of i tokens with one end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gristmill.engine.search.beam import BeamSearchParams, beam_search
from gristmill.engine.search.driver import Objective, Search, SearchCost, SearchResult, log_probability, run
from gristmill.engine.search.model import NextTokenModel
from gristmill.engine.search.prune import everything
from gristmill.errors import RequestError

MOST_NODES = 200_000


def exhaustive_search(
    model: NextTokenModel,
    prompt_ids: Sequence[int],
    max_tokens: int,
    *,
    objective: Objective = log_probability,
    complete_only: bool = True,
) -> list[SearchResult]:
    """All outputs of non-zero probability, best first.

    Those cut at `max_tokens` (finish reason "length") are no members of the space of complete outputs: they are
    returned only without `complete_only`. Raises RequestError for a tree of more than MOST_NODES nodes.
    """
    growing, nodes = model.vocab_size - len(model.end_ids), 0
    for level in range(max_tokens):
        nodes += growing**level * model.vocab_size
        if nodes > MOST_NODES:
            raise RequestError(
                f"a tree of {model.vocab_size} tokens and depth {max_tokens} has more than {MOST_NODES} nodes: "
                "lower max_tokens, or use beam_search",
                field="max_tokens",
            )
    search = Search(
        prompt_ids=prompt_ids,
        prune=everything,
        max_tokens=max_tokens,
        end_ids=model.end_ids,
        objective=objective,
    )
    run(model, [search])
    return [found for found in search.results() if found.finish_reason == "stop" or not complete_only]


@dataclass(frozen=True)
class SearchError:
    """How far a beam of some width stays below the optimum, and what it took."""

    width: int
    logprob: float | None
    """Of the best complete output found; None when none was."""
    optimum: float
    cost: SearchCost

    @property
    def found_optimum(self) -> bool:
        """True when no output is better than the one found."""
        return self.logprob is not None and self.logprob >= self.optimum - 1e-9


def search_errors(
    model: NextTokenModel, prompt_ids: Sequence[int], max_tokens: int, widths: Sequence[int]
) -> list[SearchError]:
    """Beam search of several widths, by plain log-probability, against the exhaustive optimum.

    Raises RequestError for a tree too large to search, or one without complete outputs.
    """
    complete = exhaustive_search(model, prompt_ids, max_tokens)
    if not complete:
        raise RequestError(f"no output is complete within {max_tokens} tokens", field="max_tokens")
    errors = []
    for width in widths:
        params = BeamSearchParams(
            width=width, n=width, max_tokens=max_tokens, length_penalty=0.0, early_stopping="never"
        )
        found = beam_search(model, prompt_ids, params)
        logprobs = [result.logprob for result in found if result.finish_reason == "stop"]
        errors.append(SearchError(width, max(logprobs, default=None), complete[0].logprob, found[0].cost))
    return errors

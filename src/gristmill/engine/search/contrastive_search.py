"""Contrastive search: probable tokens that do not look, in the model's own states, like what already stands.

At each step the k most probable tokens are tried in one forward, and the one is taken that has the highest

    (1 - alpha) * Pr(v | x, y) - alpha * max over earlier tokens j of cos(h_v, h_j)

The penalty is the largest similarity (not distance, as some texts print it): near copies of earlier states are
degeneration. Earlier tokens are those of the prompt and of the output.

Source: Su et al. 2022, eq. 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gristmill.core import FinishReason
from gristmill.engine.search.driver import SearchCost, SearchResult
from gristmill.engine.search.model import Hypothesis, NextTokenModel
from gristmill.errors import RequestError


def contrastive_scores(probs: Tensor, similarities: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) * probs - alpha * similarities; all (candidates,), the largest cosine of each candidate."""
    return (1 - alpha) * probs - alpha * similarities


@torch.inference_mode()
def contrastive_search(
    model: NextTokenModel, prompt_ids: Sequence[int], max_tokens: int, *, alpha: float = 0.6, top_k: int = 4
) -> SearchResult:
    """One output; `score` is the sum of its tokens' contrastive scores. alpha = 0 or top_k = 1 is greedy search.

    Raises RequestError for alpha outside [0, 1], top_k or max_tokens below 1, or a model that gives no hidden states.
    """
    if not 0 <= alpha <= 1:
        raise RequestError(f"alpha must be in [0, 1], got {alpha}", field="alpha")
    for name, value in (("top_k", top_k), ("max_tokens", max_tokens)):
        if value < 1:
            raise RequestError(f"{name} must be at least 1, got {value}", field=name)
    live: list[Hypothesis] = [current := model.start(prompt_ids)]
    try:
        context = _states(current)
        logprob = score = 0.0
        levels: list[int] = []
        while True:
            logprobs, tokens = current.logprobs.topk(min(top_k, model.vocab_size))
            tokens = tokens[logprobs > -math.inf]
            children = model.extend([(current, token) for token in tokens.tolist()])
            live += children
            states = torch.cat([_states(child) for child in children])
            scores = contrastive_scores(logprobs[: len(tokens)].exp(), (states @ context.T).amax(dim=1), alpha)
            pick = int(scores.argmax())
            logprob, score = logprob + float(logprobs[pick]), score + float(scores[pick])
            model.free([h for h in live if h is not children[pick]])
            live = [current := children[pick]]
            context = torch.cat([context, states[pick : pick + 1]])
            levels.append(len(children))
            ended = current.token_ids[-1] in model.end_ids
            if ended or len(levels) == max_tokens:
                reason: FinishReason = "stop" if ended else "length"
                cost = SearchCost(len(levels) + 1, sum(levels) + 1, tuple(levels))
                return SearchResult(list(current.token_ids), logprob, score, reason, cost)
    finally:
        model.free(live)


def _states(hypothesis: Hypothesis) -> Tensor:
    """Unit vectors of the tokens a hypothesis added, (tokens, hidden)."""
    if hypothesis.hidden is None:
        raise RequestError("contrastive search needs a model that gives hidden states", field="model")
    return normalize(hypothesis.hidden.float(), dim=-1)

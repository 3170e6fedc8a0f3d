"""How hard a request is, from 0 to 1: by what its text looks like, or by how sure a small model is of its answer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from gristmill.core import CompletionOutput, Logprob
from gristmill.errors import RequestError

_LONG = 400
"""Words from which on length counts in full."""
_MARKS = (
    # share of difficulty, and what shows it
    (0.5, re.compile(r"```|\bdef |\bclass |\breturn\b|#include|\bSELECT\b|[;{}]\s*$|\w\(\w*\)", re.MULTILINE)),
    (0.5, re.compile(r"\d{3,}|\d\s*[-+*/^×÷]\s*\d|[=<>]\s*-?\d|\\[a-z]{3,}|[∑∫√≤≥∀∃]|\b[a-z]\^\d")),
    (
        0.5,
        re.compile(
            r"\b(why|prove|derive|explain how|compare|design|implement|debug|optimi[sz]e|refactor|analy[sz]e|"
            r"step[- ]by[- ]step|trade-?offs?|what if|plan)\b|为什么|证明|推导|比较|设计|分析|逐步",
            re.IGNORECASE,
        ),
    ),
)
_PART = re.compile(r"\?|？|^\s*(?:\d+[.)]|[-*])\s", re.MULTILINE)


def surface_difficulty(text: str) -> float:
    """Difficulty by length, code, mathematics, words that ask for reasoning, and the number of questions.

    Each mark leaves a share of the ease (a noisy or), so more of anything is never easier. The shares are set by hand:
    measure them on requests of your own before you rely on them.
    """
    ease = 1 - 0.6 * min(1.0, len(text.split()) / _LONG)
    for share, mark in _MARKS:
        if mark.search(text):
            ease *= 1 - share
    parts = len(_PART.findall(text))
    return 1 - ease * 0.85 ** max(0, parts - 1)


def mean_doubt(answer: CompletionOutput) -> float:
    """1 minus the geometric mean of the probabilities of the answer's tokens. Needs log-probabilities, else raises
    RequestError.

    Source: Gupta et al. 2024 (Language Model Cascades: Token-Level Uncertainty and Beyond), the averaged Chow score.
    """
    logprobs = [entry[token].logprob for entry, token in zip(_entries(answer), answer.token_ids, strict=True)]
    return 1 - math.exp(sum(logprobs) / len(logprobs)) if logprobs else 1.0


def first_margin(answer: CompletionOutput) -> float:
    """1 minus the lead of the most probable first token over the second. Needs two log-probabilities a token, else
    raises RequestError."""
    entries = _entries(answer)
    if not entries:
        return 1.0
    best = sorted((math.exp(place.logprob) for place in entries[0].values()), reverse=True)
    if len(best) < 2:
        raise RequestError("the margin of the first token needs logprobs=2", field="logprobs")
    return 1 - (best[0] - best[1])


def _entries(answer: CompletionOutput) -> Sequence[dict[int, Logprob]]:
    if answer.logprobs is None:
        raise RequestError("an answer's confidence needs its log-probabilities: ask for logprobs", field="logprobs")
    return answer.logprobs

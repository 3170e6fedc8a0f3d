"""Which tokens may be drawn: temperature and the filters, as pure functions on logits (..., vocab).

Order: temperature (unless it is last), top-n-sigma, top-k, top-p, min-p, typical, epsilon, eta: that of transformers.
This is the plain version; truncation.py does the same for a batch without sorting the vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gristmill.core import SamplingParams

_NEGATIVE_INFINITY = float("-inf")


def top_n_sigma_filter(logits: Tensor, sigmas: float) -> Tensor:
    """Keep logits within so many standard deviations (over the tokens not banned) below the highest.

    Source: Tang et al. 2024, top-n-sigma.
    """
    banned = logits == _NEGATIVE_INFINITY
    count = (~banned).sum(-1, keepdim=True)
    mean = logits.masked_fill(banned, 0.0).sum(-1, keepdim=True) / count
    deviation = ((logits - mean).masked_fill(banned, 0.0).square().sum(-1, keepdim=True) / count).sqrt()
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) - sigmas * deviation, _NEGATIVE_INFINITY)


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits, and any that tie with the k-th. Source: Fan et al. 2018."""
    if k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[..., -1:], _NEGATIVE_INFINITY)


def top_p_filter(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most probable tokens whose probability reaches p; of equal ones the first.

    Source: Holtzman et al. 2020.
    """
    ordered, ids = logits.sort(descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    # a token is dropped when those before it reach p already; so the first is always kept
    dropped = probabilities.cumsum(dim=-1) - probabilities >= p
    return logits.scatter(-1, ids, ordered.masked_fill(dropped, _NEGATIVE_INFINITY))


def min_p_filter(logits: Tensor, min_p: float) -> Tensor:
    """Drop tokens less probable than min_p times the most probable one. Source: Nguyen et al. 2024."""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), _NEGATIVE_INFINITY)


def typical_filter(logits: Tensor, mass: float) -> Tensor:
    """Keep the tokens whose surprise is nearest to the entropy until their probability reaches `mass`.

    Source: Meister et al. 2023, locally typical sampling.
    """
    logprobs = logits.log_softmax(dim=-1)
    distance = (-logprobs - _entropy(logprobs)).abs()
    ordered, ids = distance.sort(stable=True)
    reached = (logprobs.exp().gather(-1, ids).cumsum(-1) < mass).sum(-1, keepdim=True)
    limit = ordered.gather(-1, reached.clamp(max=logits.shape[-1] - 1))
    return logits.masked_fill(distance > limit, _NEGATIVE_INFINITY)


def epsilon_filter(logits: Tensor, epsilon: float) -> Tensor:
    """Drop tokens less probable than `epsilon`, never the most probable. Source: Hewitt et al. 2022, section 4.2."""
    return _at_least(logits, torch.full_like(logits[..., :1], epsilon))


def eta_filter(logits: Tensor, epsilon: float) -> Tensor:
    """Drop tokens below min(epsilon, sqrt(epsilon) * exp(-entropy)), never the most probable.

    Source: Hewitt et al. 2022, section 4.3.
    """
    entropy = _entropy(logits.log_softmax(dim=-1))
    return _at_least(logits, (math.sqrt(epsilon) * (-entropy).exp()).clamp(max=epsilon))


def _entropy(logprobs: Tensor) -> Tensor:
    """In nats, (..., 1); impossible tokens add nothing."""
    return -(logprobs * logprobs.exp()).nansum(-1, keepdim=True)


def _at_least(logits: Tensor, chance: Tensor) -> Tensor:
    dropped = (logits.softmax(dim=-1) < chance) & (logits < logits.amax(-1, keepdim=True))
    return logits.masked_fill(dropped, _NEGATIVE_INFINITY)


def filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """Temperature and filters on logits (..., vocab): softmax of the result is what a token is drawn from.

    The highest becomes 0 first, so that a temperature near 0 gives the most probable token and not infinities.
    """
    heat = min(max(params.temperature, torch.finfo(logits.dtype).tiny), 1e30)
    logits = logits - logits.amax(-1, keepdim=True)
    if not params.temperature_last:
        logits = logits / heat
    if params.top_n_sigma > 0:
        logits = top_n_sigma_filter(logits, params.top_n_sigma)
    if params.top_k > 0:
        logits = top_k_filter(logits, params.top_k)
    if params.top_p < 1:
        logits = top_p_filter(logits, params.top_p)
    if params.min_p > 0:
        logits = min_p_filter(logits, params.min_p)
    if params.typical_p < 1:
        logits = typical_filter(logits, params.typical_p)
    if params.epsilon_cutoff > 0:
        logits = epsilon_filter(logits, params.epsilon_cutoff)
    if params.eta_cutoff > 0:
        logits = eta_filter(logits, params.eta_cutoff)
    # typical sampling may have dropped the highest
    return (logits - logits.amax(-1, keepdim=True)) / heat if params.temperature_last else logits

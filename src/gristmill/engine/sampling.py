"""From next-token logits to a token: penalties, filters and the draw, one request at a time.

Order: repetition, presence and frequency penalties, logit bias, minimum length; then temperature, min-p, top-k, top-p.
Each step is a pure function of (logits, parameters, tokens so far).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gristmill.core import Logprob, SamplingParams
from gristmill.tokens.tokenizer import Tokenizer

_NEGATIVE_INFINITY = float("-inf")


def repetition_penalty(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of tokens already seen.

    Source: Keskar et al. 2019 (CTRL), section 4.1, in the sign-aware form of transformers and vLLM.
    """
    ids = torch.tensor(sorted(set(seen)), dtype=torch.long, device=logits.device)
    values = logits[ids]
    return logits.index_copy(0, ids, torch.where(values > 0, values / penalty, values * penalty))


def presence_frequency_penalty(logits: Tensor, output: Sequence[int], presence: float, frequency: float) -> Tensor:
    """logit - count * frequency - (count > 0) * presence, over the output tokens. Source: OpenAI API reference."""
    ids, counts = torch.tensor(list(output), dtype=torch.long, device=logits.device).unique(return_counts=True)
    return logits.index_add(0, ids, -(counts.to(logits.dtype) * frequency + presence))


def min_p_filter(logits: Tensor, min_p: float) -> Tensor:
    """Drop tokens less probable than min_p times the most probable one. Source: Nguyen et al. 2024."""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < min_p * probabilities.max(), _NEGATIVE_INFINITY)


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits, and any that tie with the k-th. Source: Fan et al. 2018."""
    if k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[-1], _NEGATIVE_INFINITY)


def top_p_filter(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most probable tokens whose probability reaches p. Source: Holtzman et al. 2020."""
    ordered, ids = logits.sort(descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    # a token is dropped when those before it reach p already; so the first is always kept
    dropped = probabilities.cumsum(dim=-1) - probabilities >= p
    return logits.scatter(0, ids, ordered.masked_fill(dropped, _NEGATIVE_INFINITY))


def needs_processing(params: SamplingParams, output_length: int) -> bool:
    """False when the logits may go to argmax as they are."""
    return (
        params.temperature > 0
        or params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or bool(params.logit_bias)
        or output_length < params.min_tokens
    )


def process_logits(
    logits: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], end_ids: Sequence[int]
) -> Tensor:
    """Penalties, minimum length and bias on logits (vocab,). `end_ids` are masked until `min_tokens` stand."""
    if params.repetition_penalty != 1.0:
        logits = repetition_penalty(logits, [*prompt, *output], params.repetition_penalty)
    if output and (params.presence_penalty or params.frequency_penalty):
        logits = presence_frequency_penalty(logits, output, params.presence_penalty, params.frequency_penalty)
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), dtype=torch.long, device=logits.device)
        bias = torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype, device=logits.device)
        logits = logits.index_add(0, ids, bias)
    if len(output) < params.min_tokens:
        ends = torch.tensor(list(end_ids), dtype=torch.long, device=logits.device)
        logits = logits.index_fill(0, ends, _NEGATIVE_INFINITY)
    return logits


def filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """Temperature, then min-p, top-k and top-p, on logits (vocab,). The highest becomes 0 first, so that a temperature
    near 0 gives the most probable token and not infinities."""
    logits = (logits - logits.max()) / max(params.temperature, torch.finfo(logits.dtype).tiny)
    if params.min_p > 0:
        logits = min_p_filter(logits, params.min_p)
    if params.top_k > 0:
        logits = top_k_filter(logits, params.top_k)
    if params.top_p < 1:
        logits = top_p_filter(logits, params.top_p)
    return logits


def draw(logits: Tensor, generator: torch.Generator) -> int:
    """One token from softmax(logits): the first of exponential clocks whose rates are the probabilities.

    The noise has the length of the vocabulary whatever the filters left, so a seed means the same draw for any filter.
    """
    noise = torch.empty(logits.shape, dtype=torch.float32).exponential_(generator=generator).to(logits.device)
    return int((logits.softmax(dim=-1) / noise).argmax())


def top_logprobs(logprobs: Tensor, chosen: Sequence[int], count: int, tokenizer: Tokenizer) -> list[dict[int, Logprob]]:
    """Per row of `logprobs` (rows, vocab): the chosen token first, then the `count` most probable, with ranks."""
    ids = torch.tensor(list(chosen), dtype=torch.long, device=logprobs.device)[:, None]
    values = logprobs.gather(1, ids)
    ranks = (logprobs > values).sum(dim=1) + 1
    best = logprobs.topk(min(count, logprobs.shape[1]), dim=1)
    rows: list[dict[int, Logprob]] = []
    for row, token in enumerate(chosen):
        entry = {
            token: Logprob(float(values[row]), int(ranks[row]), tokenizer.decode([token], skip_special_tokens=False))
        }
        for rank, (value, other) in enumerate(
            zip(best.values[row].tolist(), best.indices[row].tolist(), strict=True), start=1
        ):
            if other not in entry:
                entry[other] = Logprob(value, rank, tokenizer.decode([other], skip_special_tokens=False))
        rows.append(entry)
    return rows

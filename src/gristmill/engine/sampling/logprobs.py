"""Log-probabilities and ranks of chosen tokens, for the rows that ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gristmill.core import Logprob
from gristmill.tokens.tokenizer import Tokenizer

PIECE = 256
"""Rows of prompt logits that are held at once: those of 2048 tokens would take 400 MB for 49,152 tokens."""


def token_logprobs(logits: Tensor, chosen: Sequence[int]) -> Tensor:
    """Natural log-probability of one token of each row, shape (rows,), from logits (rows, vocab)."""
    ids = torch.tensor(list(chosen), dtype=torch.long, device=logits.device)[:, None]
    return logits.gather(1, ids)[:, 0] - logits.logsumexp(dim=-1)


def top_logprobs(logits: Tensor, chosen: Sequence[int], count: int, tokenizer: Tokenizer) -> list[dict[int, Logprob]]:
    """Per row of logits (rows, vocab): the chosen token first, then the `count` most probable, with their ranks.

    What the logits are is the caller's choice: the model's own, or those after all processors.
    """
    logprobs = logits.log_softmax(dim=-1)
    ids = torch.tensor(list(chosen), dtype=torch.long, device=logprobs.device)[:, None]
    values = logprobs.gather(1, ids)
    ranks = ((logprobs > values).sum(dim=1) + 1).tolist()
    best = logprobs.topk(min(count, logprobs.shape[1]), dim=1)
    rows: list[dict[int, Logprob]] = []
    for token, value, rank, top, others in zip(
        chosen, values[:, 0].tolist(), ranks, best.values.tolist(), best.indices.tolist(), strict=True
    ):
        # of equal ones the chosen token may not be in the list; then the list stands as it is
        entry = {token: Logprob(value, rank, tokenizer.decode([token], skip_special_tokens=False))}
        for place, (logprob, other) in enumerate(zip(top, others, strict=True), start=1):
            if other not in entry:
                entry[other] = Logprob(logprob, place, tokenizer.decode([other], skip_special_tokens=False))
        rows.append(entry)
    return rows


def prompt_logprobs(
    hidden: Tensor, logits_of: Callable[[Tensor], Tensor], chosen: Sequence[int], count: int, tokenizer: Tokenizer
) -> list[dict[int, Logprob]]:
    """`top_logprobs` of logits_of(hidden (rows, hidden)) in pieces, so that few logits are in memory at once."""
    rows: list[dict[int, Logprob]] = []
    for start in range(0, len(chosen), PIECE):
        piece = slice(start, min(start + PIECE, len(chosen)))
        rows += top_logprobs(logits_of(hidden[piece]).float(), chosen[piece], count, tokenizer)
    return rows

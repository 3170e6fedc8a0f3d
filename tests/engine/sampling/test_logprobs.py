"""Log-probabilities of chosen tokens, their ranks and neighbours, and the memory that a long prompt takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.helpers import tokenizer
from gristmill.engine.sampling import logprobs


def some_logits(rows: int, size: int = 20) -> Tensor:
    return 3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(0))


def test_the_chosen_token_comes_first_then_the_best_with_their_ranks() -> None:
    logits = some_logits(2)
    table, order = logits.log_softmax(-1), logits.argsort(dim=-1, descending=True).tolist()
    chosen = [order[0][7], order[1][1]]
    rows = logprobs.top_logprobs(logits, chosen, 3, tokenizer())
    assert list(rows[0]) == [order[0][7], *order[0][:3]]
    assert list(rows[1]) == [order[1][1], order[1][0], order[1][2]]
    for row, entry in enumerate(rows):
        for token, found in entry.items():
            assert found.logprob == pytest.approx(float(table[row, token]), abs=1e-6)
            assert found.rank == order[row].index(token) + 1
            assert found.decoded_token == tokenizer().decode([token], skip_special_tokens=False)
    assert logprobs.token_logprobs(logits, chosen).tolist() == pytest.approx(
        [float(table[0, chosen[0]]), float(table[1, chosen[1]])], abs=1e-6
    )
    assert len(logprobs.top_logprobs(logits[:1], [0], 100, tokenizer())[0]) == 20
    assert list(logprobs.top_logprobs(logits[:1], [4], 0, tokenizer())[0]) == [4]


@pytest.mark.parametrize("length", [1, 255, 256, 257, 600])
def test_a_long_prompt_is_done_in_pieces(length: int) -> None:
    hidden, chosen = some_logits(length + 1), [index % 20 for index in range(length)]
    held: list[int] = []

    def logits_of(part: Tensor) -> Tensor:
        held.append(len(part))
        return part * 2

    found = logprobs.prompt_logprobs(hidden, logits_of, chosen, 2, tokenizer())
    whole = logprobs.top_logprobs(hidden[:length] * 2, chosen, 2, tokenizer())
    assert [list(row) for row in found] == [list(row) for row in whole]
    assert [row[token].logprob for row, token in zip(found, chosen, strict=True)] == pytest.approx(
        [row[token].logprob for row, token in zip(whole, chosen, strict=True)], abs=1e-6
    )
    assert max(held) <= 256
    assert sum(held) == length

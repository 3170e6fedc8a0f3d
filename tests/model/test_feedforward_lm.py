"""The feed-forward language model: its formula, its gradients, what it can learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.func import functional_call

from gristmill.errors import RequestError
from gristmill.model.feedforward_lm import FeedForwardLM
from gristmill.objectives.fixed_window import FixedWindowLM
from gristmill.objectives.ngram import NGram
from gristmill.tokens.batch import PackedBatch

TEXT = "the cat sat on the mat and the rat sat on the cat that the rat ate"


def small(**options: object) -> FeedForwardLM:
    torch.manual_seed(0)
    return FeedForwardLM(7, **{"order": 4, "size": 3, "hidden": 5, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("direct", [True, False])
def test_the_published_formula_and_its_distribution(direct: bool) -> None:
    model = small(direct=direct).double()
    contexts = torch.tensor([[7, 7, 2], [0, 6, 1]])
    w = {name: value.detach().numpy() for name, value in model.named_parameters()}
    for row, found in zip(contexts, model(contexts), strict=True):
        found = found.detach()
        x = np.concatenate([w["embed_tokens.weight"][token] for token in row])
        y = w["output.bias"] + w["output.weight"] @ np.tanh(w["hidden.bias"] + w["hidden.weight"] @ x)
        y += w["direct.weight"] @ x if direct else 0.0
        np.testing.assert_allclose(found, y, rtol=1e-12)
        assert float(found.softmax(dim=-1).sum()) == pytest.approx(1.0, abs=1e-12)


def test_gradient_of_the_embedding_table() -> None:
    model = small().double()
    contexts, targets = torch.tensor([[7, 7, 2], [2, 2, 1], [0, 6, 1]]), torch.tensor([1, 3, 5])

    def loss(table: torch.Tensor) -> torch.Tensor:
        logits = functional_call(model, {"embed_tokens.weight": table}, contexts)
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

    table = model.embed_tokens.weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(loss, table)
    loss(table).backward()
    assert table.grad is not None
    assert (table.grad.abs().sum(dim=1) > 0).tolist() == [token in (0, 1, 2, 6, 7) for token in range(8)]


def test_contexts_stop_at_the_beginning_of_a_document() -> None:
    batch = PackedBatch.from_segments([([1, 2, 3, 4], None), ([5, 6], None)])
    found = small().contexts(batch.input_ids, batch.position_ids)
    assert found.tolist() == [[7, 7, 1], [7, 1, 2], [1, 2, 3], [2, 3, 4], [7, 7, 5], [7, 5, 6]]


def test_overfits_a_small_corpus_to_near_its_empirical_entropy() -> None:
    letters = sorted(set(TEXT))
    ids = [letters.index(letter) for letter in TEXT]
    torch.manual_seed(0)
    model = FeedForwardLM(len(letters), order=4, size=8, hidden=32)
    objective, batch = FixedWindowLM(), PackedBatch.from_segments([(ids, None)])
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(250):
        total, count = objective.loss_sum(model, batch)
        optimiser.zero_grad()
        (total / count).backward()
        optimiser.step()
    # a counted model of the same order: no function of the last three letters can do better
    counted = NGram(4, range(len(letters))).fit([ids])
    first = -math.log(counted.probability(ids[0], [None] * 3))  # the batch does not predict the first letter
    least = (counted.cross_entropy([ids]) * len(ids) - first) / (len(ids) - 1)
    assert least > 0.2
    assert least - 1e-6 < float(total.detach()) / count < least + 0.02


def test_an_order_that_reads_nothing_is_refused() -> None:
    with pytest.raises(RequestError, match="order"):
        FeedForwardLM(7, order=1)

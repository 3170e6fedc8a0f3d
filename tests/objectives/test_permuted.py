"""Permuted language modelling: a prediction depends on what is earlier in its order."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.errors import DataError, RequestError
from gristmill.model.attention.masks import permuted_mask, to_perm_mask
from gristmill.objectives.causal import CausalLM
from gristmill.objectives.permuted import PermutedLM, factorisation, predicted_targets
from gristmill.tokens.batch import IGNORED
from objectives.cases_encoder import FIRST, SIZE, VOCABULARY, Words, headed, segment

ORDER = (0, 4, 2, 1, 3)
SEEN = {0: set(), 1: {0, 2, 4}, 2: {0, 4}, 3: {0, 1, 2, 4}, 4: {0}}
OBJECTIVE = PermutedLM(VOCABULARY)


def dependencies(run: Any, ids: torch.Tensor, order: tuple[int, ...]) -> dict[int, set[int]]:
    """For each token after the first of the order, the tokens that change what run(ids) -> (tokens, ...) says of it."""
    before = run(ids)
    found: dict[int, set[int]] = {place: set() for place in order}
    for token in range(len(ids)):
        other = ids.clone()
        other[token] = FIRST + (other[token] - FIRST + 7) % (SIZE - FIRST)
        changed = (run(other) - before).abs().amax(dim=1) > 1e-6
        for place in order[1:]:
            if changed[place]:
                found[place].add(token)
    return found


def our_run(order: tuple[int, ...]) -> Any:
    model = headed().eval()

    @torch.no_grad()
    def run(ids: torch.Tensor) -> torch.Tensor:
        states = OBJECTIVE.states(model, OBJECTIVE.ordered([ids.numpy()], [order]))
        return model.head.decoder(model.head.transform(states))  # type: ignore[union-attr]

    return run


def tokens(count: int) -> torch.Tensor:
    return torch.arange(10, 10 + count)


def test_each_prediction_depends_exactly_on_the_earlier_ones() -> None:
    assert dependencies(our_run(ORDER), tokens(5), ORDER) == SEEN
    assert {place: set(context) for place, context in factorisation(ORDER)} == SEEN


@settings(max_examples=5, deadline=None)
@given(st.permutations(range(6)))
def test_any_order_does(order: list[int]) -> None:
    expected = {place: set(context) for place, context in factorisation(order)}
    assert dependencies(our_run(tuple(order)), tokens(6), tuple(order)) == expected


@pytest.mark.peer
def test_xlnet_of_transformers_depends_on_the_same() -> None:
    from transformers import XLNetConfig, XLNetLMHeadModel

    torch.manual_seed(0)
    config = XLNetConfig(vocab_size=SIZE, d_model=32, n_layer=2, n_head=4, d_inner=48, initializer_range=0.2)
    twin = XLNetLMHeadModel(config).eval()
    mask, everywhere = to_perm_mask(permuted_mask(ORDER))[None], torch.eye(5)[None]

    @torch.no_grad()
    def run(ids: torch.Tensor) -> torch.Tensor:
        return twin(ids[None], perm_mask=mask, target_mapping=everywhere).logits[0]

    assert dependencies(run, tokens(5), ORDER) == SEEN


def test_the_order_of_the_table() -> None:
    """[CLS] is given, then chasing, ball, ., the, The, is, kitten."""
    words = Words("The kitten is chasing the ball .")
    ids = words.ids("[CLS] The kitten is chasing the ball .")
    order = (0, 4, 6, 7, 5, 1, 3, 2)
    spelled = [(words.words[ids[place]], len(context)) for place, context in factorisation(order)][1:]
    predicted = ["chasing", "ball", ".", "the", "The", "is", "kitten"]
    assert spelled == [(word, turn) for turn, word in enumerate(predicted, start=1)]
    batch = PermutedLM(words.vocabulary).ordered([ids], [order])
    assert np.array_equal(batch.input_ids, ids)  # tokens stay where they are
    assert words.text(batch.target_ids) == "_ The kitten is chasing the ball ."


@torch.no_grad()
def test_in_natural_order_it_is_a_causal_model() -> None:
    """As many predictions, each from its left context alone: the loss is the sum over prefixes run apart."""
    model, objective = headed().eval(), PermutedLM(VOCABULARY, shuffle=False)
    ids, _ = segment(2)
    batch = objective.prepare([(ids, None)], [(0,)])
    assert batch.orders == (tuple(range(len(ids) + 1)),)
    total, count = objective.loss_sum(model, batch)
    expected = 0.0
    for end in range(1, len(ids) + 1):
        prefix = objective.prepare([(ids[:end], None)], [(0,)])
        logits = model.head.decoder(model.head.transform(objective.states(model, prefix)[-1]))  # type: ignore[union-attr]
        expected -= float(logits.log_softmax(-1)[ids[end - 1]])
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert count == CausalLM().prepare([([VOCABULARY.cls_id, *ids], None)], [(0,)]).target_count


def test_of_a_joint_table_every_order_gives_the_same_probability() -> None:
    joint = np.random.default_rng(0).dirichlet(np.ones(2**4)).reshape((2,) * 4)
    for values in itertools.product((0, 1), repeat=4):
        causal = None
        for order in itertools.permutations(range(4)):
            total = 0.0
            for place, context in factorisation(order):
                known = {axis: values[axis] for axis in context}
                pick = lambda fixed: joint[tuple(fixed.get(axis, slice(None)) for axis in range(4))].sum()  # noqa: E731
                total += float(np.log(pick(known | {place: values[place]}) / pick(known)))
            causal = total if causal is None else causal  # the first is the natural order
            assert total == pytest.approx(causal)
        assert causal == pytest.approx(float(np.log(joint[values])))


def test_the_end_of_the_order_can_be_predicted_alone() -> None:
    ids = np.arange(10, 20)
    order = (0, *reversed(range(1, 10)))
    assert np.flatnonzero(predicted_targets(ids, order, 1 / 3) >= 0).tolist() == [1, 2, 3]
    assert predicted_targets(ids[:1], (0,)).tolist() == [IGNORED]
    assert (predicted_targets(ids, order) >= 0).sum() == 9


def test_bad_orders_and_lengths_are_refused() -> None:
    with pytest.raises(DataError, match="must name each of 2 positions once"):
        OBJECTIVE.ordered([np.array([5, 6])], [(0, 0)])
    with pytest.raises(DataError, match="share"):
        PermutedLM(VOCABULARY, share=0.0)
    with pytest.raises(RequestError, match="of 71 tokens"):
        OBJECTIVE.loss_sum(headed(), OBJECTIVE.prepare([([7] * 70, None)], [(0,)]))

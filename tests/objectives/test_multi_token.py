"""Multi-token prediction: what each head learns, and that the trunk is the plain model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gristmill.errors import DataError
from gristmill.objectives.causal import CausalLM
from gristmill.objectives.multi_token import MultiToken, MultiTokenModel, targets_ahead
from gristmill.tokens.batch import IGNORED, PackedBatch
from objectives.cases_seq2seq import decoder, multi_token, segment

TEXTS = [segment(number) for number in range(4)]


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1)), min_size=1, max_size=9), min_size=1, max_size=4),
    st.integers(1, 5),
)
def test_a_head_predicts_the_token_so_many_places_on_in_the_same_text(
    texts: list[list[tuple[int, int]]], ahead: int
) -> None:
    segments = [([token for token, _ in text], [mask for _, mask in text]) for text in texts]
    found = targets_ahead(PackedBatch.from_segments(segments), ahead).tolist()
    expected = [
        text[place + ahead][0] if place + ahead < len(text) and text[place + ahead][1] else IGNORED
        for text in texts
        for place in range(len(text))
    ]
    assert found == expected


def test_terms_are_the_log_probabilities_of_the_heads() -> None:
    model, objective = multi_token().eval(), MultiToken(2)
    batch = objective.prepare(TEXTS, [(0,)] * 4)
    sums, counts = objective.loss_sums(model, batch), objective.counts(batch)
    assert list(sums) == ["next", "ahead_2", "ahead_3"]
    for number, name in enumerate(sums):
        expected = 0.0
        for ids, _ in TEXTS:
            tokens = torch.tensor(ids)
            with torch.no_grad():
                logprobs = model(tokens)[number].log_softmax(-1)
            expected -= sum(float(logprobs[at, tokens[at + 1 + number]]) for at in range(len(ids) - 1 - number))
        assert sums[name].item() == pytest.approx(expected, rel=1e-5)
        assert counts[name] == sum(len(ids) - 1 - number for ids, _ in TEXTS)


def test_the_trunk_is_the_plain_model_and_its_term_the_causal_loss() -> None:
    trunk = decoder().eval()
    model = MultiTokenModel(trunk, 2).eval()
    batch = CausalLM().prepare(TEXTS, [(0,)] * 4)
    plain, count = CausalLM().loss_sum(trunk, batch)
    assert MultiToken(2).loss_sums(model, batch)["next"].item() == pytest.approx(plain.item(), rel=1e-6)
    alone = MultiToken(0)
    assert alone.counts(batch) == {"next": count}
    assert alone.loss_sums(MultiTokenModel(trunk, 0), batch)["next"].item() == pytest.approx(plain.item(), rel=1e-6)
    tokens = torch.tensor(TEXTS[0][0])
    assert torch.allclose(model(tokens)[0], trunk(tokens), atol=1e-5)


def test_every_term_reaches_the_trunk_and_only_its_own_head() -> None:
    model, objective = multi_token(), MultiToken(2)
    batch = objective.prepare(TEXTS, [(0,)] * 4)
    for number, name in enumerate(objective.weights):
        model.zero_grad()
        objective.loss_sums(model, batch)[name].backward()
        moved = [any(p.grad is not None and bool(p.grad.any()) for p in head.parameters()) for head in model.heads]
        assert moved == [number == 1, number == 2]
        assert model.trunk.layers[0].self_attn.o_proj.weight.grad.abs().sum() > 0


def test_numbers_of_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="the objective has 3 extra heads, the model 2"):
        MultiToken(3).loss_sums(multi_token(), CausalLM().prepare(TEXTS, [(0,)] * 4))
    with pytest.raises(DataError, match="extra_heads must be 0 or more"):
        MultiTokenModel(decoder(), -1)


def test_weights_are_drawn_by_seed() -> None:
    first, again = multi_token(), multi_token()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    heads = [head.mlp.down_proj.weight for head in first.heads]
    assert not torch.equal(heads[0], heads[1])

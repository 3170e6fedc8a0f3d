"""Prefix language modelling, in a decoder and in an encoder-decoder."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gristmill.errors import DataError
from gristmill.objectives.causal import CausalLM
from gristmill.objectives.prefix import PrefixBatch, PrefixLM, PrefixPair, draw_prefix
from gristmill.objectives.sequence_pair import Framing
from gristmill.tokens.batch import IGNORED
from objectives.cases_seq2seq import decoder, segment
from objectives.words import FRAMING, KITTEN, PUPPIES, ids, text

TEXTS = [segment(number) for number in range(4)]
KEYS = [(0, number) for number in range(4)]


def test_the_worked_sentences() -> None:
    for sentence, cut, halves in [
        (PUPPIES, 4, ("The puppies are frolicking", "outside the house .")),
        (KITTEN, 3, ("The kitten is", "chasing the ball .")),
    ]:
        batch = PrefixPair(FRAMING, cut).prepare([(ids(sentence), None)], [(0,)])
        assert text(batch.source.input_ids) == f"[CLS] {halves[0]}"
        assert text(batch.target.input_ids) == f"<s> {halves[1]}".removesuffix(" .")
        assert text(batch.target.target_ids) == halves[1]


def test_no_prefix_is_causal_language_modelling_after_an_empty_source() -> None:
    batch = PrefixPair(FRAMING, 0).prepare([(ids(KITTEN), None)], [(0,)])
    assert (text(batch.source.input_ids), text(batch.target.target_ids)) == ("[CLS]", KITTEN)


@given(st.integers(2, 60), st.integers(0, 10_000))
def test_prefix_and_rest_are_the_text_and_neither_is_empty(length: int, key: int) -> None:
    tokens = np.arange(length) + 3
    framing = Framing(vocab_size=100, decoder_start=0)
    batch = PrefixPair(framing).prepare([(tokens, None)], [(key,)])
    prefix, rest = batch.source.input_ids.tolist(), batch.target.target_ids.tolist()
    assert prefix + rest == tokens.tolist()
    assert prefix
    assert rest
    # the decoder's batch is cut at the same place, and learns just what comes after it
    packed = PrefixLM().prepare([(tokens, None)], [(key,)])
    assert packed.prefix_lengths == (len(prefix),)
    assert packed.target_ids[packed.target_ids != IGNORED].tolist() == rest
    assert (packed.target_ids != IGNORED).nonzero().flatten().tolist() == list(range(len(prefix) - 1, length - 1))


def test_cuts_are_uniform() -> None:
    generator = np.random.default_rng(0)
    found = Counter(draw_prefix(generator, 5) for _ in range(4000))
    assert found.keys() == {1, 2, 3, 4}
    assert sum((count - 1000) ** 2 / 1000 for count in found.values()) < 16.3  # chi-square, 3 degrees, p = 0.001


@pytest.mark.parametrize("prefix", [0, 1])
def test_a_prefix_of_none_or_one_is_causal_language_modelling(prefix: int) -> None:
    model = decoder()
    expected, expected_count = CausalLM().loss_sum(model, CausalLM().prepare(TEXTS, KEYS))
    expected.backward()
    gradient = model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    objective = PrefixLM(prefix)
    total, count = objective.loss_sum(model, objective.prepare(TEXTS, KEYS))
    total.backward()
    assert count == expected_count
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (model.embed_tokens.weight.grad - gradient).abs().max() < 1e-5


def test_the_loss_is_that_of_the_rest_given_the_prefix_seen_whole() -> None:
    model, objective = decoder().eval(), PrefixLM(3)
    tokens = torch.tensor([5, 6, 7, 8, 9, 10])
    total, count = objective.loss_sum(model, objective.prepare([(tokens.tolist(), None)], [(0,)]))
    with torch.no_grad():
        logprobs = model(tokens[None], prefix_lengths=[3])[0].log_softmax(-1)
        plain = model(tokens).log_softmax(-1)
    expected = -sum(float(logprobs[place - 1, tokens[place]]) for place in (3, 4, 5))
    assert count == 3
    assert total.item() == pytest.approx(expected, abs=1e-4)
    causal = -sum(float(plain[place - 1, tokens[place]]) for place in (3, 4, 5))
    assert abs(total.item() - causal) > 1e-4


def test_a_text_of_one_token_has_nothing_to_learn() -> None:
    assert PrefixLM().prepare([([5], None), ([5, 6], None)], KEYS[:2]).target_count == 1
    batch = PrefixPair(Framing.t5(64)).prepare([([5], None)], [(0,)])
    assert batch.target.target_ids.tolist() == [1]
    with pytest.raises(DataError, match="target: no tokens"):
        PrefixPair(FRAMING).prepare([([5], None)], [(0,)])


def test_prefixes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="segment 0 has 2 tokens, but a prefix of 3"):
        PrefixLM(3).prepare([([5, 6], None)], [(0,)])
    with pytest.raises(DataError, match="2 tokens has no prefix of 3"):
        PrefixPair(FRAMING, 3).prepare([([5, 6], None)], [(0,)])
    with pytest.raises(DataError, match="2 prefix_lengths for 1 segments"):
        PrefixBatch.from_prefixes([([5, 6], None)], [1, 1])

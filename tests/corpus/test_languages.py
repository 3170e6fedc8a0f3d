"""Shares of languages, and what a shared vocabulary covers."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from gristmill.corpus.languages import LanguageSampler, language_shares, unknown_rates
from gristmill.errors import DataError
from gristmill.tokens.tokenizer import Tokenizer

SIZES = {"en": 1_000_000.0, "zh": 10_000.0, "sw": 100.0}


def test_sizes_are_raised_to_the_exponent() -> None:
    found = language_shares(SIZES, exponent=0.5)
    total = 1000 + 100 + 10
    assert found == pytest.approx({"en": 1000 / total, "zh": 100 / total, "sw": 10 / total})
    assert language_shares(SIZES, exponent=1.0)["sw"] == pytest.approx(100 / 1_010_100)
    assert language_shares(SIZES, exponent=0.0) == pytest.approx(dict.fromkeys(SIZES, 1 / 3))


@given(st.lists(st.floats(1e-3, 1e12), min_size=1, max_size=8), st.floats(0.0, 1.0))
def test_a_lower_exponent_is_fairer(sizes: list[float], exponent: float) -> None:
    named = {str(index): size for index, size in enumerate(sizes)}
    fair, true = (language_shares(named, exponent=power) for power in (exponent, 1.0))
    assert math.fsum(fair.values()) == pytest.approx(1.0)
    smallest, largest = min(named, key=named.__getitem__), max(named, key=named.__getitem__)
    assert fair[smallest] >= true[smallest] - 1e-9
    assert fair[largest] <= true[largest] + 1e-9
    assert sorted(named, key=lambda name: (named[name], name)) == sorted(
        named, key=lambda name: (round(fair[name], 12), named[name], name)
    )


def test_samples_come_in_the_shares_asked_for() -> None:
    shares, count = language_shares(SIZES), 20_000
    sampler = LanguageSampler(shares, seed=1)
    drawn = [sampler.language(number) for number in range(count)]
    for language, share in shares.items():
        assert abs(Counter(drawn)[language] / count - share) < 4 * math.sqrt(share * (1 - share) / count)
    assert sampler.language(77) == drawn[77]
    other = LanguageSampler(shares, seed=2)
    assert [other.language(number) for number in range(100)] != drawn[:100]
    assert {LanguageSampler({"a": 0.0, "b": 1.0}, seed=0).language(n) for n in range(50)} == {"b"}


def test_one_vocabulary_covers_every_language_it_was_trained_on() -> None:
    texts = {"en": ["whales are mammals", "dogs are animals"], "zh": ["鲸鱼是哺乳动物", "狗是动物"]}
    backend = Backend(models.BPE(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["[UNK]"], show_progress=False)
    backend.train_from_iterator([line for lines in texts.values() for line in lines], trainer)
    shared = Tokenizer(backend, named_tokens=(("unk_token", "[UNK]"),))
    assert unknown_rates(shared, texts) == {"en": 0.0, "zh": 0.0}
    assert unknown_rates(shared, texts | {"ru": ["киты"]})["ru"] == 1.0
    assert unknown_rates(Tokenizer(backend), texts) == {"en": 0.0, "zh": 0.0}


def test_bad_input_is_refused() -> None:
    for sizes, options, named in (
        ({}, {}, "no language"),
        ({"en": 0.0}, {}, "'en' must be above 0"),
        ({"en": math.inf}, {}, "'en' must be above 0"),
        ({"en": 1.0}, {"exponent": 2.0}, "exponent"),
    ):
        with pytest.raises(DataError, match=named):
            language_shares(sizes, **options)
    for shares in ({}, {"en": 0.5}, {"en": 1.5, "zh": -0.5}):
        with pytest.raises(DataError, match="sum to 1"):
            LanguageSampler(shares, seed=0)

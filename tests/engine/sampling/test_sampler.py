"""Tokens for a batch: greedy and drawn, independent of each other, the same as the distribution says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.helpers import tokenizer
from gristmill.core import BatchUpdate, LogitsRow, SamplingParams
from gristmill.engine.sampling.filters import filtered
from gristmill.engine.sampling.sampler import Sampler
from gristmill.errors import RequestError

VOCAB = 300
PROMPT = [4, 5]
CHOICES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.7, "top_p": 0.9},
    {"top_k": 20, "min_p": 0.01},
    {"temperature": 1.5, "top_p": 0.99, "temperature_last": True},
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    {"temperature": 0.0, "no_repeat_ngram_size": 1, "logit_bias": {7: 4.0}},
    {"typical_p": 0.8, "min_tokens": 3, "bad_words": [[9], [1, 2]]},
    {"epsilon_cutoff": 0.003, "eta_cutoff": 0.002, "top_n_sigma": 2.0, "length_decay": (1, 1.2)},
]


def some_logits(rows: int, seed: int) -> Tensor:
    return 2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def sampler(choices: list[tuple[dict[str, Any], int]], **options: Any) -> Sampler:
    """Completions in slots 0, 1, ...: their parameters and seeds."""
    made = Sampler(VOCAB, tokenizer(), **options)
    for slot, (changes, seed) in enumerate(choices):
        params = SamplingParams(**{"max_tokens": 1000, **changes})
        made.validate(params)
        made.add(slot, params, PROMPT, (2, 3), seed, index=slot % 2)
    return made


@given(st.integers(0, 10**6), st.lists(st.sampled_from(CHOICES), min_size=1, max_size=9), st.randoms())
@settings(max_examples=40, deadline=None)
def test_a_token_does_not_depend_on_the_batch(seed: int, choices: list[dict[str, Any]], shuffled: Any) -> None:
    keys = [(choice, seed + slot) for slot, choice in enumerate(choices)]
    together = sampler(keys)
    outputs = [[int(x) for x in np.random.default_rng(slot).integers(0, VOCAB, 4)] for slot in range(len(keys))]
    order = list(range(len(keys)))
    shuffled.shuffle(order)
    logits = some_logits(len(keys), seed)
    before = logits.clone()
    found = together.sample(logits[order], [LogitsRow(slot, PROMPT, outputs[slot]) for slot in order])
    assert torch.equal(logits, before)
    for slot, token in zip(order, found, strict=True):
        alone = Sampler(VOCAB, tokenizer())
        params = SamplingParams(**{"max_tokens": 1000, **choices[slot]})
        alone.add(0, params, PROMPT, (2, 3), seed + slot, index=slot % 2)
        row = [LogitsRow(0, PROMPT, outputs[slot])]
        assert alone.sample(logits[slot : slot + 1], row) == [token]
        assert token is not None
        assert float(alone.distribution(logits[slot : slot + 1], row)[0, token]) > 0


@pytest.mark.parametrize("changes", CHOICES, ids=str)
def test_samples_follow_the_distribution(changes: dict[str, Any]) -> None:
    """Five thousand positions of one request: as many tokens of each kind as `distribution` says."""
    count, logits = 5_000, some_logits(1, 5)
    made = sampler([(changes, 9)])
    penalised = "penalty" in str(changes) or "ngram" in str(changes)
    rows = [LogitsRow(0, PROMPT, range(position)) for position in range(4, 4 + count)]
    if penalised or "length_decay" in changes:  # the distribution depends on the output: keep that, change the seed
        made = sampler([(changes, seed) for seed in range(0, 2 * 500, 2)])
        rows = [LogitsRow(slot, PROMPT, [7, 8, 8, 9]) for slot in range(500)]
    chances = made.distribution(logits, rows[:1])[0].double()
    assert float(chances.sum()) == pytest.approx(1.0, abs=1e-5)
    tokens = [token for start in range(0, len(rows), 1000) for token in made.sample(
        logits.expand(len(rows[start : start + 1000]), -1), rows[start : start + 1000])]  # fmt: skip
    observed = torch.tensor(tokens).bincount(minlength=VOCAB).double()
    expected = chances * len(rows)
    assert bool((observed[expected == 0] == 0).all())
    likely = expected >= 5
    rest = expected[~likely].sum().clamp(min=1e-9), observed[~likely].sum()
    statistic = float(((observed - expected)[likely] ** 2 / expected[likely]).sum())
    statistic += float((rest[1] - rest[0]) ** 2 / rest[0]) * (rest[0] > 1e-6)
    degrees = max(1, int(likely.sum()))
    assert statistic < degrees + 4 * math.sqrt(2 * degrees) + 8


def test_the_distribution_is_that_of_the_plain_filters_and_one_hot_when_greedy() -> None:
    logits = some_logits(3, 1)
    made = sampler([({"temperature": 0.0}, 0), ({"temperature": 0.8, "top_p": 0.7}, 0), ({}, 0)])
    found = made.distribution(logits, [LogitsRow(slot, PROMPT, []) for slot in range(3)])
    assert found[0].argmax() == logits[0].argmax()
    assert (float(found[0].max()), float(found[0].sum())) == (1.0, 1.0)
    expected = filtered(logits[1], SamplingParams(temperature=0.8, top_p=0.7)).softmax(-1)
    assert torch.allclose(found[1], expected, atol=1e-6)
    assert torch.allclose(found[2], logits[2].softmax(-1), atol=1e-6)


def test_seeds_completions_and_positions_draw_differently_and_repeat() -> None:
    logits = torch.zeros(1, VOCAB)

    def tokens(seed: int, slot: int) -> list[int | None]:
        made = Sampler(VOCAB, tokenizer())
        made.add(0, SamplingParams(max_tokens=99), PROMPT, (), seed, index=slot)
        return [made.sample(logits, [LogitsRow(0, PROMPT, [1] * length)])[0] for length in range(30)]

    series = [tokens(seed, index) for seed in (0, 1, -1, 2**40) for index in (0, 1)]
    assert series == [tokens(seed, index) for seed in (0, 1, -1, 2**40) for index in (0, 1)]
    assert all(len(set(own)) > 20 for own in series)
    for at, own in enumerate(series):
        for other in series[:at]:
            assert sum(a == b for a, b in zip(own, other, strict=True)) < 4


@pytest.mark.parametrize("choice", [CHOICES[0], CHOICES[1], CHOICES[2], CHOICES[5]], ids=str)
@pytest.mark.parametrize("bad", ["nan", "inf", "all banned"])
def test_a_row_where_none_can_be_chosen_leaves_the_others_alone(choice: dict[str, Any], bad: str) -> None:
    made, logits = sampler([(choice, slot) for slot in range(3)]), some_logits(3, 2)
    rows = [LogitsRow(slot, PROMPT, [6]) for slot in range(3)]
    expected = made.sample(logits, rows)
    if bad == "all banned":
        logits[1] = -math.inf
    else:
        logits[1, 17] = float(bad)
    found = made.sample(logits, rows)
    assert found == [expected[0], None, expected[2]]
    assert made.distribution(logits, rows).sum(1).tolist() == pytest.approx([1.0, 0.0, 1.0], abs=1e-5)


def test_a_ban_of_everything_is_none() -> None:
    made = sampler([({"logit_bias": dict.fromkeys(range(VOCAB), -math.inf)}, 0)])
    assert made.sample(some_logits(1, 0), [LogitsRow(0, PROMPT, [])]) == [None]


def test_drafts_of_one_slot_draw_what_single_steps_draw() -> None:
    choice = {"repetition_penalty": 1.4, "top_p": 0.95}
    output, logits = [7, 8, 7, 9, 10], some_logits(6, 8)
    rows = [LogitsRow(0, PROMPT, output[:length]) for length in range(6)]
    together = sampler([(choice, 3)]).sample(logits, rows)
    alone = sampler([(choice, 3)])
    assert together == [alone.sample(logits[at : at + 1], [row])[0] for at, row in enumerate(rows)]


class _Only:
    """Allows one token in the slots it was told of."""

    def __init__(self, token: int, *, invariant: bool) -> None:
        self.token, self.is_argmax_invariant, self.slots, self.calls = token, invariant, set[int](), 0

    def validate(self, params: SamplingParams) -> None:
        if params.top_k == 13:
            raise RequestError("top_k 13 is bad luck", field="top_k")

    def update(self, change: BatchUpdate) -> None:
        self.slots -= set(change.removed)
        self.slots |= {slot for slot, _, _ in change.added}

    def apply(self, logits: Tensor, rows: Any) -> Tensor:
        self.calls += 1
        found = torch.full_like(logits, -math.inf)
        found[:, self.token] = logits[:, self.token]
        return found


def test_a_processor_from_outside_comes_after_our_own() -> None:
    only = _Only(9, invariant=False)
    made = sampler([({"temperature": 0.0, "logit_bias": {9: -5.0}}, 0)], processors=[only])
    assert made.sample(some_logits(1, 0), [LogitsRow(0, PROMPT, [])]) == [9]
    assert only.slots == {0}
    with pytest.raises(RequestError, match="bad luck"):
        made.validate(SamplingParams(top_k=13))
    made.remove(0)
    assert only.slots == set()


def test_greedy_batches_skip_what_cannot_change_them() -> None:
    only = _Only(9, invariant=True)
    made = sampler([({"temperature": 0.0}, 0), ({}, 0)], processors=[only])
    made.sample(some_logits(1, 0), [LogitsRow(0, PROMPT, [])])
    assert only.calls == 0
    made.sample(some_logits(2, 0), [LogitsRow(0, PROMPT, []), LogitsRow(1, PROMPT, [])])
    assert only.calls == 1


def test_slots_are_taken_once_moved_and_given_back() -> None:
    made, logits = sampler([(CHOICES[5], 1), (CHOICES[2], 2)]), some_logits(1, 3)
    expected = made.sample(logits, [LogitsRow(1, PROMPT, [6])])
    with pytest.raises(RequestError, match="in use"):
        made.add(0, SamplingParams(), PROMPT, (), 0, 0)
    made.remove(0)
    made.move(1, 700)
    made.add(1, SamplingParams(), PROMPT, (), 0, 0)
    assert made.sample(logits, [LogitsRow(700, PROMPT, [6])]) == expected


@pytest.mark.parametrize(
    "series",
    [
        [{"temperature": 0.0}, {"temperature": 0.3}, {"temperature": 1.0}, {"temperature": 3.0}],
        [{"top_k": 1}, {"top_k": 4}, {"top_k": 40}, {}],
        [{"top_p": 0.01}, {"top_p": 0.3}, {"top_p": 0.7}, {}],
    ],
    ids=["temperature", "top-k", "top-p"],
)
def test_diversity_grows_with_temperature_and_pool(series: list[dict[str, Any]]) -> None:
    """Different runs of two tokens among 100 samples of eight (distinct-2); greedy and a pool of one give one text."""
    logits = some_logits(8, 4)
    distinct = []
    for changes in series:
        made = sampler([(changes, 2 * seed) for seed in range(100)])
        texts: list[list[int]] = [[] for _ in range(100)]
        for step in range(8):
            rows = [LogitsRow(slot, PROMPT, text) for slot, text in enumerate(texts)]
            for text, token in zip(texts, made.sample(logits[step].expand(100, -1), rows), strict=True):
                assert token is not None
                text.append(token)
        distinct.append(len({(at, *text[at : at + 2]) for text in texts for at in range(7)}))
    assert distinct[0] == 7
    assert distinct == sorted(set(distinct))

"""The plain loop: what speculation with two models must give."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from engine.speculation.models import continued, drafter, target
from engine.speculation.test_verify import chi_square
from gristmill.engine.speculation.reference import speculative_reference
from model import tiny

PROMPT = tiny.ids(6).tolist()


@pytest.mark.parametrize("draft_tokens", [0, 1, 5])
def test_greedy_output_is_the_targets_own(draft_tokens: int) -> None:
    run = speculative_reference(target(), drafter(), PROMPT, max_tokens=12, draft_tokens=draft_tokens)
    assert run.token_ids == continued(target(), PROMPT, 12)
    assert sum(accepted + 1 for _, accepted in run.rounds) == 12
    assert all(accepted <= drafted <= draft_tokens for drafted, accepted in run.rounds)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_draft_model_that_is_the_target_stands_whole(temperature: float) -> None:
    run = speculative_reference(target(), target(), PROMPT, max_tokens=14, temperature=temperature)
    assert run.rounds == [(5, 5), (5, 5), (1, 1)]


@torch.no_grad()
def test_sampled_output_has_the_targets_distribution() -> None:
    small = {
        "vocab_size": 3,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
        "initializer_range": 0.3,
    }
    model, other = tiny.model(seed=1, **small), tiny.model(seed=2, **small)
    counts: Counter[tuple[int, ...]] = Counter()
    samples, rounds = 400, []
    for seed in range(samples):
        run = speculative_reference(model, other, [0], max_tokens=2, draft_tokens=2, temperature=1.5, seed=seed)
        counts[tuple(run.token_ids)] += 1
        rounds += run.rounds
    expected = {}
    for word in itertools.product(range(3), repeat=2):
        probs = (model(torch.tensor([0, word[0]])) / 1.5).softmax(-1)
        expected[word] = samples * float(probs[0, word[0]] * probs[1, word[1]])
    assert chi_square([counts[word] for word in expected], expected.values()) > 1e-3
    stood = sum(accepted for _, accepted in rounds) / sum(drafted for drafted, _ in rounds)
    assert 0.2 < stood < 0.95  # the draft model is another one
    again = speculative_reference(model, other, [0], max_tokens=2, draft_tokens=2, temperature=1.5, seed=samples - 1)
    assert again.token_ids == run.token_ids

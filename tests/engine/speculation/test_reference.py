"""The plain loop: what speculation with two models must give."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch

from engine.speculation.models import CountingRunner, continued, drafter, proposer, request, target
from engine.speculation.test_verify import chi_square
from gristmill.engine.memory.paged_cache import Chunk
from gristmill.engine.speculation.reference import speculative_reference
from gristmill.engine.speculation.verify import verify_greedy
from gristmill.model.formats.huggingface import save_huggingface
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


@pytest.mark.parametrize("layers", [1, 3])
def test_cached_rounds_equal_the_reference(layers: int) -> None:
    """Both models in paged memory, rolled back after each rejection: one forward of the target a round."""
    helper = drafter() if layers == 1 else target()
    table, known, rounds = [3, 1, 4, 9, 2, 6, 5], list(PROMPT), []
    drafts, draft_runner = proposer(helper)
    runner, alone = CountingRunner(target()), CountingRunner(target())
    for each in (runner, alone):
        each.hidden_states(known[:-1], [Chunk(table, 0, len(known) - 1)])
    while len(known) < len(PROMPT) + 12:
        limit = min(5, len(PROMPT) + 12 - len(known) - 1)
        draft_runner.forwards.clear()
        runner.forwards.clear()
        (draft,) = drafts.propose([request(known, table, limit)])
        read = [known[-1], *draft.token_ids]
        logits = runner.logits(runner.hidden_states(read, [Chunk(table, len(known) - 1, len(read))]))
        assert (len(draft_runner.forwards), runner.forwards) == (limit, [limit + 1])
        for place, token in enumerate(read):  # what one token at a time gives
            states = alone.hidden_states([token], [Chunk(table, len(known) - 1 + place, 1)])
            torch.testing.assert_close(logits[place : place + 1], alone.logits(states), atol=1e-4, rtol=1e-4)
        emitted, accepted = verify_greedy(logits.argmax(-1).tolist(), draft.token_ids)
        rounds.append((limit, accepted))
        known += emitted
    run = speculative_reference(target(), helper, PROMPT, max_tokens=12)
    assert known[len(PROMPT) :] == run.token_ids == continued(target(), PROMPT, 12)
    assert rounds == run.rounds


@pytest.mark.peer
def test_equals_assisted_generation_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = []
    for name, model in (("target", target()), ("draft", drafter())):
        save_huggingface(model, tmp_path / name)
        theirs.append(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval())
    tokens = torch.tensor([PROMPT])
    out = theirs[0].generate(
        tokens, attention_mask=torch.ones_like(tokens), assistant_model=theirs[1], do_sample=False,
        max_new_tokens=12, min_new_tokens=12, eos_token_id=None,
    )  # fmt: skip
    run = speculative_reference(target(), drafter(), PROMPT, max_tokens=12)
    assert out[0, len(PROMPT) :].tolist() == run.token_ids

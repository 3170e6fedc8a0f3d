"""Scores and embeddings against a plain forward, and against what the engine says of its own output."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import helpers
from gristmill.core import SamplingParams
from gristmill.engine import scoring
from gristmill.engine.scoring import PackedForward, mean_embeddings, score_completions
from model import tiny

PAIRS = [(helpers.prompt(3 + 7 * i, i), helpers.prompt(1 + 5 * i, 50 + i)) for i in range(6)]


def plain(prompt: list[int], completion: list[int]) -> list[float]:
    table = helpers.plain_logprobs([*prompt, *completion])
    return [float(table[len(prompt) - 1 + at, token]) for at, token in enumerate(completion)]


@pytest.mark.parametrize(("batch", "rows"), [(4096, 512), (40, 3), (1, 1)])
def test_scores_equal_gathered_log_softmax(batch: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_BATCH_TOKENS", batch)
    monkeypatch.setattr(scoring, "_HEAD_ROWS", rows)
    pairs = random.Random(0).sample(PAIRS, len(PAIRS))
    for score, (prompt, completion) in zip(
        score_completions(PackedForward(helpers.model()), pairs), pairs, strict=True
    ):
        assert score.token_ids == completion
        assert score.token_logprobs == pytest.approx(plain(prompt, completion), abs=1e-4)
        assert score.logprob == pytest.approx(sum(score.token_logprobs))


def test_greedy_is_known_as_greedy_and_one_token_off_is_not() -> None:
    prompt = helpers.prompt(9)
    best = helpers.plain_greedy(prompt, 8)
    wrong = [*best[:7], (best[7] + 1) % helpers.VOCABULARY]
    assert [
        score.is_greedy
        for score in score_completions(PackedForward(helpers.model()), [(prompt, best), (prompt, wrong)])
    ] == [
        True,
        False,
    ]


def test_scores_are_differences_of_whole_sequences() -> None:
    prompt, completion = helpers.prompt(8), helpers.prompt(6, 1)
    first = prompt[:1]
    whole, part = (
        score.logprob
        for score in score_completions(
            PackedForward(helpers.model()), [(first, prompt[1:] + completion), (first, prompt[1:])]
        )
    )
    (direct,) = score_completions(PackedForward(helpers.model()), [(prompt, completion)])
    assert direct.logprob == pytest.approx(whole - part, abs=1e-4)
    assert len(direct.token_logprobs) == 6
    (single,) = score_completions(PackedForward(helpers.model()), [(prompt, completion[:1])])
    assert single.token_logprobs == pytest.approx(direct.token_logprobs[:1], abs=1e-5)


def test_chances_multiply_along_the_sequence() -> None:
    model = helpers.bigram_model({10: {11: 0.5, 20: 0.5}, 11: {12: 0.2, 20: 0.8}, 12: {13: 0.25, 20: 0.75}})
    (score,) = score_completions(PackedForward(model), [([10], [11, 12, 13])])
    assert score.logprob == pytest.approx(-3.688879454, abs=1e-5)
    assert math.exp(score.logprob) == pytest.approx(0.025, abs=1e-6)
    assert score.token_logprobs == pytest.approx([math.log(chance) for chance in (0.5, 0.2, 0.25)], abs=1e-5)


def test_scores_of_all_sequences_of_two_sum_to_one() -> None:
    model = tiny.model(vocab_size=20)
    pairs = [([3], [first, second]) for first in range(20) for second in range(20)]
    total = sum(math.exp(score.logprob) for score in score_completions(PackedForward(model), pairs))
    assert total == pytest.approx(1.0, abs=1e-4)


def test_scores_of_all_continuations_sum_to_one() -> None:
    prompt = helpers.prompt(5)
    scores = score_completions(
        PackedForward(helpers.model()), [(prompt, [token]) for token in range(helpers.VOCABULARY)]
    )
    assert sum(math.exp(score.logprob) for score in scores) == pytest.approx(1.0, abs=1e-4)
    assert [score.is_greedy for score in scores].count(True) == 1


@pytest.mark.peer
def test_scores_equal_the_loss_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(helpers.save(tmp_path), dtype=torch.float32).eval()
    ids = helpers.prompt(20)
    (score,) = score_completions(PackedForward(helpers.model()), [(ids[:1], ids[1:])])
    with torch.inference_mode():
        loss = float(theirs(torch.tensor([ids]), labels=torch.tensor([ids])).loss)
    assert score.logprob == pytest.approx(-loss * 19, abs=1e-3)
    perplexity = math.exp(-score.logprob / 19)
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-4)


@pytest.mark.peer
def test_engine_logprobs_equal_transition_scores_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(helpers.save(tmp_path), dtype=torch.float32).eval()
    ids = helpers.prompt(10)
    found = helpers.only(helpers.engine(), ids, helpers.greedy(max_tokens=12, logprobs=0))
    tokens = torch.tensor([ids])
    out = theirs.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=12, min_new_tokens=12,
        eos_token_id=None, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    scores = theirs.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)[0].tolist()
    assert found.cumulative_logprob == pytest.approx(sum(scores), abs=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_engine_and_scorer_agree_on_what_was_generated(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=25, logprobs=0, ignore_eos=True)
    prompts = [prompt for prompt, _ in PAIRS]
    outputs = helpers.run(helpers.engine(max_num_batched_tokens=30), [(prompt, params) for prompt in prompts])
    pairs = [(output.prompt_token_ids, output.outputs[0].token_ids) for output in outputs]
    for output, score in zip(outputs, score_completions(PackedForward(helpers.model()), pairs), strict=True):
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None
        values = [entry[token].logprob for entry, token in zip(logprobs, score.token_ids, strict=True)]
        assert values == pytest.approx(score.token_logprobs, abs=1e-4)
        assert output.outputs[0].cumulative_logprob == pytest.approx(score.logprob, abs=1e-3)


def test_embeddings_are_the_unit_mean_of_the_last_states() -> None:
    texts = [ids for ids, _ in PAIRS]
    found = mean_embeddings(PackedForward(helpers.model()), helpers.model().config.hidden_size, texts)
    assert found.dtype == np.float32
    assert np.allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)
    model = helpers.model()
    states: list[torch.Tensor] = []
    handle = model.norm.register_forward_hook(lambda _, __, out: states.append(out))
    with torch.inference_mode():
        for ids in texts:
            model(torch.tensor(ids))
    handle.remove()
    for vector, state in zip(found, states, strict=True):
        mean = state.mean(dim=0)
        assert np.allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)


def test_batches_hold_every_index_once_within_the_limit() -> None:
    lengths = random.Random(1).choices(range(1, 6000), k=50)
    batches = list(scoring.batches_of(lengths, scoring._BATCH_TOKENS))
    assert sorted(itertools.chain(*batches)) == list(range(50))
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= scoring._BATCH_TOKENS for batch in batches)


@pytest.mark.peer
def test_scores_of_greedy_output_are_the_transition_scores_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(helpers.save(tmp_path), dtype=torch.float32).eval()
    ids = torch.tensor([helpers.prompt(9)])
    for count in (1, 7):  # the last token predicts nothing: exactly `count` terms
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, min_new_tokens=count,
            eos_token_id=None, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        steps = theirs.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)[0].tolist()
        completion = out.sequences[0, 9:].tolist()
        (score,) = score_completions(PackedForward(helpers.model()), [(ids[0].tolist(), completion)])
        assert score.token_logprobs == pytest.approx(steps, abs=1e-4)
        assert len(score.token_logprobs) == count
        assert score.is_greedy

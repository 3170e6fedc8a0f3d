"""What each processor does: worked numbers, transformers' processors, the formulas of the API; and bad settings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.helpers import tokenizer
from gristmill.core import LogitsRow, SamplingParams
from gristmill.engine.sampling.presets import PRESETS, preset, repetition_rate
from gristmill.engine.sampling.sampler import Sampler
from gristmill.errors import RequestError

VOCAB = 50
ENDS = (2, 3)
SEEN = [1, 5, 5, 7, 1]


def random_logits(seed: int, size: int = VOCAB) -> Tensor:
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def processed(
    logits: Tensor, prompt: list[int], output: list[int], ends: tuple[int, ...] = ENDS, **changes: Any
) -> Tensor:
    """One row through all processors."""
    sampler = Sampler(len(logits), tokenizer())
    params = SamplingParams(**{"max_tokens": 100, **changes})
    sampler.validate(params)
    sampler.add(0, params, prompt, ends, seed=0, index=0)
    return sampler.process(logits[None], [LogitsRow(0, prompt, output)])[0]


def banned(found: Tensor) -> list[int]:
    return (found == -math.inf).nonzero()[:, 0].tolist()


def test_penalties_worked_examples() -> None:
    logits = torch.tensor([2.0, -1.0, 1.0])
    assert processed(logits, [0], [1, 1], (), repetition_penalty=1.2).tolist() == pytest.approx(
        [1.6667, -1.2, 1.0], abs=1e-4
    )
    found = processed(logits, [2], [0, 0, 1], (), frequency_penalty=0.5, presence_penalty=0.3)
    assert found.tolist() == pytest.approx([0.7, -1.8, 1.0], abs=1e-6)
    assert logits.tolist() == [2.0, -1.0, 1.0]  # nothing is changed in place
    neutral = processed(logits, [0, 1], [1, 2], (), repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0)
    assert torch.equal(neutral, logits)


@given(st.integers(0, 1000), st.lists(st.integers(0, 9), max_size=12), st.floats(-2, 2), st.floats(-2, 2))
@settings(max_examples=50, deadline=None)
def test_penalties_and_bias_equal_the_formula_of_the_api(
    seed: int, output: list[int], presence: float, frequency: float
) -> None:
    logits, bias = random_logits(seed, 10), {2: 5.0, 3: -100.0}
    found = processed(logits, [1, 1], output, presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias)
    for token in range(10):
        count = output.count(token)
        expected = float(logits[token]) - count * frequency - (count > 0) * presence + bias.get(token, 0.0)
        assert float(found[token]) == pytest.approx(expected, abs=1e-4)


def theirs(kind: str, logits: Tensor, seen: list[int], *arguments: Any, **keywords: Any) -> Tensor:
    transformers = pytest.importorskip("transformers")
    result: Tensor = getattr(transformers, kind)(*arguments, **keywords)(torch.tensor([seen]), logits[None].clone())[0]
    return result


@pytest.mark.peer
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("split", [0, 2, 5])
def test_processors_equal_transformers(seed: int, split: int) -> None:
    logits, prompt, output = random_logits(seed), SEEN[:split], SEEN[split:]
    for penalty in (0.5, 1.3):
        expected = theirs("RepetitionPenaltyLogitsProcessor", logits, SEEN, penalty)
        assert torch.allclose(processed(logits, prompt, output, repetition_penalty=penalty), expected)
    for size in (1, 2, 3, 7):
        expected = theirs("NoRepeatNGramLogitsProcessor", logits, SEEN, size)
        assert torch.equal(processed(logits, prompt, output, no_repeat_ngram_size=size), expected)
    words = [[9], [7, 1, 12], [1, 13], [5, 1, 14], [1, 5, 5, 7, 1, 15], [0, 1, 5, 5, 7, 1, 16]]
    expected = theirs("NoBadWordsLogitsProcessor", logits, SEEN, words, eos_token_id=torch.tensor([2]))
    assert torch.equal(processed(logits, prompt, output, bad_words=words), expected)
    for least in (3, 4, 5):
        expected = theirs("MinNewTokensLengthLogitsProcessor", logits, SEEN, split, least, list(ENDS), device="cpu")
        assert torch.equal(processed(logits, prompt, output, min_tokens=least), expected)
    for start, factor in ((0, 1.4), (2, 0.7), (9, 2.0)):
        expected = theirs("ExponentialDecayLengthPenalty", logits, SEEN, (start, factor), torch.tensor(ENDS), split)
        assert torch.allclose(processed(logits, prompt, output, length_decay=(start, factor)), expected)


def test_bad_words_are_texts_too_and_their_ratios_stay() -> None:
    word = tokenizer().encode("river")
    spaced = tokenizer().encode(" river")
    logits = random_logits(0, tokenizer().vocab_size)
    for ids in (word, spaced):
        found = processed(logits, [4], ids[:-1], bad_words=["river"])
        assert ids[-1] in banned(found)
        rest = found > -math.inf
        assert torch.equal(found[rest], logits[rest])
    assert banned(processed(logits, [4], [], bad_words=["river"])) == [
        ids[0] for ids in (word, spaced) if len(ids) == 1
    ]


def test_a_very_long_output_with_length_decay_is_forced_to_end_without_overflow() -> None:
    found = processed(random_logits(1), [], [9] * 5000, length_decay=(10, 3.0))
    assert bool(found.isfinite().all())
    assert int(found.argmax()) in ENDS


THINK = {"think_end": [8], "max_tokens": 100}


def test_thinking_is_at_least_and_at_most_so_long() -> None:
    """No end for 8 tokens, as with a minimum of new tokens; the delimiter is token 17 when 16 are allowed."""
    logits = random_logits(0)
    for length in range(20):
        least = processed(logits, [4], [9] * length, min_thinking_tokens=8, **THINK)
        assert banned(least) == ([2, 3, 8] if length < 8 else [])
        most = processed(logits, [4], [9] * length, thinking_budget=16, **THINK)
        assert (len(banned(most)) == VOCAB - 1 and int(most.argmax()) == 8) == (length >= 16)
    for output in ([8], [9, 9, 8, 9]):  # the answer is free
        limits = {"thinking_budget": 3, "min_thinking_tokens": 3, **THINK}
        assert torch.equal(processed(logits, [4], output, **limits), logits)


def test_a_delimiter_of_several_tokens_is_forced_one_by_one_and_masked_at_its_last() -> None:
    logits, think = random_logits(0), {"think_end": [7, 8, 9]}
    for output, token in (([5, 5], 7), ([5, 5, 7], 8), ([5, 5, 7, 8], 9), ([5, 7], 8)):
        assert int(processed(logits, [4], output, thinking_budget=2, **think).argmax()) == token
    assert torch.equal(processed(logits, [4], [5, 5, 7, 8, 9], thinking_budget=2, **think), logits)
    assert banned(processed(logits, [4], [7, 8], min_thinking_tokens=5, **think)) == [2, 3, 9]
    assert banned(processed(logits, [4], [7, 7], min_thinking_tokens=5, **think)) == [2, 3]


@pytest.mark.parametrize("end", [8, 2], ids=["delimiter", "end of sequence"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("waits", [0, 1, 3])
def test_an_early_end_becomes_a_wait_so_many_times(end: int, temperature: float, waits: int) -> None:
    logits = torch.zeros(VOCAB)
    logits[end] = 60.0  # the model would always end
    sampler = Sampler(VOCAB, tokenizer())
    params = SamplingParams(temperature=temperature, think_waits=waits, think_wait=11, think_end=[8], max_tokens=50)
    sampler.validate(params)
    sampler.add(0, params, [4], ENDS, seed=1, index=0)
    output: list[int] = []
    while not output or output[-1] == 11:
        (token,) = sampler.sample(logits[None], [LogitsRow(0, [4], output)])
        assert token is not None
        output.append(token)
    assert output == [11] * waits + [end]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_wait_takes_over_the_chance_of_ending(temperature: float) -> None:
    logits = random_logits(3)
    before = (logits / temperature).softmax(-1)
    found = processed(logits, [4], [9], think_waits=1, think_wait=11, temperature=temperature, **THINK)
    after = (found / temperature).softmax(-1)
    assert float(after[11]) == pytest.approx(float(before[[2, 3, 8, 11]].sum()), rel=1e-5)
    rest = [token for token in range(VOCAB) if token not in (2, 3, 8, 11)]
    assert torch.allclose(after[rest], before[rest], rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("logit_bias", {"logit_bias": {VOCAB: 1.0}}),
        ("logit_bias", {"logit_bias": {-1: 1.0}}),
        ("logit_bias", {"logit_bias": {1: math.inf}}),
        ("logit_bias", {"logit_bias": {1: math.nan}}),
        ("bad_words", {"bad_words": [[1, VOCAB]]}),
        ("think_end", {"think_end": [VOCAB], "thinking_budget": 3}),
        ("think_wait", {"think_wait": "once upon a far river", "think_end": [8], "think_waits": 1}),
        ("think_wait", {"think_wait": 8, "think_end": [7, 8], "think_waits": 1}),
        ("thinking_budget", {"thinking_budget": 15, "think_end": [7, 8]}),
    ],
    ids=str,
)
def test_what_the_vocabulary_refuses_is_named(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        Sampler(VOCAB, tokenizer()).validate(SamplingParams(**changes))
    assert caught.value.field == field


def test_presets_and_the_repetition_rate() -> None:
    for name in PRESETS:
        params = preset(name, max_tokens=7)
        assert (0.7 <= params.temperature <= 1.0, 0.9 <= params.top_p <= 0.95) == (True, True)
        assert 1.1 <= params.repetition_penalty <= 1.2
        assert params.max_tokens == 7
    assert any(preset(name).no_repeat_ngram_size for name in PRESETS)
    with pytest.raises(RequestError, match="Did you mean creative"):
        preset("creativ")
    assert repetition_rate([1, 2, 3, 4, 5]) == 0.0
    assert repetition_rate([1, 2] * 50, 2) == pytest.approx(97 / 99)
    assert repetition_rate([1, 2], 4) == 0.0

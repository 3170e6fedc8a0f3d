"""How requests end and what they carry: every sampling parameter through the engine."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from engine import helpers
from gristmill.core import RequestOutput, SamplingParams
from gristmill.engine.engine import Engine
from model import tiny

PROMPT = helpers.prompt(12)
WHOLE = helpers.plain_greedy(PROMPT, 40)
TEXT = helpers.tokenizer().decode(WHOLE)


def completion(**changes: Any) -> Any:
    return helpers.only(helpers.engine(), PROMPT, helpers.greedy(max_tokens=40, **changes))


def steps_to(text: str) -> int:
    """Tokens of the greedy output until its text holds `text`."""
    return next(n for n in range(1, 41) if text in helpers.tokenizer().decode(WHOLE[:n]))


def settled() -> str:
    """Two characters of the greedy text that stand in it once, past the middle."""
    pairs = [TEXT[at : at + 2] for at in range(len(TEXT) // 2, len(TEXT) - 2)]
    return next(pair for pair in pairs if TEXT.count(pair) == 1 and "\ufffd" not in pair)


def test_greedy_text_is_the_decoded_tokens() -> None:
    found = completion()
    assert (found.token_ids, found.text, found.finish_reason) == (WHOLE, TEXT, "length")


@pytest.mark.parametrize("keep", [False, True])
def test_a_stop_string_cuts_the_text_but_not_the_tokens(keep: bool) -> None:
    stop = settled()
    found = completion(stop=["\0", stop], include_stop_str_in_output=keep)
    assert (found.finish_reason, found.stop_reason) == ("stop", stop)
    assert found.text == TEXT[: TEXT.index(stop) + (len(stop) if keep else 0)]
    assert found.token_ids == WHOLE[: steps_to(stop)]


def test_a_stop_string_complete_at_the_last_token_is_a_stop() -> None:
    stop = settled()
    found = helpers.only(helpers.engine(), PROMPT, helpers.greedy(max_tokens=steps_to(stop), stop=stop))
    assert (found.finish_reason, found.stop_reason, found.text) == ("stop", stop, TEXT[: TEXT.index(stop)])
    one_less = helpers.greedy(max_tokens=steps_to(stop) - 1, stop=stop)
    found = helpers.only(helpers.engine(), PROMPT, one_less)
    assert found.finish_reason == "length"
    assert found.text == helpers.tokenizer().decode(found.token_ids)  # what was held back is released


def test_min_tokens_lets_an_early_stop_string_pass() -> None:
    stop = settled()
    found = completion(stop=stop, min_tokens=steps_to(stop) + 1)
    assert (found.finish_reason, found.token_ids, found.text) == ("length", WHOLE, TEXT)
    seen = [""]
    engine = helpers.engine()
    engine.add(PROMPT, helpers.greedy(max_tokens=40, stop=stop, min_tokens=steps_to(stop) + 1))
    while engine.has_unfinished():
        seen += [output.outputs[0].text for output in engine.step()]
        assert seen[-1].startswith(seen[-2])


def test_stop_token_ids_end_it_and_are_told() -> None:
    end = WHOLE[5]
    first = WHOLE.index(end) + 1
    found = completion(stop_token_ids=[end])
    assert (found.token_ids, found.finish_reason, found.stop_reason) == (WHOLE[:first], "stop", end)
    assert found.text == helpers.tokenizer().decode(WHOLE[: first - 1])
    shown = completion(stop_token_ids=[end], skip_special_tokens=False)
    assert shown.text == helpers.tokenizer().decode(WHOLE[:first])


def test_the_models_own_end_token() -> None:
    end = helpers.tokenizer().stop_token_ids[1]
    always = {end: 1000.0}
    engine = helpers.engine()
    found = helpers.only(engine, PROMPT, SamplingParams(temperature=0, logit_bias=always))
    assert (found.token_ids, found.text, found.finish_reason, found.stop_reason) == ([end], "", "stop", None)
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, logit_bias=always, ignore_eos=True, max_tokens=4)
        found = helpers.only(engine, PROMPT, params)
        assert (found.token_ids, found.finish_reason) == ([end] * 4, "length")
        params = SamplingParams(temperature=temperature, logit_bias=always, min_tokens=3, max_tokens=9, seed=1)
        found = helpers.only(engine, PROMPT, params)
        assert len(found.token_ids) == 4
        assert found.token_ids[3] == end
        assert not set(found.token_ids[:3]) & set(helpers.tokenizer().stop_token_ids)


def test_an_end_token_as_stop_string_is_not_shown() -> None:
    end = helpers.tokenizer().stop_token_ids[1]
    text = helpers.tokenizer().token_of(end)
    assert text is not None
    params = SamplingParams(temperature=0, logit_bias={end: 1000.0}, stop=text, skip_special_tokens=False)
    assert helpers.only(helpers.engine(), PROMPT, params).text == ""


def test_the_tail_held_back_for_a_stop_string_comes_out_at_the_end() -> None:
    end = WHOLE[5]
    before = helpers.tokenizer().decode(WHOLE[: WHOLE.index(end)])
    found = completion(stop_token_ids=[end], stop=before[-1] + "\0 never")
    assert found.text == before


def test_max_tokens_none_fills_the_context() -> None:
    engine = helpers.engine(max_model_len=30)
    found = helpers.only(engine, PROMPT, helpers.greedy(max_tokens=None))
    assert len(found.token_ids) == 30 - len(PROMPT)
    assert found.finish_reason == "length"


SEEDED = SamplingParams(temperature=1.3, top_p=0.9, seed=42, max_tokens=20, ignore_eos=True)


def test_a_seed_gives_one_output_whoever_else_runs() -> None:
    alone = helpers.only(helpers.engine(seed=1), PROMPT, SEEDED)
    others = [(helpers.prompt(30, seed), SamplingParams(max_tokens=25, ignore_eos=True)) for seed in range(5)]
    requests = [*others[:3], (PROMPT, SEEDED), *others[3:], (PROMPT, SEEDED)]
    for options in ({}, {"kv_cache_tokens": 120}, {"max_num_batched_tokens": 5}, {"max_num_seqs": 2}):
        outputs = helpers.run(helpers.engine(seed=2, **options), requests)
        assert outputs[3].outputs[0].token_ids == outputs[6].outputs[0].token_ids == alone.token_ids


def test_unseeded_requests_follow_the_engines_seed() -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True)

    def outputs(seed: int) -> list[list[int]]:
        return [o.outputs[0].token_ids for o in helpers.run(helpers.engine(seed=seed), [(PROMPT, params)] * 3)]

    first = outputs(1)
    assert first == outputs(1) != outputs(2)
    assert len({tuple(ids) for ids in first}) == 3


def test_completions_of_neighbouring_seeds_have_nothing_in_common() -> None:
    requests = [(PROMPT, SamplingParams(n=4, seed=seed, max_tokens=12, ignore_eos=True)) for seed in range(4)]
    outputs = helpers.run(helpers.engine(), requests)
    ids = [tuple(found.token_ids) for output in outputs for found in output.outputs]
    assert len(set(ids)) == 16
    assert [found.index for found in outputs[0].outputs] == [0, 1, 2, 3]


def test_first_tokens_of_many_seeds_follow_the_softmax() -> None:
    logits = helpers.plain_logprobs(PROMPT)[-1] / 2
    best = logits.topk(6)
    params = {"temperature": 2.0, "top_k": 6, "max_tokens": 1, "ignore_eos": True}
    requests = [(PROMPT, SamplingParams(n=50, seed=seed, **params)) for seed in range(40)]
    engine = helpers.engine(max_num_seqs=500, kv_cache_tokens=10_000)
    drawn = [found.token_ids[0] for output in helpers.run(engine, requests) for found in output.outputs]
    expected = best.values.softmax(-1).double() * len(drawn)
    observed = torch.tensor([drawn.count(token) for token in best.indices.tolist()]).double()
    assert observed.sum() == len(drawn)
    assert float(((observed - expected) ** 2 / expected).sum()) < 20.5  # 5 degrees of freedom, once in a thousand


OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_num_batched_tokens": 1},
    {"max_num_batched_tokens": 7},
    {"kv_cache_tokens": 48, "max_num_batched_tokens": 20},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logprobs_equal_a_plain_forward(options: dict[str, Any]) -> None:
    """Also in parts and after preemption. The prompt's are about the prompt without its first token."""
    params = helpers.greedy(max_tokens=12, logprobs=3, prompt_logprobs=2, n=2, repetition_penalty=1.5)
    ids = helpers.prompt(30, 4)
    for output in helpers.run(helpers.engine(**options), [(ids, params)] * 2):
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == len(ids)
        assert output.prompt_logprobs[0] is None
        for found in output.outputs:
            assert found.logprobs is not None
            table = helpers.plain_logprobs([*ids, *found.token_ids])
            check(output.prompt_logprobs[1:], ids[1:], table[: len(ids) - 1], 2)
            check(found.logprobs, found.token_ids, table[len(ids) - 1 :], 3)
            total = sum(entry[token].logprob for entry, token in zip(found.logprobs, found.token_ids, strict=True))
            assert found.cumulative_logprob == pytest.approx(total)


def check(entries: list[Any], tokens: list[int], table: torch.Tensor, count: int) -> None:
    for entry, token, row in zip(entries, tokens, table, strict=False):
        order = row.argsort(descending=True).tolist()
        assert set(entry) == {token, *order[:count]}
        for other, logprob in entry.items():
            assert logprob.logprob == pytest.approx(float(row[other]), abs=1e-4)
            assert logprob.rank == order.index(other) + 1


def test_outputs_of_a_step_grow_and_are_each_others_prefix() -> None:
    engine = helpers.engine()
    engine.add(PROMPT, helpers.greedy(max_tokens=20, n=2, logprobs=0))
    before: RequestOutput | None = None
    while engine.has_unfinished():
        (output,) = engine.step()
        for index, found in enumerate(output.outputs):
            assert found.logprobs is not None
            assert len(found.logprobs) == len(found.token_ids)
            if before is not None:
                old = before.outputs[index]
                assert found.token_ids[: len(old.token_ids)] == old.token_ids
                assert found.text.startswith(old.text)
        before = output
    assert before is not None
    assert before.finished


@pytest.mark.parametrize("temperature", [0.0, 1e-8, 1.0])
def test_when_no_token_can_be_chosen_the_request_ends_with_an_error(temperature: float) -> None:
    banned = dict.fromkeys(range(helpers.VOCABULARY), -math.inf)
    engine = helpers.engine()
    params = SamplingParams(temperature=temperature, logit_bias=banned, logprobs=1)
    bad, good = helpers.run(engine, [(PROMPT, params), (PROMPT, helpers.greedy(max_tokens=40))])
    (found,) = bad.outputs
    assert (found.finish_reason, found.token_ids, found.text, found.logprobs) == ("error", [], "", [])
    assert found.error is not None
    assert "no token can be chosen" in found.error
    assert good.outputs[0].token_ids == WHOLE
    one_left = {token: bias for token, bias in banned.items() if token != 77}
    params = SamplingParams(temperature=temperature, logit_bias=one_left, max_tokens=3, top_p=1e-9, top_k=1, min_p=1.0)
    assert helpers.only(engine, PROMPT, params).token_ids == [77] * 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_gives_nan_is_an_error_and_not_a_token(temperature: float) -> None:
    broken = tiny.model()
    with torch.no_grad():
        broken.norm.weight[0] = math.nan
    engine = Engine(broken, helpers.tokenizer(), kv_cache_tokens=64)
    found = helpers.only(engine, PROMPT, SamplingParams(temperature=temperature))
    assert (found.finish_reason, found.token_ids) == ("error", [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_from_prompt_to_scores(dtype: torch.dtype) -> None:
    model = tiny.model().to(dtype)
    engine = Engine(model, helpers.tokenizer(), kv_cache_tokens=64, max_num_batched_tokens=9)
    params = SamplingParams(temperature=1.0, seed=0, max_tokens=10, logprobs=1, prompt_logprobs=0, ignore_eos=True)
    for output in helpers.run(engine, [(PROMPT, params), (helpers.prompt(20, 1), params)]):
        (found,) = output.outputs
        assert len(found.token_ids) == 10
        assert found.logprobs is not None
        with torch.inference_mode():
            table = model(torch.tensor([*output.prompt_token_ids, *found.token_ids])).float().log_softmax(-1)
        for at, (entry, token) in enumerate(zip(found.logprobs, found.token_ids, strict=True)):
            row = table[len(output.prompt_token_ids) - 1 + at]
            assert entry[token].logprob == pytest.approx(float(row[token]), abs=0.5)


def _counts(ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.long).bincount(minlength=helpers.VOCABULARY)


def test_penalties_count_prompt_and_output_as_they_should() -> None:
    """Repetition counts both, presence and frequency the output alone, at each step anew."""
    params = helpers.greedy(
        max_tokens=20, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.7, logit_bias={9: 3.0}
    )
    found = helpers.only(helpers.engine(), PROMPT, params)
    sequence = list(PROMPT)
    with torch.inference_mode():
        for _ in range(20):
            logits = helpers.model()(torch.tensor(sequence))[-1]
            logits = torch.where(logits > 0, logits / 1.4, logits * 1.4).where(_counts(sequence) > 0, logits)
            output = _counts(sequence[len(PROMPT) :])
            logits = logits - output * 0.7 - (output > 0) * 0.5
            logits[9] += 3.0
            sequence.append(int(logits.argmax()))
    assert found.token_ids == sequence[len(PROMPT) :]
    assert found.token_ids != WHOLE[:20]

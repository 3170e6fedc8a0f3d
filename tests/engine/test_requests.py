"""Requests and options that cannot be served are refused by name, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import helpers
from gristmill.core import SamplingParams
from gristmill.engine.llm import LLM
from gristmill.errors import GristmillError, RequestError

LONG = "context_length_exceeded"


@pytest.mark.parametrize(
    ("prompt", "changes", "field", "code"),
    [
        ("", {}, "prompt", None),
        ([], {}, "prompt", None),
        ([5] * 64, {"max_tokens": 1}, "prompt", LONG),
        ([5] * 500, {}, "prompt", LONG),
        ([5] * 60, {"max_tokens": 5}, "max_tokens", LONG),
        ([5], {"max_tokens": 10**9}, "max_tokens", LONG),
        ([5], {"max_tokens": None, "min_tokens": 64}, "min_tokens", LONG),
        ([5, -1], {}, "prompt", None),
        ([5, 300], {}, "prompt", None),
        ([5, 1.5], {}, "prompt", None),
        ([5, "a"], {}, "prompt", None),
        ([5, None], {}, "prompt", None),
        ([[5]], {}, "prompt", None),
        ([5], {"stop_token_ids": [300]}, "stop_token_ids", None),
        ([5], {"stop_token_ids": ["x"]}, "stop_token_ids", None),
        ([5], {"logit_bias": {-1: 1.0}}, "logit_bias", None),
        ([5], {"logit_bias": {"5": 1.0}}, "logit_bias", None),
        ([5], {"logit_bias": {5: float("nan")}}, "logit_bias", None),
        ([5], {"logit_bias": {5: float("inf")}}, "logit_bias", None),
        ([5], {"logit_bias": {5: 1e300}}, "logit_bias", None),
        ([5], {"logit_bias": {5: "1"}}, "logit_bias", None),
        ([5], {"logit_bias": [5]}, "logit_bias", None),
        ([5], {"stop_token_ids": 5}, "stop_token_ids", None),
        ([5], {"stop": [1]}, "stop", None),
        ([5], {"stop": 5}, "stop", None),
        ([5], {"stop": b"x"}, "stop", None),
        ([5], {"bad_words": 5}, "bad_words", None),
        ([5], {"ignore_eos": "no"}, "ignore_eos", None),
        ([5], {"temperature_last": "x"}, "temperature_last", None),
        ([5], {"seed": 1 << 63}, "seed", None),
        ([5], {"seed": -(1 << 63) - 1}, "seed", None),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused(prompt: Any, changes: dict[str, Any], field: str, code: str | None) -> None:
    engine = helpers.engine(kv_cache_tokens=64)
    with pytest.raises(RequestError) as caught:
        engine.add(prompt, SamplingParams(**changes))
    assert (caught.value.field, caught.value.code) == (field, code)
    assert not engine.has_unfinished()
    engine.check_integrity()


def test_a_request_id_is_used_once_at_a_time() -> None:
    engine = helpers.engine()
    assert engine.add([5], helpers.greedy(), request_id="mine") == "mine"
    with pytest.raises(RequestError, match="mine"):
        engine.add([6], helpers.greedy(), request_id="mine")
    engine.abort("mine")
    engine.add([6], helpers.greedy(), request_id="mine")
    engine.abort("mine")
    assert not engine.has_unfinished()


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(GristmillError, match="surrogate"):
        helpers.engine().add("a\ud800", helpers.greedy())


@pytest.mark.parametrize("seed", [0, -1, (1 << 63) - 1, -(1 << 63)])
def test_any_signed_64_bit_seed_is_taken(seed: int) -> None:
    params = SamplingParams(seed=seed, n=3, max_tokens=3, ignore_eos=True)
    (output,) = helpers.run(helpers.engine(), [([5], params)])
    assert all(len(completion.token_ids) == 3 for completion in output.outputs)


@pytest.mark.parametrize("name", ["max_model_len", "kv_cache_tokens", "max_num_seqs", "max_num_batched_tokens"])
@pytest.mark.parametrize("value", [0, -1])
def test_engine_options_are_at_least_one(name: str, value: int) -> None:
    with pytest.raises(RequestError) as caught:
        helpers.engine(**{name: value})
    assert caught.value.field == name


@pytest.mark.parametrize("options", [{"max_model_len": 129}, {"max_model_len": 65, "kv_cache_tokens": 64}], ids=str)
def test_a_context_beyond_the_models_or_the_memory_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(RequestError) as caught:
        helpers.engine(**options)
    assert caught.value.field == "max_model_len"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(helpers.save(tmp_path_factory.mktemp("model")), kv_cache_tokens=256, fast_kernels=False)


def test_an_unknown_engine_option_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="max_num_sequences"):
        LLM(helpers.save(tmp_path), max_num_sequences=3)


def test_one_bad_prompt_runs_none_and_leaves_nothing(llm: LLM) -> None:
    with pytest.raises(RequestError):
        llm.generate(["once", [5, 6], "", "twice"], helpers.greedy())
    assert not llm.engine.has_unfinished()
    assert llm.engine.pool.num_free == llm.engine.pool.num_blocks
    llm.engine.check_integrity()


def test_a_failure_in_a_step_leaves_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "_forward", fail)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["once", "twice"], helpers.greedy(n=2))
    assert not llm.engine.has_unfinished()
    llm.engine.check_integrity()
    assert llm.generate("once", helpers.greedy())[0].finished


def test_requests_of_others_neither_end_nor_join_a_call(llm: LLM) -> None:
    other = llm.engine.add([5], helpers.greedy(max_tokens=1))
    (output,) = llm.generate([[7, 8]], helpers.greedy(max_tokens=5))
    assert output.prompt_token_ids == [7, 8]
    assert len(output.outputs[0].token_ids) == 5
    llm.engine.abort(other)


def test_arrays_and_tensors_are_ids(llm: LLM) -> None:
    expected = llm.generate([[5, 6, 7]], helpers.greedy())[0].outputs[0].token_ids
    for prompts in (
        np.array([5, 6, 7]),
        torch.tensor([5, 6, 7]),
        list(np.array([5, 6, 7])),
        list(torch.tensor([5, 6, 7])),
        [np.array([5, 6, 7])],
        [torch.tensor([5, 6, 7])],
        torch.tensor([[5, 6, 7]]),
        (5, 6, 7),
        [(5, 6, 7)],
    ):
        (output,) = llm.generate(prompts, helpers.greedy())  # type: ignore[arg-type]
        assert output.outputs[0].token_ids == expected
        assert [type(token) for token in output.prompt_token_ids] == [int] * 3


@pytest.mark.parametrize("field", ["prompt", "completion"])
def test_scores_refuse_what_is_not_there(llm: LLM, field: str) -> None:
    for bad in ("", [], [5, 300], [-1], [1.5]):
        pair: dict[str, Any] = {"prompt": [5], "completion": [6], field: bad}
        with pytest.raises(RequestError) as caught:
            llm.score(pair["prompt"], pair["completion"])
        assert caught.value.field == field
    with pytest.raises(RequestError) as caught:
        llm.score([5] * 100, [6] * 100)
    assert caught.value.code == LONG
    with pytest.raises(RequestError):
        llm.embed(["fine", ""])
    with pytest.raises(RequestError, match="text 1"):
        llm.embed(["fine", "x y " * 200])


def test_a_step_that_fails_costs_no_request_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part of a step fails now and then; the tokens are those of an undisturbed run."""
    engine = helpers.engine(kv_cache_tokens=64, block_size=4, max_num_batched_tokens=8)
    prompts = [helpers.prompt(11, seed) for seed in range(3)]
    wanted = [helpers.plain_greedy(prompt, 6) for prompt in prompts]
    order = [engine.add(prompt, helpers.greedy(max_tokens=6, n=2, logprobs=0)) for prompt in prompts]
    calls = 0

    def failing(function: Any) -> Any:
        def call(*options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls % 5 == 0:
                raise MemoryError("no more")
            return function(*options)

        return call

    monkeypatch.setattr(engine.runner, "hidden_states", failing(engine.runner.hidden_states))
    monkeypatch.setattr(engine.runner, "logits", failing(engine.runner.logits))
    monkeypatch.setattr(engine.chooser.sampler, "sample", failing(engine.chooser.sampler.sample))
    monkeypatch.setattr(engine.chooser, "_take", failing(engine.chooser._take))
    found = {}
    for _ in range(300):
        try:
            outputs = engine.step()
        except MemoryError:
            outputs = []
        engine.check_integrity()
        found |= {output.request_id: [c.token_ids for c in output.outputs] for output in outputs if output.finished}
    assert [found[request] for request in order] == [[tokens] * 2 for tokens in wanted]
    assert not engine.has_unfinished()
    assert engine.pool.num_free == engine.pool.num_blocks


def test_a_processor_of_the_engine_concerns_plain_greedy_requests_too() -> None:
    class Only:
        is_argmax_invariant = False

        def validate(self, params: SamplingParams) -> None: ...

        def update(self, change: Any) -> None: ...

        def apply(self, logits: torch.Tensor, rows: Any) -> torch.Tensor:
            return torch.zeros_like(logits).index_fill(1, torch.tensor([7]), 1.0)

    engine = helpers.engine(processors=[Only()])
    assert helpers.only(engine, [5], helpers.greedy(max_tokens=3)).token_ids == [7, 7, 7]


def test_more_completions_than_memory_could_hold_are_refused() -> None:
    with pytest.raises(RequestError, match="at most 4096") as refused:
        helpers.engine().add(helpers.prompt(3), SamplingParams(n=10**9))
    assert refused.value.field == "n"

"""Requests with different adapters in one engine: each gets what the model with that adapter merged into it says."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import helpers
from engine.helpers import greedy, prompt
from engine.speculation.models import drafter
from gristmill.core import SamplingParams
from gristmill.engine.encoder_decoder import torch_runner
from gristmill.engine.engine import Engine
from gristmill.engine.llm import LLM
from gristmill.engine.native import build
from gristmill.engine.request import Standing
from gristmill.engine.runner import Runner, TorchRunner
from gristmill.engine.speculation.adaptive import AdaptiveProposer
from gristmill.engine.speculation.draft_model import DraftModelProposer
from gristmill.engine.speculation.early_exit import EarlyExitProposer
from gristmill.engine.speculation.ngram import NgramProposer
from gristmill.errors import RequestError
from gristmill.model.lora.low_rank import merge
from gristmill.model.lora.peft import save_lora
from gristmill.model.transformer import Transformer
from model import tiny
from model.lora import adapters

SEEDS = (0, 1, 2)
native_only = pytest.mark.skipif(build.native_refusal() is not None, reason=str(build.native_refusal()))


@functools.cache
def lora(seed: int) -> Any:
    return adapters.lora(seed, ranks=(2, 5), names=adapters.NAMES[seed:])


@functools.cache
def merged(seed: int | None) -> Transformer:
    """The model with an adapter in its weights; None for none. Shared: do not change it."""
    model = tiny.model()
    if seed is not None:
        merge(model, lora(seed))
    return model


@functools.cache
@torch.no_grad()
def says(seed: int | None, ids: tuple[int, ...], count: int) -> list[int]:
    """The greedy tokens of the merged model, without an engine."""
    sequence = list(ids)
    for _ in range(count):
        sequence.append(int(merged(seed)(torch.tensor(sequence))[-1].argmax()))
    return sequence[len(ids) :]


def engine(seeds: Sequence[int] = SEEDS, **options: Any) -> Engine:
    """An engine with the adapters "0", "1" ... of these seeds."""
    made = helpers.engine(**options)
    for seed in seeds:
        made.load_adapter(str(seed), lora(seed))
    return made


def finish(target: Engine) -> dict[str, Any]:
    """Step until all is done; the engine must be empty and whole afterwards."""
    done: dict[str, Any] = {}
    while target.has_unfinished():
        done |= {output.request_id: output for output in target.step() if output.finished}
        target.check_integrity()
    assert target.pool.num_free == target.pool.num_blocks
    return done


@pytest.mark.parametrize(
    "options", [{}, {"block_size": 4, "kv_cache_tokens": 120, "max_num_batched_tokens": 9}], ids=["roomy", "tight"]
)
def test_a_mixed_batch_gives_each_request_its_own_tokens(options: dict[str, Any]) -> None:
    made, expected = engine(**options), {}
    for number in range(9):
        seed, ids = (*SEEDS, None)[number % 4], prompt(11 + number % 3)
        request = made.add(ids, greedy(n=1 + number % 2), adapter=None if seed is None else str(seed))
        expected[request] = [says(seed, tuple(ids), 8)] * (1 + number % 2)
    found = finish(made)
    assert {key: [o.token_ids for o in found[key].outputs] for key in expected} == expected
    assert len({str(says(seed, tuple(prompt(11)), 8)) for seed in (*SEEDS, None)}) == 4


@settings(max_examples=25)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.sampled_from(["a", "b", None]), st.integers(3, 30)),
            st.tuples(st.just("load"), st.sampled_from(["a", "b"]), st.sampled_from(SEEDS)),
            st.tuples(st.just("step"), st.just(None), st.integers(1, 4)),
            st.tuples(st.just("abort"), st.just(None), st.integers(0, 5)),
            st.tuples(st.just("unload"), st.sampled_from(["a", "b"]), st.just(0)),
        ),
        min_size=4,
        max_size=24,
    ),
    st.sampled_from([{}, {"block_size": 4, "kv_cache_tokens": 100, "max_num_batched_tokens": 13}]),
)
def test_adapters_are_swapped_under_load(program: list[tuple[str, str | None, int]], options: dict[str, Any]) -> None:
    """Whatever is loaded, replaced and forgotten meanwhile, a request ends with the adapter it began with."""
    made = helpers.engine(**{"block_size": 8, **options})
    loaded: dict[str | None, int | None] = {None: None}
    expected: dict[str, tuple[str | None, list[int]]] = {}
    found: dict[str, list[int]] = {}

    def step() -> None:
        for output in made.step():
            if output.finished:
                found[output.request_id] = output.outputs[0].token_ids
        made.check_integrity()

    for action, name, number in program:
        busy = any(name == used for key, (used, _) in expected.items() if key not in found)
        if action == "load":
            made.load_adapter(str(name), lora(number))
            loaded[name] = number
        elif action == "step":
            for _ in range(number):
                step()
        elif action == "abort" and expected:
            key = list(expected)[number % len(expected)]
            if key not in found:
                made.abort(key)
                del expected[key]
        elif action == "add" and name in loaded:
            ids = prompt(number)  # of one seed: they begin alike
            expected[made.add(ids, greedy(max_tokens=6), adapter=name)] = name, says(loaded[name], tuple(ids), 6)
        elif action == "unload" and name in loaded and not busy:
            made.unload_adapter(str(name))
            del loaded[name]
        elif action in ("unload", "add") and (name not in loaded or action == "unload"):
            with pytest.raises(RequestError, match="not loaded" if name not in loaded else "in use") as caught:
                made.unload_adapter(str(name)) if action == "unload" else made.add([5], greedy(), adapter=name)
            assert caught.value.field == "adapter"
    while made.has_unfinished():
        step()
    assert {key: found[key] for key in expected} == {key: tokens for key, (_, tokens) in expected.items()}
    assert made.pool.num_free == made.pool.num_blocks


def test_cached_prompts_are_shared_within_one_loading_of_an_adapter_only() -> None:
    made, ids = engine(block_size=4), prompt(17)

    def cached(adapter: str | None, cache_salt: str | None = None) -> int:
        request = made.add(ids, greedy(), adapter=adapter, standing=Standing(cache_salt=cache_salt))
        output = finish(made)[request]
        assert output.outputs[0].token_ids == says(None if adapter is None else int(adapter), tuple(ids), 8)
        return output.num_cached_tokens

    assert [cached(None), cached("0"), cached("1")] == [0, 0, 0]
    assert [cached(None), cached("0"), cached("1")] == [16, 16, 16]
    assert [cached("0", "mine"), cached("0", "mine"), cached("1", "mine"), cached(None, "mine")] == [0, 16, 0, 0]
    made.load_adapter("1", lora(1))
    assert cached("0") == 16
    assert cached("1") == 0
    made.unload_adapter("0")
    made.load_adapter("0", lora(0))
    assert cached("0") == 0


@pytest.mark.parametrize("kind", ["ngram", "early exit", "draft model"])
def test_drafts_without_adapters_change_no_token(kind: str) -> None:
    made = engine(block_size=8)
    if kind == "draft model":
        runner = TorchRunner(drafter(), num_blocks=made.pool.num_blocks, block_size=8, kv_dtype=torch.float32)
        proposer: Any = DraftModelProposer(
            runner, vocab_size=helpers.VOCABULARY, context=drafter().config.context, block_size=8
        )
    else:
        proposer = NgramProposer(min_n=1) if kind == "ngram" else EarlyExitProposer(made.runner, layers=2)
    made.speculate(AdaptiveProposer(proposer, adaptive=False))
    expected = {}
    for seed in (0, None, 1):
        ids = prompt(7) * 2
        expected[made.add(ids, greedy(max_tokens=20), adapter=None if seed is None else str(seed))] = says(
            seed, tuple(ids), 20
        )
    found = finish(made)
    assert {key: found[key].outputs[0].token_ids for key in expected} == expected
    assert made.metrics.drafted_tokens > 0


@torch.no_grad()
def test_probabilities_of_prompt_and_output_are_those_with_the_adapter() -> None:
    made, ids = engine(), prompt(9)
    request = made.add(ids, greedy(logprobs=0, prompt_logprobs=0), adapter="2")
    output = finish(made)[request]
    whole = ids + output.outputs[0].token_ids
    expected = merged(2)(torch.tensor(whole)).log_softmax(-1)[:-1].gather(1, torch.tensor(whole)[1:, None])[:, 0]
    found = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
    found += [
        entry[token].logprob
        for entry, token in zip(output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True)
    ]
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-4)


def test_the_operations_of_an_adapter_count() -> None:
    made = engine()
    plain, adapted = (made.add(prompt(9), greedy(max_tokens=None, max_flops=4e6), adapter=one) for one in (None, "0"))
    found = finish(made)
    assert 0 < len(found[adapted].outputs[0].token_ids) < len(found[plain].outputs[0].token_ids) < 100


def test_refusals_name_the_adapter() -> None:
    made = engine()
    with pytest.raises(RequestError, match=r"'01' is not loaded \(loaded: 0, 1, 2\)") as caught:
        made.add(prompt(4), greedy(), adapter="01")
    assert caught.value.field == "adapter"
    with pytest.raises(RequestError, match="needs a name"):
        made.load_adapter("", lora(0))
    other = replace(lora(0), config=tiny.config(num_hidden_layers=2))
    with pytest.raises(RequestError, match="another configuration"):
        made.load_adapter("other", other)
    request = made.add(prompt(4), greedy(), adapter="1")
    made.step()
    with pytest.raises(RequestError, match="'1' is in use by 1 request;"):
        made.unload_adapter("1")
    with pytest.raises(RequestError, match="adapter '1'") as caught:
        made.export(request)
    assert caught.value.field == "adapter"
    made.abort(request)
    made.unload_adapter("1")
    assert list(made.adapters) == ["0", "2"]
    assert not made.has_unfinished()


def test_a_runner_without_a_place_for_adapters_refuses_them() -> None:
    class Plain:
        """All of a runner but `adapt`."""

        def __init__(self, runner: Runner) -> None:
            for name in ("hidden_states", "logits", "greedy", "copy_blocks", "read_blocks", "write_blocks"):
                setattr(self, name, getattr(runner, name))
            self.device, self.kv_bytes_per_token = runner.device, runner.kv_bytes_per_token

    make = torch_runner(helpers.model(), torch.float32)
    made = helpers.engine(runner=lambda blocks, size: Plain(make(blocks, size)))
    with pytest.raises(RequestError, match="Plain computes without adapters"):
        made.load_adapter("0", lora(0))


@pytest.mark.parametrize(
    "fast", [False, pytest.param(True, marks=[pytest.mark.peer, native_only])], ids=["PyTorch", "native"]
)
@torch.no_grad()
def test_llm_generates_chats_and_scores_with_an_adapter(tmp_path: Path, fast: bool) -> None:
    save_lora(lora(1), tmp_path / "adapter")
    llm = LLM(helpers.save(tmp_path / "model"), fast_kernels=fast, response_cache=8)
    assert llm.path.startswith("native") == fast
    llm.load_adapter("one", tmp_path / "adapter")
    ids, params = prompt(9), SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    for adapter, seed in (("one", 1), (None, None), ("one", 1)):
        assert llm.generate(ids, params, adapter=adapter)[0].outputs[0].token_ids == says(seed, tuple(ids), 6)
        score = llm.score(ids, [7, 8, 9], adapter=adapter)
        rows = merged(seed)(torch.tensor([*ids, 7, 8])).log_softmax(-1)[-3:]
        assert score.token_logprobs == pytest.approx([float(rows[i, 7 + i]) for i in range(3)], abs=1e-3)
    conversation = [{"role": "user", "content": "Hello"}]
    rendered = llm.renderer.render_prompt(conversation)
    said = llm.chat(conversation, params, adapter="one")[0].outputs[0].token_ids
    assert said == says(1, tuple(rendered), 6)
    save_lora(lora(2), tmp_path / "adapter")
    llm.load_adapter("one", tmp_path / "adapter")  # nothing that was remembered of the old one is said again
    assert llm.generate(ids, params, adapter="one")[0].outputs[0].token_ids == says(2, tuple(ids), 6)
    with pytest.raises(RequestError, match="'two' is not loaded"):
        llm.score_many([(ids, ids)], adapter="two")

"""Prefill and decoding: what each computes, that together they are generation, and what a shared beginning saves."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from engine import helpers
from gristmill.core import SamplingParams
from gristmill.engine.engine import Engine
from gristmill.engine.llm import LLM
from gristmill.engine.memory.paged_cache import Chunk
from gristmill.engine.request import Standing
from gristmill.engine.runner import TorchRunner
from gristmill.engine.scoring import PackedForward, score_completions
from gristmill.engine.search.paged import PagedHypotheses
from model import tiny

PROMPT = helpers.prompt(21)


def runner(block_size: int = 16) -> TorchRunner:
    return TorchRunner(helpers.model(), num_blocks=40, block_size=block_size, kv_dtype=torch.float32)


def count_forwards(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The lengths of the chunks of each forward from now on."""
    seen: list[list[int]] = []
    original = engine.runner.hidden_states

    def spy(ids: list[int], chunks: list[Chunk]) -> torch.Tensor:
        seen.append([chunk.length for chunk in chunks])
        return original(ids, chunks)

    monkeypatch.setattr(engine.runner, "hidden_states", spy)
    return seen


def test_a_prefill_and_decode_steps_are_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = helpers.engine()
    forwards = count_forwards(engine, monkeypatch)
    wanted = helpers.only(engine, PROMPT, helpers.greedy(max_tokens=8)).token_ids
    assert forwards == [[21]] + [[1]] * 7  # the prefill gives the first token: n tokens take 1 + (n - 1) forwards
    search = PagedHypotheses(
        engine.runner, engine.pool, vocab_size=helpers.VOCABULARY, end_ids=(), max_model_len=engine.max_model_len
    )
    state = search.start(PROMPT)
    tokens = [int(state.logprobs.argmax())]
    for _ in range(7):
        (following,) = search.extend([(state, tokens[-1])])
        search.free([state])
        state = following
        tokens.append(int(state.logprobs.argmax()))
    search.free([state])
    assert tokens == wanted == helpers.plain_greedy(PROMPT, 8)


def test_the_cache_holds_one_entry_for_each_token_but_the_last() -> None:
    engine = helpers.engine()
    engine.add(PROMPT, helpers.greedy(max_tokens=8))
    for made in range(1, 8):
        engine.step()
        (sequence,) = engine.scheduler.running
        assert sequence.num_computed_tokens == len(PROMPT) + made - 1


@torch.inference_mode()
def test_keys_and_values_of_one_pass_are_those_of_token_by_token() -> None:
    once, single, table = runner(), runner(), [3, 1]
    once.hidden_states(PROMPT, [Chunk(table, 0, 21)])
    for place, token in enumerate(PROMPT):
        single.hidden_states([token], [Chunk(table, place, 1)])
    for first, second in zip(once.read_blocks(table), single.read_blocks(table), strict=True):
        assert first.shape[:2] == (tiny.CONFIG.num_hidden_layers, 32)
        assert torch.allclose(first[:, :21], second[:, :21], atol=1e-5)


@pytest.mark.peer
@torch.inference_mode()
def test_keys_and_values_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(helpers.save(tmp_path), dtype=torch.float32).eval()
    kept = theirs(torch.tensor([PROMPT]), use_cache=True).past_key_values
    ours = runner()
    ours.hidden_states(PROMPT, [Chunk([0, 1], 0, 21)])
    keys, values = ours.read_blocks([0, 1])
    for layer in range(tiny.CONFIG.num_hidden_layers):
        assert torch.allclose(keys[layer, :21].transpose(0, 1), kept.layers[layer].keys[0], atol=1e-5)
        assert torch.allclose(values[layer, :21].transpose(0, 1), kept.layers[layer].values[0], atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 2, 7, 16])
def test_cold_and_warm_prefix_caches_give_the_same_tokens_at_every_offset(
    block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = helpers.engine(block_size=block_size)
    params = helpers.greedy(max_tokens=1, logprobs=5)
    helpers.run(engine, [(PROMPT, params)])
    forwards = count_forwards(engine, monkeypatch)
    for shared in range(len(PROMPT) + 1):
        ids = PROMPT[:shared] + helpers.prompt(3, seed=9)
        cold = helpers.only(helpers.engine(block_size=block_size, prefix_caching=False), ids, params)
        forwards.clear()
        warm = helpers.run(engine, [(ids, params)])[0]
        least = shared // block_size * block_size  # earlier rounds may have left more
        assert least <= warm.num_cached_tokens <= len(ids) - 1
        assert forwards == [[len(ids) - warm.num_cached_tokens]]
        assert warm.outputs[0].token_ids == cold.token_ids
        for token, entry in cold.logprobs[0].items():
            assert warm.outputs[0].logprobs[0][token].logprob == pytest.approx(entry.logprob, abs=1e-4)


def test_what_is_reused_is_whole_blocks_and_never_the_last_token() -> None:
    for block_size, reused in ((1, 3), (2, 2)):
        engine = helpers.engine(block_size=block_size)
        helpers.run(engine, [([10, 11, 12, 13], helpers.greedy(max_tokens=1))])
        (found,) = helpers.run(engine, [([10, 11, 12, 19, 20], helpers.greedy(max_tokens=1))])
        assert found.num_cached_tokens == reused
        (same,) = helpers.run(engine, [([10, 11, 12, 13], helpers.greedy(max_tokens=1))])
        assert same.num_cached_tokens == (3 if block_size == 1 else 2)
    assert engine.metrics.prompt_tokens == 13
    assert engine.metrics.cached_prompt_tokens == 4


def test_other_salts_and_prompt_logprobs_reuse_nothing() -> None:
    engine = helpers.engine(block_size=1)

    def cached(salt: str | None, **changes: int) -> int:
        request = engine.add(PROMPT, helpers.greedy(max_tokens=1, **changes), standing=Standing(cache_salt=salt))
        (output,) = [output for output in engine.step() if output.request_id == request]
        return output.num_cached_tokens

    assert [cached("a"), cached("b"), cached("a"), cached(None), cached(None)] == [0, 0, 20, 0, 20]
    assert cached(None, prompt_logprobs=1) == 0


def test_completions_of_one_prompt_share_its_blocks_and_its_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = helpers.engine(block_size=4)
    forwards = count_forwards(engine, monkeypatch)
    engine.add(PROMPT, SamplingParams(n=5, temperature=1.0, seed=1, max_tokens=4, ignore_eos=True))
    engine.step()
    assert forwards == [[21]]
    tables = [sequence.block_table for sequence in engine.scheduler.running]
    assert len(tables) == 5
    assert {tuple(table) for table in tables} == {tuple(tables[0])}  # 21 tokens: five full blocks and a begun one
    engine.step()
    engine.check_integrity()
    assert len({table[5] for table in tables}) == 5  # each writes into a copy of the begun block, one into itself
    assert all(table[:5] == tables[0][:5] for table in tables)
    assert engine.pool.num_blocks - engine.pool.num_free == 10
    while engine.has_unfinished():
        engine.step()
        engine.check_integrity()


def test_chunks_leave_the_same_keys_and_values() -> None:
    kept = []
    for size in (1, 3, 4, 21):
        engine = helpers.engine(max_num_batched_tokens=size)
        helpers.run(engine, [(PROMPT, helpers.greedy(max_tokens=1))])
        blocks, _ = engine.pool.match(PROMPT, b"", 20)
        kept.append([store[:, :16] for store in engine.runner.read_blocks(blocks)])
    for other in kept[1:]:
        for mine, theirs in zip(kept[0], other, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)


def test_prompt_parts_keep_within_the_stretch_of_a_step() -> None:
    engine = helpers.engine(itl_stretch=2.0, max_num_batched_tokens=64)
    running = engine.add(helpers.prompt(3), helpers.greedy(max_tokens=60))
    for _ in range(4):
        engine.step()
    engine.pacing._step, engine.pacing._token = 8.0, 1.0  # seconds: so eight prompt tokens double a step
    engine.pacing.measured = lambda *_: None  # type: ignore[method-assign]
    engine.add(helpers.prompt(60), helpers.greedy(max_tokens=1))
    sizes = []
    for _ in range(9):
        before = engine.metrics.scheduled_tokens
        assert running in {output.request_id for output in engine.step()}
        sizes.append(engine.metrics.scheduled_tokens - before)
    assert sizes == [9] * 7 + [5, 1]


def test_log_probabilities_of_engine_and_trainer_are_the_same_bits() -> None:
    model, ids = helpers.model(), PROMPT
    (score,) = score_completions(PackedForward(model), [(ids[:1], ids[1:])])
    with torch.no_grad():
        logits = model(torch.tensor(ids))[:-1]
    following = torch.tensor(ids[1:])
    trained = logits.gather(1, following[:, None]).squeeze(1) - logits.logsumexp(-1)
    assert score.token_logprobs == trained.tolist()
    assert math.isclose(
        score.logprob, -float(torch.nn.functional.cross_entropy(logits, following, reduction="sum")), rel_tol=1e-5
    )


def test_a_request_that_comes_again_word_for_word_computes_nothing(tmp_path: Path) -> None:
    llm = LLM(helpers.save(tmp_path), fast_kernels=False, response_cache=4)
    (first,) = llm.generate("The river", helpers.greedy(max_tokens=5))
    steps = llm.engine.metrics.steps
    (again,) = llm.generate(first.prompt_token_ids, helpers.greedy(max_tokens=5))
    assert llm.engine.metrics.steps == steps
    assert again.outputs[0].token_ids == first.outputs[0].token_ids
    assert (again.prompt, again.request_id) != (first.prompt, first.request_id)
    llm.generate("The river", helpers.greedy(max_tokens=6))
    assert llm.engine.metrics.steps > steps

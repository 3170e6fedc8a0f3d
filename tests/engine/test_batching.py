"""Greedy tokens do not depend on the batch, the step budget, the pool or who else is running."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from engine import helpers
from gristmill.core import RequestOutput
from gristmill.engine.engine import Engine
from gristmill.engine.request import Standing
from gristmill.engine.scheduling.policies import POLICY_NAMES, policy_named
from gristmill.engine.scheduling.scheduler import Scheduler
from gristmill.engine.scoring import PackedForward, score_completions
from gristmill.engine.speculation.adaptive import AdaptiveProposer
from gristmill.engine.speculation.proposer import Draft, DraftRequest
from gristmill.errors import RequestError

LENGTHS = (3, 40, 1, 17, 16, 65)
COUNTS = (20, 12, 30, 15, 16, 40)
PROMPTS = [helpers.prompt(length, seed) for seed, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return [helpers.plain_greedy(ids, count) for ids, count in zip(PROMPTS, COUNTS, strict=True)]


def count_preemptions(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    original = engine.scheduler._preempt
    monkeypatch.setattr(engine.scheduler, "_preempt", lambda s: (seen.append(len(s.token_ids)), original(s))[1])
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 1},
        {"max_num_batched_tokens": 7},
        {"max_num_batched_tokens": 64},
        {"max_num_seqs": 1},
        {"max_num_seqs": 2, "max_num_batched_tokens": 5},
        {"kv_cache_tokens": 112},
        {"kv_cache_tokens": 106, "max_num_batched_tokens": 13},
        {"kv_cache_tokens": 105, "max_num_batched_tokens": 9, "max_num_seqs": 5},
    ],
    ids=str,
)
def test_greedy_equals_the_plain_loop(
    options: dict[str, Any], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = helpers.engine(**options)
    preempted = count_preemptions(engine, monkeypatch)
    requests = [(ids, helpers.greedy(max_tokens=count)) for ids, count in zip(PROMPTS, COUNTS, strict=True)]
    found = [output.outputs[0].token_ids for output in helpers.run(engine, requests)]
    assert found == expected
    assert bool(preempted) == ("kv_cache_tokens" in options)


@pytest.mark.peer
def test_greedy_equals_transformers_generate(expected: list[list[int]], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(helpers.save(tmp_path), dtype=torch.float32).eval()
    for ids, count, wanted in zip(PROMPTS, COUNTS, expected, strict=True):
        tokens = torch.tensor([ids])
        out = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, num_beams=1,
            max_new_tokens=count, min_new_tokens=count, eos_token_id=None,
        )  # fmt: skip
        assert out[0, len(ids) :].tolist() == wanted


def test_greedy_may_miss_the_most_probable_sequence() -> None:
    model = helpers.bigram_model({10: {20: 0.55, 21: 0.45}, 20: {22: 0.6, 23: 0.4}, 21: {22: 0.8, 23: 0.2}})
    engine = Engine(model, helpers.tokenizer(), kv_cache_tokens=64)
    best = helpers.only(engine, [10], helpers.greedy(max_tokens=2, logprobs=0))
    assert best.token_ids == [20, 22]
    assert best.cumulative_logprob == pytest.approx(-1.108662, abs=1e-4)  # ln .33, though 21 22 has .36
    better, greedy = score_completions(PackedForward(model), [([10], [21, 22]), ([10], [20, 22])])
    assert better.logprob == pytest.approx(-1.021651, abs=1e-4)
    assert greedy.logprob == pytest.approx(best.cumulative_logprob, abs=1e-5)
    assert greedy.is_greedy
    assert not better.is_greedy


def test_greedy_follows_the_likely_words_one_by_one() -> None:
    start, a, b, c, d = 10, 11, 12, 13, 14
    model = helpers.bigram_model({start: {a: 1.0}, a: {b: 0.9, c: 0.1}, b: {c: 0.9, d: 0.1}, c: {d: 0.9, a: 0.1}})
    engine = Engine(model, helpers.tokenizer(), kv_cache_tokens=64)
    found = helpers.only(engine, [start, a], helpers.greedy(max_tokens=3, logprobs=0))
    assert found.token_ids == [b, c, d]
    assert found.cumulative_logprob == pytest.approx(3 * math.log(0.9), abs=1e-4)
    (again,) = score_completions(PackedForward(model), [([start, a], [b, c, d])])
    assert again.logprob == pytest.approx(found.cumulative_logprob, abs=1e-5)


def test_n_completions_finish_whatever_may_run_at_once() -> None:
    engine = helpers.engine(max_num_seqs=2, kv_cache_tokens=64)
    (output,) = helpers.run(engine, [(PROMPTS[0], helpers.greedy(n=7, max_tokens=20))])
    wanted = helpers.plain_greedy(PROMPTS[0], 20)
    assert [completion.token_ids for completion in output.outputs] == [wanted] * 7


@pytest.mark.parametrize("memory", [17, 31, 32, 33, 48])
def test_a_request_as_long_as_the_memory_runs_and_a_longer_one_is_refused(memory: int) -> None:
    engine = helpers.engine(kv_cache_tokens=memory)
    assert engine.max_model_len == memory
    ids = helpers.prompt(5)
    runs = [(ids, helpers.greedy(max_tokens=memory - 5)), (ids, helpers.greedy(max_tokens=None))]
    for output in helpers.run(engine, runs):
        assert output.outputs[0].token_ids == helpers.plain_greedy(ids, memory - 5)
        assert output.outputs[0].finish_reason == "length"
    with pytest.raises(RequestError, match="max_tokens"):
        engine.add(ids, helpers.greedy(max_tokens=memory - 4))
    assert not engine.has_unfinished()


def test_the_oldest_request_is_never_delayed() -> None:
    """One token a step for the oldest, however many newer ones want memory: no starvation, no livelock."""
    engine = helpers.engine(kv_cache_tokens=64, max_num_batched_tokens=32)
    oldest = engine.add(helpers.prompt(4), helpers.greedy(max_tokens=40))
    for seed in range(5):
        engine.add(helpers.prompt(30, seed), helpers.greedy(max_tokens=30))
    lengths = []
    while len(lengths) < 40:
        advanced = {output.request_id: len(output.outputs[0].token_ids) for output in engine.step()}
        engine.check_integrity()
        lengths.append(advanced[oldest])
    assert lengths == list(range(1, 41))
    steps = 0
    while engine.has_unfinished():
        engine.step()
        steps += 1
        assert steps < 2000


def test_requests_are_admitted_in_order_and_within_the_limits() -> None:
    engine = helpers.engine(max_num_seqs=2, max_num_batched_tokens=10)
    order = [engine.add(helpers.prompt(6, seed), helpers.greedy(max_tokens=3)) for seed in range(5)]
    first_seen: list[str] = []
    while engine.has_unfinished():
        scheduled: list[int] = []
        original = engine.scheduler.schedule

        def spy(*options: Any, original: Any = original, scheduled: list[int] = scheduled) -> Any:
            step = original(*options)
            scheduled += [count for _, count in step]
            return step

        engine.scheduler.schedule = spy  # type: ignore[method-assign]
        for output in engine.step():
            if output.request_id not in first_seen:
                first_seen.append(output.request_id)
        engine.scheduler.schedule = original  # type: ignore[method-assign]
        assert sum(scheduled) <= 10
        assert len(scheduled) <= 2
    assert first_seen == order


def test_an_aborted_request_leaves_at_once() -> None:
    engine = helpers.engine(kv_cache_tokens=64)
    ids = [engine.add(helpers.prompt(20, seed), helpers.greedy(max_tokens=20, n=2)) for seed in range(3)]
    for _ in range(3):
        engine.step()
    for request in [*ids, "unknown", ids[0]]:
        engine.abort(request)
        engine.check_integrity()
    assert not engine.has_unfinished()
    assert engine.pool.num_free == engine.pool.num_blocks
    assert engine.step() == []


class RandomDrafts:
    """Proposes the right tokens, wrong ones, or right ones with a wrong tail, whatever chance says."""

    max_tokens = 4

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        drafts = []
        for request in requests:
            right = helpers.plain_greedy(request.token_ids, request.limit)
            kept = self.random.randint(0, request.limit)
            wrong = [
                self.random.randrange(helpers.VOCABULARY) for _ in range(self.random.randint(0, request.limit - kept))
            ]
            drafts.append(Draft(right[:kept] + wrong))
        return drafts

    def forget(self, slot: int) -> None:
        pass


class EngineMachine(RuleBasedStateMachine):
    """Requests come, advance and are aborted in any order, in a pool that holds few of them at once."""

    requests: Bundle[str] = Bundle("requests")

    @initialize(
        block_size=st.sampled_from([1, 5, 16]),
        drafts=st.booleans(),
        prefix_caching=st.booleans(),
        policy=st.sampled_from(POLICY_NAMES),
        prefill_first=st.booleans(),
        budget=st.sampled_from([3, 24]),
    )
    def begin(
        self, block_size: int, drafts: bool, prefix_caching: bool, policy: str, prefill_first: bool, budget: int
    ) -> None:
        self.engine = helpers.engine(
            kv_cache_tokens=80,
            max_num_seqs=4,
            max_num_batched_tokens=budget,
            block_size=block_size,
            prefix_caching=prefix_caching,
            policy=policy_named(policy, prefill_first=prefill_first),
            proposer=AdaptiveProposer(RandomDrafts(block_size), adaptive=False) if drafts else None,
        )
        self.wanted: dict[str, tuple[list[int], int]] = {}

    @rule(
        target=requests,
        length=st.integers(1, 50),
        seed=st.integers(0, 3),
        count=st.integers(1, 25),
        n=st.integers(1, 3),
        user=st.sampled_from("ab"),
        priority=st.integers(-1, 1),
    )
    def add(self, length: int, seed: int, count: int, n: int, user: str, priority: int) -> str:
        ids = helpers.prompt(50, seed)[:length]  # prompts of one seed begin alike
        request = self.engine.add(
            ids, helpers.greedy(max_tokens=count, n=n), standing=Standing(user=user, priority=priority)
        )
        self.wanted[request] = (ids, count)
        return request

    @rule(steps=st.integers(1, 10))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            for output in self.engine.step():
                assert output.request_id in self.wanted
                if output.finished:
                    self.check(output)
            self.whole()

    @rule(target=requests, request=consumes(requests))
    def abort(self, request: str) -> Any:
        self.engine.abort(request)
        self.wanted.pop(request, None)
        return multiple()

    @rule()
    def preempt(self) -> None:
        """As if memory had run out at the worst moment."""
        scheduler = self.engine.scheduler
        if scheduler.running:
            scheduler._preempt(scheduler.running[-1])

    @invariant()
    def whole(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.check_integrity()
        scheduler: Scheduler = self.engine.scheduler
        assert len(scheduler.running) <= 4
        size = self.engine.pool.block_size
        for sequence in scheduler.running:
            spare = len(sequence.block_table) * size - sequence.num_computed_tokens
            assert 0 <= spare < size + RandomDrafts.max_tokens + 1
        assert all(not s.block_table and not s.num_computed_tokens for s in scheduler.waiting)
        assert self.engine.has_unfinished() == bool(self.wanted)

    def check(self, output: RequestOutput) -> None:
        ids, count = self.wanted.pop(output.request_id)
        expected = helpers.plain_greedy(ids, count)
        assert [completion.token_ids for completion in output.outputs] == [expected] * len(output.outputs)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(2000):
            if not self.engine.has_unfinished():
                break
            for output in self.engine.step():
                if output.finished:
                    self.check(output)
        assert not self.wanted
        assert self.engine.pool.num_free == self.engine.pool.num_blocks
        assert self.engine.chooser.num_slots_free == self.engine.chooser.num_slots


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=14, stateful_step_count=16, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)

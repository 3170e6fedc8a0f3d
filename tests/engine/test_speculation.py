"""Speculation through the whole engine: the same tokens, or the same distribution, in fewer steps."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from engine import helpers
from engine.speculation.models import drafter
from gristmill.core import SamplingParams
from gristmill.engine.engine import Engine
from gristmill.engine.runner import TorchRunner
from gristmill.engine.speculation.adaptive import AdaptiveProposer
from gristmill.engine.speculation.draft_model import DraftModelProposer
from gristmill.engine.speculation.early_exit import EarlyExitProposer
from gristmill.engine.speculation.ngram import NgramProposer
from gristmill.engine.speculation.proposer import Proposer
from gristmill.model.transformer import Transformer

KINDS = ("ngram", "draft model", "itself", "early exit")
PROMPTS = [helpers.prompt(length, seed) * 2 for seed, length in enumerate((3, 9, 17))]


def engine(kind: str, **options: Any) -> Engine:
    """An engine that speculates at every step, whether it pays or not."""
    made = helpers.engine(**options)
    made.speculate(AdaptiveProposer(proposer(kind, made), adaptive=False))
    return made


def proposer(kind: str, target: Engine) -> Proposer:
    if kind == "ngram":
        return NgramProposer(min_n=1)
    if kind == "early exit":
        return EarlyExitProposer(target.runner, layers=1)
    model: Transformer = drafter() if kind == "draft model" else helpers.model()
    pool = target.pool
    runner = TorchRunner(model, num_blocks=pool.num_blocks, block_size=pool.block_size, kv_dtype=torch.float32)
    return DraftModelProposer(
        runner, vocab_size=helpers.VOCABULARY, context=model.config.context, block_size=pool.block_size
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"kv_cache_tokens": 112, "max_num_batched_tokens": 9, "block_size": 4}], ids=["roomy", "tight"]
)
def test_greedy_tokens_are_those_without_drafts(kind: str, options: dict[str, Any]) -> None:
    made = engine(kind, **options)
    requests = [(ids, helpers.greedy(max_tokens=24, n=2)) for ids in PROMPTS]
    for output, ids in zip(helpers.run(made, requests), PROMPTS, strict=True):
        assert [c.token_ids for c in output.outputs] == [helpers.plain_greedy(ids, 24)] * 2
    assert made.metrics.drafted_tokens > 0
    if kind == "itself":
        assert made.metrics.accepted_tokens == made.metrics.drafted_tokens


def test_a_model_that_drafts_for_itself_takes_a_fraction_of_the_steps() -> None:
    made = engine("itself")
    helpers.run(made, [(PROMPTS[0], helpers.greedy(max_tokens=25))])
    assert made.metrics.steps == 1 + 24 // 6  # the prompt, then five drafted tokens and the bonus one a step


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_tokens_with_penalties_logprobs_and_drafts(kind: str) -> None:
    params = SamplingParams(
        temperature=0.8, top_p=0.9, seed=5, max_tokens=20, ignore_eos=True, logprobs=2, presence_penalty=0.5,
        frequency_penalty=0.3, no_repeat_ngram_size=3, min_tokens=4,
    )  # fmt: skip
    requests = [(ids, params) for ids in PROMPTS]
    plain = [output.outputs[0] for output in helpers.run(helpers.engine(), requests)]
    found = [output.outputs[0] for output in helpers.run(engine(kind), requests)]
    assert [one.token_ids for one in found] == [one.token_ids for one in plain]
    for one, other in zip(found, plain, strict=True):
        assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-3)


def test_drawn_drafts_leave_the_distribution_as_it_is() -> None:
    """Two tokens after a prompt, of a model whose exact chances are known, drafted by one that has others."""
    chances = {10: {20: 0.5, 21: 0.3, 22: 0.2}, 20: {23: 0.6, 24: 0.4}, 21: {23: 0.2, 24: 0.8}, 22: {23: 0.5, 24: 0.5}}
    others = {10: {20: 0.2, 21: 0.2, 22: 0.6}, 20: {23: 0.1, 24: 0.9}, 21: {23: 0.5, 24: 0.5}, 22: {23: 0.9, 24: 0.1}}
    end = {23: {10: 1.0}, 24: {10: 1.0}}
    target, draft = helpers.bigram_model(chances | end), helpers.bigram_model(others | end)
    made = Engine(target, helpers.tokenizer(), kv_cache_tokens=2048, max_num_seqs=400, seed=3)
    runner = TorchRunner(draft, num_blocks=made.pool.num_blocks, block_size=16, kv_dtype=torch.float32)
    made.speculate(
        AdaptiveProposer(
            DraftModelProposer(runner, vocab_size=helpers.VOCABULARY, context=128, block_size=16), adaptive=False
        )
    )
    # the first token comes from the prompt's own step; drafts begin with the second, so one more token leads
    params = SamplingParams(n=100, temperature=1.0, max_tokens=5, ignore_eos=True)
    counts: Counter[tuple[int, int]] = Counter()
    for _ in range(8):
        for output in helpers.run(made, [([24], params)] * 1):
            for one in output.outputs:
                assert one.token_ids[0] == 10
                counts[one.token_ids[1], one.token_ids[2]] += 1
    assert made.metrics.drafted_tokens > made.metrics.accepted_tokens > 0
    pairs = list(itertools.product((20, 21, 22), (23, 24)))
    expected = [chances[10][a] * chances[a][b] * sum(counts.values()) for a, b in pairs]
    assert sum(counts[pair] for pair in pairs) == sum(counts.values())
    assert chisquare([counts[pair] for pair in pairs], expected).pvalue > 0.001


def test_not_a_number_ends_one_request_and_its_drafts() -> None:
    class Broken:
        is_argmax_invariant = False

        def validate(self, params: SamplingParams) -> None: ...

        def update(self, change: Any) -> None: ...

        def apply(self, logits: torch.Tensor, rows: Any) -> torch.Tensor:
            out = logits.clone()
            for number, row in enumerate(rows):
                if row.slot == 0 and len(row.output_ids) >= 3:
                    out[number] = float("nan")
            return out

    made = helpers.engine(processors=[Broken()])
    made.speculate(AdaptiveProposer(proposer("itself", made), adaptive=False))
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True, logprobs=0)
    bad, good = helpers.run(made, [(PROMPTS[0], params), (PROMPTS[1], params)])
    assert (bad.outputs[0].finish_reason, len(bad.outputs[0].token_ids)) == ("error", 3)
    assert good.outputs[0].token_ids == helpers.plain_greedy(PROMPTS[1], 9)

"""Beam search: worked examples, its limits, normalisation, stopping, batches, and equality with transformers."""

from __future__ import annotations

import functools
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.search.paging import paged, prompt, tiny_model
from engine.search.toys import END, A, B, X, garden_path, random_toy, table
from gristmill.engine.search.beam import BeamSearchParams, beam_search, beam_search_batch, gnmt, length_normalised
from gristmill.engine.search.driver import Choice, Search, run
from gristmill.engine.search.exhaustive import exhaustive_search
from gristmill.engine.search.prune import beam, best
from gristmill.engine.search.single_path import greedy_search
from gristmill.errors import RequestError
from gristmill.model.formats.huggingface import save_huggingface


def params(**changes: Any) -> BeamSearchParams:
    return BeamSearchParams(**{"length_penalty": 0.0, "max_tokens": 5, **changes})


def test_a_beam_of_two_finds_what_greedy_search_misses() -> None:
    (found,) = beam_search(garden_path(), [0], params(width=2))
    assert found.token_ids == [B, X, END]
    assert found.finish_reason == "stop"
    assert math.exp(found.logprob) == pytest.approx(0.36)
    (narrow,) = beam_search(garden_path(), [0], params(width=1))
    assert narrow.token_ids == [A, X, END]


def test_expansions_of_all_parents_are_ranked_together() -> None:
    both = beam_search(garden_path(), [0], params(width=2, n=2))
    assert [result.token_ids for result in both] == [[B, X, END], [A, X, END]]

    def of_one_parent(_: Search, scores: torch.Tensor) -> list[Choice]:
        return best(scores[:1], 2)  # the rule as some texts print it

    toy = garden_path()
    search = Search(prompt_ids=[0], prune=of_one_parent, max_tokens=5, end_ids=toy.end_ids)
    run(toy, [search])
    assert [result.token_ids for result in search.results()] == [[A, X, END]]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), depth=st.integers(1, 5))
def test_a_beam_of_one_is_greedy(seed: int, depth: int) -> None:
    toy = random_toy(5, seed)
    (found,) = beam_search(toy, [0], params(width=1, max_tokens=depth))
    greedy = greedy_search(toy, [0], depth)
    assert greedy is not None
    assert found.token_ids == greedy.token_ids


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_beam_that_prunes_nothing_is_exhaustive(seed: int) -> None:
    toy = random_toy(3, seed)
    every = exhaustive_search(toy, [0], 4, complete_only=False)
    found = beam_search(toy, [0], params(width=40, n=40, max_tokens=4, early_stopping="never"))
    assert [(r.token_ids, r.finish_reason) for r in found] == [(r.token_ids, r.finish_reason) for r in every]


def test_length_normalisation() -> None:
    short, long = (-2.0, 2), (-2.7, 3)
    assert length_normalised(0.0)(*short) > length_normalised(0.0)(*long)
    assert length_normalised(1.0)(*short) == pytest.approx(-1.0)
    assert length_normalised(1.0)(*long) == pytest.approx(-0.9)
    assert gnmt(0.0)(*short) == -2.0
    assert gnmt(1.0)(-2.7, 4) == pytest.approx(-2.7 / (9 / 6))
    assert gnmt(0.6)(-2.7, 1) == pytest.approx(-2.7)  # one token is the unit


def test_the_penalty_on_length_decides_which_output_is_returned() -> None:
    # `0 end` has log-probability -2.0 and two tokens, `1 2 end` has -2.7 and three
    p, q = math.exp(-2.0), math.exp(-2.7)
    toy = table({(): [p, q, 1 - p - q, 0], (1,): [0, 0, 1, 0], (2,): [0.5, 0.5, 0, 0]}, 4, 3)
    for alpha, tokens in ((0.0, [0, 3]), (1.0, [1, 2, 3])):
        found = beam_search(toy, [0], params(width=10, n=10, length_penalty=alpha, early_stopping="never"))
        ours = [result for result in found if result.token_ids in ([0, 3], [1, 2, 3])]
        assert ours[0].token_ids == tokens
        for result in found:
            assert result.score == pytest.approx(result.logprob / len(result.token_ids) ** alpha)
    by_gnmt = beam_search(toy, [0], params(width=10, n=10, length_penalty=0.6, normalisation="gnmt"))
    assert all(r.score == pytest.approx(r.logprob / ((5 + len(r.token_ids)) / 6) ** 0.6) for r in by_gnmt)


def test_a_cut_output_says_so() -> None:
    (found,) = beam_search(garden_path(), [0], params(width=2, max_tokens=2))
    assert found.finish_reason == "length"
    assert found.token_ids == [B, X]


def test_end_tokens_are_ordinary_when_told_so() -> None:
    toy = random_toy(4, seed=1)
    toy.ends_are_final = False
    (found,) = beam_search(toy, [0], params(width=3, max_tokens=6, ignore_eos=True))
    assert len(found.token_ids) == 6
    assert found.finish_reason == "length"


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_ends_at_the_first_step_with_enough_complete_outputs(wanted: int) -> None:
    toy = random_toy(6, seed=8, sharpness=0.3)
    found = beam_search(toy, [0], params(width=3, n=3, max_tokens=12, early_stopping=True, stop_after=wanted))
    # the same beam, watched: how many were finished after each step
    counts: list[int] = []
    watched = Search(
        prompt_ids=[0],
        prune=beam(3),
        max_tokens=12,
        end_ids=toy.end_ids,
        keep=3,
        enough=lambda search: bool(counts.append(len(search.finished))),  # type: ignore[func-returns-value]
    )
    run(toy, [watched])
    first = next(step for step, count in enumerate(counts, 1) if count >= wanted)
    assert len(found[0].cost.levels) == first
    assert len(found) == counts[first - 1] >= wanted
    assert [result.score for result in found] == sorted((result.score for result in found), reverse=True)


def test_not_stopping_early_never_ends_with_a_worse_output() -> None:
    for seed in range(20):
        toy = random_toy(5, seed)
        best = {
            stop: beam_search(toy, [0], params(width=3, max_tokens=8, length_penalty=1.0, early_stopping=stop))[0].score
            for stop in (True, False, "never")
        }
        assert best["never"] >= best[False] >= best[True]


def test_several_prompts_share_forwards_and_find_what_each_finds_alone() -> None:
    prompts = [prompt(5, seed=1), prompt(9, seed=2), prompt(17, seed=3)]
    wanted = params(width=3, n=2, max_tokens=6, ignore_eos=True)
    together, forwards = [], 0
    with paged() as model:
        together = beam_search_batch(model, prompts, wanted)
        forwards = model.runner.calls
    assert forwards == 3 + 5  # a prefill each, then all paths of all prompts at once
    for ids, found in zip(prompts, together, strict=True):
        with paged() as model:
            alone = beam_search(model, ids, wanted)
        assert [r.token_ids for r in found] == [r.token_ids for r in alone]
        assert [r.logprob for r in found] == pytest.approx([r.logprob for r in alone], abs=1e-4)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("width", {"width": 0}),
        ("n", {"width": 2, "n": 3}),
        ("max_tokens", {"max_tokens": 0}),
        ("groups", {"width": 4, "groups": 3}),
        ("length_penalty", {"length_penalty": math.nan}),
        ("normalisation", {"normalisation": "words"}),
        ("early_stopping", {"early_stopping": "soon"}),
        ("stop_after", {"width": 2, "stop_after": 3}),
        ("diversity_penalty", {"diversity_penalty": -1.0, "groups": 2}),
        ("diversity_penalty", {"diversity_penalty": 1.0}),
        ("required", {"required": [[]]}),
        ("required", {"required": [[1]], "groups": 2}),
        ("required", {"required": [[1, 2], [3, 4]], "max_tokens": 3}),
    ],
)
def test_refuses_what_it_cannot_do(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        params(**changes)
    assert caught.value.field == field


@functools.cache
def twin() -> Any:
    """The tiny model as transformers runs it."""
    transformers = pytest.importorskip("transformers")
    with tempfile.TemporaryDirectory() as directory:
        save_huggingface(tiny_model(), Path(directory))
        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.peer
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -0.5])
def test_equals_transformers(early_stopping: Any, length_penalty: float) -> None:
    ends = list(range(0, 300, 5))
    reasons = set()
    for seed, width in ((0, 4), (1, 2), (2, 5)):
        ids = prompt(6 + seed, seed)
        theirs = twin().generate(
            torch.tensor([ids]),
            num_beams=width,
            num_return_sequences=width,
            do_sample=False,
            max_new_tokens=8,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            eos_token_id=ends,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        wanted = params(
            width=width, n=width, max_tokens=8, length_penalty=length_penalty, early_stopping=early_stopping
        )
        with paged(end_ids=ends) as model:
            ours = beam_search(model, ids, wanted)
        assert [result.score for result in ours] == pytest.approx(theirs.sequences_scores.tolist(), abs=1e-4)
        for result, row in zip(ours, theirs.sequences[:, len(ids) :].tolist(), strict=True):
            assert result.token_ids == row[: len(result.token_ids)]
            reasons.add(result.finish_reason)
    assert reasons >= {"stop"}


@pytest.mark.peer
def test_greedy_equals_transformers() -> None:
    ids = prompt(12, 5)
    theirs = twin().generate(torch.tensor([ids]), do_sample=False, num_beams=1, max_new_tokens=12, eos_token_id=-1)
    with paged() as model:
        ours = greedy_search(model, ids, 12)
    assert ours is not None
    assert ours.token_ids == theirs[0, len(ids) :].tolist()

"""Hypotheses on the shared block pool: their distributions, what they share, what is copied, what is refused."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.search.paging import VOCABULARY, Watched, make, paged, prompt, rescored, tiny_model
from engine.search.toys import garden_path
from gristmill.engine.search.beam import BeamSearchParams, beam_search
from gristmill.engine.search.diverse_beam import away_from_earlier_groups
from gristmill.engine.search.paged import PagedHypothesis
from gristmill.engine.search.single_path import sample_outputs
from gristmill.engine.search.stochastic_beam import stochastic_beam_search
from gristmill.errors import RequestError


@torch.inference_mode()
def plain(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the next token and final states, from one forward without a cache."""
    model = tiny_model()
    from gristmill.model.attention.packed import PackedAttention, segment_positions

    device = torch.device("cpu")
    states = model.hidden_states(
        torch.tensor(ids), segment_positions([len(ids)], device), PackedAttention([len(ids)], device)
    )
    return model.logits(states[-1]).log_softmax(-1), states


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    length=st.integers(1, 9),
    block_size=st.sampled_from([1, 2, 4, 8]),
    batched=st.sampled_from([1, 3, 2048]),
)
def test_any_tree_gives_the_distributions_of_plain_forwards(
    seed: int, length: int, block_size: int, batched: int
) -> None:
    """Forks, chains and frees in any order; the pool is checked after each."""
    chance = random.Random(seed)
    ids = prompt(length, seed)
    with paged(num_blocks=400, block_size=block_size, max_num_batched_tokens=batched, keep_hidden=True) as model:
        alive: list[PagedHypothesis] = [model.start(ids)]
        assert alive[0].hidden is not None
        assert alive[0].hidden.shape[0] == length
        for _ in range(6):
            choices = [(chance.choice(alive), chance.randrange(VOCABULARY)) for _ in range(chance.randint(1, 4))]
            alive += model.extend(choices)  # type: ignore[arg-type]
            chance.shuffle(alive)
            drop = chance.randrange(len(alive))
            model.free(alive[:drop])
            alive = alive[drop:]
        for hypothesis in alive:
            logprobs, states = plain([*ids, *hypothesis.token_ids])
            assert torch.allclose(hypothesis.logprobs, logprobs, atol=1e-4)
            assert hypothesis.hidden is not None
            assert torch.allclose(hypothesis.hidden, states[-len(hypothesis.hidden) :], atol=1e-4)
        model.free(alive)


def test_a_fork_shares_all_full_blocks_and_copies_one() -> None:
    with paged(block_size=4) as model:
        root = model.start(prompt(10))
        first, second, third = model.extend([(root, 1), (root, 2), (root, 3)])
        tables = [h.table for h in (root, first, second, third) if isinstance(h, PagedHypothesis)]
        assert all(table[:2] == tables[0][:2] for table in tables)
        assert tables[1] == tables[0]  # the first child writes behind its parent, in place
        assert len({table[2] for table in tables}) == 3
        assert model.blocks_copied == 2
        model.free([root])
        line = [second]
        for token in range(5):  # a chain alone never copies
            line += model.extend([(line[-1], token)])
        assert model.blocks_copied == 2
        model.free([first, third, *line])


def test_a_fork_at_the_end_of_a_block_copies_nothing() -> None:
    with paged(block_size=4) as model:
        root = model.start(prompt(8))
        model.free([root, *model.extend([(root, 1), (root, 2)])])
        assert model.blocks_copied == 0


def test_a_beam_takes_little_more_memory_than_its_paths() -> None:
    wanted = BeamSearchParams(width=4, max_tokens=12, ignore_eos=True)
    with paged(block_size=4) as model:
        beam_search(model, prompt(40), wanted)
        assert model.peak <= model.most_blocks(40, 4, 12)
        assert model.peak < 10 + 4 * 2 * 3 < 4 * 13  # shared prompt; four copies of everything would be 52
        assert model.blocks_copied <= 3 * 11  # at most one block for each path beyond its parent's first child


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_scores_are_those_of_a_plain_forward(block_size: int) -> None:
    ids = prompt(7, seed=4)
    with paged(block_size=block_size, end_ids=range(0, 300, 7)) as model:
        found = beam_search(model, ids, BeamSearchParams(width=4, n=4, max_tokens=8, length_penalty=0.0))
        found += sample_outputs(model, ids, 6, 3, seed=0)
        drawn = stochastic_beam_search(model, ids, 3, 5, seed=1)
    for result in [*found, *drawn]:
        assert result.logprob == pytest.approx(rescored(ids, result.token_ids), abs=1e-4)
        # the difference form: of prompt and output together, less the prompt's
        whole, alone = rescored(ids[:1], ids[1:] + result.token_ids), rescored(ids[:1], ids[1:])
        assert result.logprob == pytest.approx(whole - alone, abs=1e-4)


def test_a_pool_too_small_is_refused_and_left_whole() -> None:
    with paged(num_blocks=6, block_size=4) as model:
        with pytest.raises(RequestError, match="kv_cache_tokens") as caught:
            beam_search(model, prompt(9), BeamSearchParams(width=6, max_tokens=12, ignore_eos=True))
        assert caught.value.field == "width"
        with pytest.raises(RequestError, match="7 more blocks"):
            model.start(prompt(25))
        beam_search(model, prompt(9), BeamSearchParams(width=1, max_tokens=4))


def test_prompts_and_outputs_stay_within_the_context() -> None:
    with paged(max_model_len=8) as model:
        for length in (0, 8):
            with pytest.raises(RequestError) as caught:
                model.start(prompt(8)[:length])
            assert caught.value.field == "prompt"
        with pytest.raises(RequestError) as caught:
            beam_search(model, prompt(6), BeamSearchParams(width=2, max_tokens=4, ignore_eos=True))
        assert caught.value.field == "max_tokens"
        beam_search(model, prompt(6), BeamSearchParams(width=2, max_tokens=3, ignore_eos=True))


@pytest.mark.parametrize("broken", ["hidden_states", "logits"])
def test_a_forward_that_fails_leaves_the_pool_whole(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with paged() as model:
        root = model.start(prompt(5))

        def fail(*_: object) -> torch.Tensor:
            raise RuntimeError("the device is gone")

        with monkeypatch.context() as patch:
            patch.setattr(model.runner, broken, fail)
            with pytest.raises(RuntimeError, match="gone"):
                model.extend([(root, 1), (root, 2)])
            with pytest.raises(RuntimeError, match="gone"):
                model.start(prompt(3))
        model.check_integrity()
        (child,) = model.extend([(root, 1)])
        assert torch.allclose(child.logprobs, plain([*prompt(5), 1])[0], atol=1e-4)
        model.free([root, child])


def test_logits_that_are_no_numbers_are_an_error() -> None:
    with paged() as model:
        model.runner.logits = lambda hidden: torch.full((len(hidden), VOCABULARY), torch.nan)  # type: ignore[method-assign]
        with pytest.raises(RequestError, match="not numbers"):
            model.start(prompt(5))


def test_freed_and_foreign_hypotheses_are_refused() -> None:
    model: Watched = make()
    root = model.start(prompt(5))
    model.free([root])
    with pytest.raises(ValueError, match="freed"):
        model.free([root])
    with pytest.raises(ValueError, match="another model"):
        model.extend([(garden_path().start([0]), 1)])


def test_groups_that_do_not_differ_are_computed_once() -> None:
    with paged() as model:
        beam_search(model, prompt(5), BeamSearchParams(width=6, groups=3, n=6, max_tokens=4, ignore_eos=True))
        assert model.blocks_copied <= 3
    assert away_from_earlier_groups([], 1.0)  # no earlier groups: nothing to be away from

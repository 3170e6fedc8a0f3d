"""A draft model proposes its own continuation, whatever was accepted, shared, copied or preempted before."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from engine.speculation.models import BLOCK_SIZE, BLOCKS, continued, drafter, proposer, request, target
from gristmill.engine.speculation.draft_model import check_same_tokens
from gristmill.engine.speculation.proposer import Draft
from gristmill.engine.speculation.verify import acceptance_rate, verify, verify_greedy
from gristmill.errors import RequestError
from gristmill.tokens.train import train_bpe
from model import tiny

PROMPT = tiny.ids(9).tolist()
TABLE = [7, 3, 11, 0, 20]


def test_a_draft_is_the_models_own_greedy_continuation_in_as_many_forwards() -> None:
    drafts, runner = proposer()
    (draft,) = drafts.propose([request(PROMPT, TABLE)])
    assert draft == Draft(continued(drafter(), PROMPT, 4), None)
    assert runner.forwards == [9, 1, 1, 1]


@pytest.mark.parametrize("accepted", range(5))
def test_after_a_rejection_it_goes_on_as_if_nothing_had_been_cached(accepted: int) -> None:
    drafts, runner = proposer()
    (draft,) = drafts.propose([request(PROMPT, TABLE)])
    correction = (draft.token_ids[accepted] + 1) % 300 if accepted < 4 else 17
    known = [*PROMPT, *draft.token_ids[:accepted], correction]
    runner.forwards.clear()
    (again,) = drafts.propose([request(known, TABLE)])
    assert again.token_ids == continued(drafter(), known, 4)
    # one forward per drafted token; the last of a draft that stood whole was never read
    assert runner.forwards == [2 if accepted == 4 else 1, 1, 1, 1]


def test_a_batch_takes_as_many_forwards_as_its_longest_draft() -> None:
    drafts, runner = proposer(max_tokens=3)
    second = tiny.ids(5, seed=3).tolist()
    requests = [
        request(PROMPT, TABLE, limit=9),
        request(second, [1, 2], limit=2, slot=1),
        request(second, [4], limit=3, slot=2),  # no room for one token
        request(second[:4], [5], limit=3, slot=3),  # room for the known ones, so for one token that is never read
        request(second, [6, 8], limit=0, slot=4),
    ]
    found = [draft.token_ids for draft in drafts.propose(requests)]
    model = drafter()
    assert found == [continued(model, PROMPT, 3), continued(model, second, 2), [], continued(model, second[:4], 1), []]
    assert runner.forwards == [9 + 5 + 4, 2, 1]


def test_a_long_prompt_is_read_in_parts() -> None:
    drafts, runner = proposer(max_num_batched_tokens=4)
    second = tiny.ids(3, seed=3).tolist()
    found = drafts.propose([request(PROMPT, TABLE, limit=2), request(second, [1, 2], limit=2, slot=1)])
    assert [draft.token_ids for draft in found] == [continued(drafter(), ids, 2) for ids in (PROMPT, second)]
    assert runner.forwards == [4, 4, 4, 2]


def test_blocks_of_a_known_beginning_are_not_read_again() -> None:
    drafts, runner = proposer()
    drafts.propose([request(PROMPT, TABLE, limit=1)])
    drafts.forget(0)
    runner.forwards.clear()
    other = [*PROMPT[:8], 1, 2]
    (draft,) = drafts.propose([request(other, [*TABLE[:2], 12, 13], limit=1, slot=0)])
    assert draft.token_ids == continued(drafter(), other, 1)
    assert runner.forwards == [2]


def test_the_same_tokens_after_others_are_read_again() -> None:
    drafts, runner = proposer()
    drafts.propose([request([*PROMPT[:4], 7, 8, 9], [0, 1], limit=1)])
    drafts.propose([request(PROMPT[4:], [2, 3], limit=1, slot=1)])
    runner.forwards.clear()
    mixed = [*PROMPT[4:8], 7, 8, 9]  # block 2 is right, block 1 holds 7 8 9 behind another beginning
    (draft,) = drafts.propose([request(mixed, [2, 1, 5], limit=2, slot=2)])
    assert draft.token_ids == continued(drafter(), mixed, 2)
    assert runner.forwards == [3, 1]


def test_no_draft_beyond_the_context_of_the_draft_model() -> None:
    drafts, _ = proposer(context=11)
    lengths = [len(drafts.propose([request([*PROMPT, *[5] * more], TABLE)])[0].token_ids) for more in range(4)]
    assert lengths == [3, 2, 1, 0]


def test_a_model_that_is_the_target_has_all_its_greedy_drafts_accepted() -> None:
    drafts, _ = proposer(target(), max_tokens=4)
    known, rounds = list(PROMPT), 0
    while len(known) + 4 < BLOCK_SIZE * len(TABLE):
        (draft,) = drafts.propose([request(known, TABLE)])
        chosen = target()(torch.tensor([*known, *draft.token_ids]))[len(known) - 1 :].argmax(-1).tolist()
        emitted, accepted = verify_greedy(chosen, draft.token_ids)
        assert accepted == 4
        known += emitted
        rounds += 1
    assert known[9:] == continued(target(), PROMPT, 5 * rounds)


@torch.inference_mode()
def test_sampled_drafts_come_with_the_distributions_they_were_drawn_from() -> None:
    drafts, _ = proposer()
    requests = [
        request(PROMPT, TABLE, temperature=0.7, seed=3),
        request(PROMPT, [1, 2, 4, 5], slot=1),  # a greedy one beside it
        request(PROMPT, [6, 8, 9, 10], slot=2, temperature=0.7, seed=4),
    ]
    sampled, greedy, other = drafts.propose(requests)
    assert greedy == Draft(continued(drafter(), PROMPT, 4), None)
    assert other.token_ids != sampled.token_ids
    (alone,) = proposer()[0].propose(requests[:1])
    assert alone.token_ids == sampled.token_ids  # whatever the batch
    assert sampled.probs is not None
    logits = drafter()(torch.tensor([*PROMPT, *sampled.token_ids]))[8:12]
    torch.testing.assert_close(sampled.probs, (logits / 0.7).softmax(-1), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_sampled_drafts_stand_as_often_as_the_distributions_overlap() -> None:
    p = (target()(torch.tensor(PROMPT))[-1:] / 2).softmax(-1)
    stood, count = 0, 300
    drafts, _ = proposer()
    for seed in range(count):
        (draft,) = drafts.propose([request(PROMPT, TABLE, limit=1, temperature=2.0, seed=seed)])
        rng = random.Random(seed)
        stood += verify(p.repeat(2, 1), draft, lambda place, stream, rng=rng: rng.random())[1]
    assert draft.probs is not None
    rate = float(acceptance_rate(p[0], draft.probs[0]))
    assert 0.05 < rate < 0.95
    assert stood / count == pytest.approx(rate, abs=4 * (rate * (1 - rate) / count) ** 0.5)


def test_the_targets_own_distribution_is_always_accepted() -> None:
    drafts, _ = proposer(target())
    for seed in range(10):
        (draft,) = drafts.propose([request(PROMPT, TABLE, temperature=1.0, seed=seed)])
        assert draft.probs is not None
        probs = torch.cat([draft.probs, draft.probs[:1]])
        rng = random.Random(seed)
        assert verify(probs, draft, lambda place, stream, rng=rng: rng.random())[1] == 4


def test_drafts_of_a_seeded_request_are_named_not_drawn() -> None:
    """So that its tokens are those that the target draws with its seed, whatever is drafted; see test_verify."""
    drafts, _ = proposer()
    requests = [
        request(PROMPT, TABLE, temperature=0.7, seeded=True),
        request(PROMPT, [1, 2, 4, 5], slot=1, temperature=0.7),
    ]
    named, drawn = drafts.propose(requests)
    assert named == Draft(continued(drafter(), PROMPT, 4), None)
    assert drawn.probs is not None


def test_padding_of_the_vocabulary_is_never_drafted() -> None:
    model = drafter()
    for size in (290, 310):
        drafts, _ = proposer(vocab_size=size)
        found = [drafts.propose([request(PROMPT, TABLE, temperature=5.0, seed=seed)])[0] for seed in range(20)]
        assert all(token < size for draft in found for token in draft.token_ids)
        assert all(draft.probs is not None and draft.probs.shape[1] == size for draft in found)
    after_best = continued(model, PROMPT, 1)[0]
    (draft,) = proposer(vocab_size=after_best)[0].propose([request(PROMPT, TABLE)])
    assert draft.token_ids == []


@torch.no_grad()
def test_a_broken_model_drafts_nothing() -> None:
    broken = tiny.model(num_hidden_layers=1)
    broken.norm.weight.fill_(float("nan"))
    drafts, _ = proposer(broken)
    for temperature in (0.0, 1.0):
        assert drafts.propose([request(PROMPT, TABLE, temperature=temperature)]) == [Draft([])]


def test_another_tokenizer_is_refused() -> None:
    texts = ["the river runs to the far sea"] * 3
    ours = train_bpe(texts, 280)
    check_same_tokens(ours, train_bpe(texts, 280))
    for other in (train_bpe(["something else entirely"] * 3, 280), train_bpe(texts, 270)):
        with pytest.raises(RequestError, match="another vocabulary") as refused:
            check_same_tokens(ours, other)
        assert refused.value.field == "draft_model"


@pytest.mark.parametrize("option", ["max_tokens", "max_num_batched_tokens"])
def test_options_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(RequestError) as refused:
        proposer(**{option: 0})
    assert refused.value.field == option


class DraftMachine(RuleBasedStateMachine):
    """Sequences come, go on, are preempted, share blocks and copy them, in a pool where blocks change hands."""

    @initialize()
    def begin(self) -> None:
        self.drafts, _ = proposer()
        self.rng = random.Random(0)
        self.tokens: dict[int, list[int]] = {}
        self.tables: dict[int, list[int]] = {}

    def allocate(self, slot: int, tokens: int) -> None:
        """Blocks that nobody holds, for so many tokens."""
        table = self.tables[slot]
        held = {block for each in self.tables.values() for block in each}
        free = [block for block in range(BLOCKS) if block not in held]
        table += self.rng.sample(free, max(0, -(-tokens // BLOCK_SIZE) - len(table)))

    @precondition(lambda self: len(self.tokens) < 3)
    @rule(length=st.integers(1, 10), first=st.integers(0, 1))
    def add(self, length: int, first: int) -> None:
        slot = min(set(range(3)) - set(self.tokens))
        self.tokens[slot], self.tables[slot] = tiny.ids(length, seed=first).tolist(), []

    @precondition(lambda self: 0 < len(self.tokens) < 3)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        """A second sequence with the same beginning holds the first one's full blocks."""
        source, slot = data.draw(st.sampled_from(sorted(self.tokens))), min(set(range(3)) - set(self.tokens))
        self.tokens[slot] = list(self.tokens[source])
        self.tables[slot] = self.tables[source][: (len(self.tokens[source]) - 1) // BLOCK_SIZE]

    @precondition(lambda self: self.tokens)
    @rule(limit=st.integers(1, 4), kept=st.integers(0, 4))
    def step(self, limit: int, kept: int) -> None:
        for slot, tokens in self.tokens.items():
            self.allocate(slot, min(len(tokens) + limit, 24))
        requests = [request(tokens, self.tables[slot], limit, slot=slot) for slot, tokens in self.tokens.items()]
        for one, draft in zip(requests, self.drafts.propose(requests), strict=True):
            assert draft.token_ids == continued(drafter(), one.token_ids, len(draft.token_ids))
            if len(one.token_ids) + limit <= 24:
                assert len(draft.token_ids) == limit
                accepted = min(kept, limit)
                self.tokens[one.slot] += [*draft.token_ids[:accepted], self.rng.randrange(300)]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), forget=st.booleans())
    def leave(self, data: st.DataObject, forget: bool) -> None:
        """Finished, or only preempted: the tokens stay, the blocks are gone."""
        slot = data.draw(st.sampled_from(sorted(self.tokens)))
        self.tables[slot] = []
        if forget:
            self.drafts.forget(slot)
            del self.tables[slot], self.tokens[slot]


TestDraftMachine = DraftMachine.TestCase
TestDraftMachine.settings = settings(max_examples=15, stateful_step_count=12, deadline=None, derandomize=True)

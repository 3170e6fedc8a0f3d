"""Verified drafts give what the target alone would give."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill.engine.speculation.proposer import Draft
from gristmill.engine.speculation.verify import (
    ACCEPT,
    DRAFT,
    SAMPLE,
    acceptance_rate,
    accepted_length,
    draw,
    residual,
    verify,
    verify_greedy,
)
from gristmill.errors import RequestError

RATIOS = (1.2, 0.9, 0.5, 0.8, 1.1)
CASES = [  # p, q, acceptance rate, residual, and a grid of uniforms on which p / q and the residual are whole
    ((0.6, 0.4), (0.45, 0.55), 0.85, (1.0, 0.0), 110),
    ((0.5, 0.3, 0.2), (0.2, 0.2, 0.6), 0.6, (0.75, 0.25, 0.0), 60),
]


def grid(size: int) -> list[float]:
    """Midpoints of equal parts of [0, 1)."""
    return [(place + 0.5) / size for place in range(size)]


def uniforms(**streams: Iterable[float]) -> dict[tuple[int, int], float]:
    """(place, stream) -> number, from lists by place."""
    names = {"sample": SAMPLE, "draft": DRAFT, "accept": ACCEPT}
    return {(place, names[name]): r for name, values in streams.items() for place, r in enumerate(values)}


def run(probs: Tensor, draft: Draft, table: dict[tuple[int, int], float]) -> tuple[list[int], int]:
    return verify(probs, draft, lambda place, stream: table[place, stream])


def chi_square(counts: Iterable[float], expected: Iterable[float]) -> float:
    """Probability of counts so far off or farther."""
    pairs = list(zip(counts, expected, strict=True))
    statistic = sum((count - mean) ** 2 / mean for count, mean in pairs)
    freedom = torch.tensor((len(pairs) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


@st.composite
def distributions(draw: st.DrawFn, rows: int = 1) -> tuple[Tensor, Tensor]:
    """Two distributions over one small vocabulary, some tokens of which have no probability; (rows, vocab) each."""
    size = draw(st.integers(2, 6))
    weight = st.lists(st.integers(0, 9), min_size=size, max_size=size).filter(any)
    both = torch.tensor([[draw(weight) for _ in range(rows)] for _ in range(2)], dtype=torch.float64)
    p, q = both / both.sum(-1, keepdim=True)
    return p, q


@pytest.mark.parametrize(
    ("uniform", "stand"), [((0.7, 0.3, 0.6, 0.1, 0.2), 2), ((0.1,) * 5, 5), ((0.99, 0.95, 0.0, 0.0, 0.0), 1)]
)
def test_those_before_the_first_rejection_stand(uniform: tuple[float, ...], stand: int) -> None:
    assert accepted_length(RATIOS, uniform) == stand
    # the same through `verify`: token t of five was drawn with q = 1/2, and p = ratio / 2
    p = torch.zeros(6, 12)
    p[:, 11] = 1
    for place, ratio in enumerate(RATIOS):
        p[place, place] = ratio / 2
        p[place, 11] -= ratio / 2
    q = torch.full((5, 12), 0.5 / 11).scatter(1, torch.arange(5)[:, None], 0.5)
    table = uniforms(accept=uniform, sample=[0.99] * 6)
    emitted, accepted = run(p, Draft(list(range(5)), q), table)
    assert accepted == stand
    assert emitted == [*range(stand), 11]  # one more than stand: 3 tokens, or 6 when all do


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(1, 5), max_size=6), st.lists(st.floats(0, 1, exclude_max=True), min_size=6))
def test_a_ratio_of_one_or_more_always_stands(ratios: list[float], uniform: list[float]) -> None:
    assert accepted_length(ratios, uniform) == len(ratios)


def test_what_can_never_stand() -> None:
    assert accepted_length([0.0], [0.0]) == 0  # a banned token, not even by the smallest uniform
    assert accepted_length([float("nan")], [0.0]) == 0


@pytest.mark.parametrize(("p", "q", "rate", "rest", "size"), CASES)
def test_the_output_has_exactly_the_targets_distribution(
    p: tuple[float, ...], q: tuple[float, ...], rate: float, rest: tuple[float, ...], size: int
) -> None:
    target, proposal = torch.tensor(p, dtype=torch.float64), torch.tensor(q, dtype=torch.float64)
    assert float(acceptance_rate(target, proposal)) == pytest.approx(rate, abs=1e-12)
    assert residual(target, proposal).tolist() == pytest.approx(rest, abs=1e-12)
    # every uniform of the grid, every drafted token with its chance: an expectation, not a sample
    probs, marginal, stood = target.repeat(2, 1), [0.0] * len(p), 0.0
    for token, chance in enumerate(q):
        for r, u in itertools.product(grid(size), grid(20)):
            emitted, accepted = run(probs, Draft([token], proposal[None]), uniforms(accept=[r], sample=[u, u]))
            marginal[emitted[0]] += chance / (size * 20)
            stood += chance * accepted / (size * 20)
    assert marginal == pytest.approx(p, abs=1e-9)
    assert stood == pytest.approx(rate, abs=1e-9)


def test_argmax_draft_and_argmax_correction_would_not_be_exact() -> None:
    (p, q, *_), size = CASES[0], 110
    drafted, correction = q.index(max(q)), p.index(max(p))
    stood = sum(accepted_length([p[drafted] / q[drafted]], [r]) for r in grid(size)) / size
    assert drafted != correction
    assert (1 - stood, stood) == pytest.approx((0.273, 0.727), abs=1e-3)  # neither (.6, .4) nor (1, 0)


@settings(max_examples=40, deadline=None)
@given(distributions())
def test_accepted_and_corrected_together_are_the_target(pair: tuple[Tensor, Tensor]) -> None:
    p, q = pair
    together = torch.minimum(p, q) + (1 - acceptance_rate(p, q))[:, None] * residual(p, q)
    torch.testing.assert_close(together, p)
    torch.testing.assert_close(residual(p, q).sum(-1), torch.ones(1, dtype=torch.float64))
    total_variation = (p - q).abs().sum(-1) / 2
    torch.testing.assert_close(acceptance_rate(p, q), 1 - total_variation)


P = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.6, 0.0, 0.4]])
"""A target over three tokens: the distribution after each."""
Q = torch.tensor([[0.2, 0.2, 0.6], [0.3, 0.4, 0.3], [0.5, 0.25, 0.25]])


@pytest.mark.parametrize("kind", ["drawn", "named"])
@pytest.mark.parametrize("length", [1, 3])
def test_sequences_have_the_targets_distribution(kind: str, length: int) -> None:
    """Three tokens after token 0, over rounds that accept, correct and add a bonus."""
    samples, size, rng = 800, 3, random.Random(length)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(samples):
        known = [0]
        while len(known) <= size:
            tokens: list[int] = []
            for _ in range(length):
                row = Q[[*known, *tokens][-1]]
                tokens += draw(row[None], [rng.random()]) if kind == "drawn" else [int(row.argmax())]
            befores = [known[-1], *tokens]
            draft = Draft(tokens, Q[befores[:-1]] if kind == "drawn" else None)
            known += verify(P[befores], draft, lambda place, stream: rng.random())[0]
        counts[tuple(known[1 : size + 1])] += 1
    exact = {
        word: float(P[0, word[0]] * P[word[0], word[1]] * P[word[1], word[2]])
        for word in itertools.product(range(3), repeat=size)
    }
    assert all(exact[word] > 0 for word in counts)  # the impossible never happens
    possible = [word for word in exact if exact[word] > 0]
    assert chi_square([counts[w] for w in possible], [samples * exact[w] for w in possible]) > 1e-3


@settings(max_examples=40, deadline=None)
@given(distributions(rows=3), st.randoms(use_true_random=False))
def test_a_draft_from_the_targets_own_distribution_stands_whole(
    pair: tuple[Tensor, Tensor], rng: random.Random
) -> None:
    p, _ = pair
    tokens = draw(p[:2], [rng.random(), rng.random()])
    emitted, accepted = verify(p, Draft(tokens, p[:2]), lambda place, stream: rng.random())
    assert accepted == 2
    assert emitted[:2] == tokens
    assert len(emitted) == 3


@settings(max_examples=40, deadline=None)
@given(distributions(rows=4), st.lists(st.integers(0, 1), min_size=3, max_size=3), st.randoms(use_true_random=False))
def test_a_draft_without_distribution_changes_no_token(
    pair: tuple[Tensor, Tensor], tokens: list[int], rng: random.Random
) -> None:
    """What is emitted is what the target draws with the same numbers when there is no draft at all."""
    p, _ = pair
    numbers = [rng.random() for _ in range(4)]
    alone = draw(p, numbers)
    emitted, accepted = run(p, Draft(tokens), uniforms(sample=numbers))
    assert emitted == alone[: len(emitted)]
    assert (emitted, accepted) == verify_greedy(alone, tokens)
    assert len(emitted) == accepted + 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.lists(st.integers(0, 2), max_size=5))
def test_greedy_is_exact_for_any_draft(chosen: list[int], draft: list[int]) -> None:
    """`chosen` are the target's tokens as long as the draft agrees; so what is emitted begins them."""
    draft = draft[: len(chosen) - 1]
    chosen = chosen[: len(draft) + 1]
    emitted, accepted = verify_greedy(chosen, draft)
    assert emitted == chosen[: accepted + 1]
    assert emitted[:accepted] == draft[:accepted]
    assert accepted == len(draft) or draft[accepted] != chosen[accepted]
    one_hot = torch.eye(3)[chosen]
    numbers = uniforms(sample=[0.5] * 6, accept=[0.999] * 6)
    assert run(one_hot, Draft(draft), numbers) == (emitted, accepted)
    assert run(one_hot, Draft(draft, torch.eye(3)[draft]), numbers) == (emitted, accepted)


def test_uniforms_are_read_once_each_and_only_as_far_as_needed() -> None:
    seen: list[tuple[int, int]] = []

    def uniform(place: int, stream: int) -> float:
        seen.append((place, stream))
        return 0.9

    p = torch.tensor([[0.5, 0.5], [0.1, 0.9], [0.5, 0.5], [0.5, 0.5]])
    emitted, accepted = verify(p, Draft([0, 0, 0], torch.full((3, 2), 0.5)), uniform)
    assert (emitted, accepted) == ([0, 1], 1)
    assert seen == [(0, ACCEPT), (1, ACCEPT), (1, SAMPLE)]


def test_a_row_without_a_token_ends_the_output() -> None:
    fine, nothing = [0.5, 0.5], [0.0, 0.0]
    broken = [float("nan")] * 2
    for bad in (nothing, broken):
        assert draw(torch.tensor([bad, fine]), [0.1, 0.9]) == [-1, 1]
        for probs in (None, torch.tensor([fine, fine])):
            assert run(
                torch.tensor([fine, bad, fine]), Draft([0, 0], probs), uniforms(accept=[0.1] * 2, sample=[0.1] * 3)
            ) == ([0], 1)
    assert verify_greedy([0, None, 1], [0, 0]) == ([0], 1)
    assert verify_greedy([0, -1, 1], [0, 0]) == ([0], 1)


@settings(max_examples=40, deadline=None)
@given(distributions(rows=2), st.floats(0, 1, exclude_max=True))
def test_a_draw_has_a_probability(pair: tuple[Tensor, Tensor], uniform: float) -> None:
    p, _ = pair
    for number in (uniform, 0.0, 1 - 2**-53):
        for row, token in zip(p, draw(p, [number] * 2), strict=True):
            assert row[token] > 0
            before = float(row[:token].sum())
            assert before - 1e-12 <= number <= before + float(row[token]) + 1e-12


def test_what_does_not_fit_is_refused() -> None:
    p = torch.full((3, 2), 0.5)
    for probs, draft in (
        (p, Draft([0])),
        (p, Draft([0, 1], torch.full((2, 3), 1 / 3))),
        (p, Draft([0, 1], torch.tensor([[1.0, 0.0], [1.0, 0.0]]))),  # token 1 was not drawn from that
    ):
        with pytest.raises(RequestError) as refused:
            run(probs, draft, {})
        assert refused.value.field == "draft"
    with pytest.raises(RequestError):
        verify_greedy([1], [1])


@pytest.mark.peer
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_equals_transformers_on_given_numbers(seed: int) -> None:
    utils = pytest.importorskip("transformers.generation.utils")
    generator = torch.Generator().manual_seed(seed)
    p_logits, q_logits = (torch.randn(rows, 5, generator=generator) for rows in (5, 4))
    tokens = torch.randint(5, (4,), generator=generator).tolist()
    numbers = torch.rand(4, generator=generator)
    asked: list[Tensor] = []

    def multinomial(probs: Tensor, num_samples: int) -> Tensor:
        asked.append(probs[0])
        return probs.argmax(-1, keepdim=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand_like", lambda x: numbers.view_as(x))
        patch.setattr(torch, "multinomial", multinomial)
        theirs, matches = utils._speculative_sampling(
            torch.tensor([tokens]), q_logits[None], 4, p_logits[None], *[None][: _extra_arguments(utils)]
        )
    p, q = p_logits.softmax(-1), q_logits.softmax(-1)
    ratios = [float(p[place, token] / q[place, token]) for place, token in enumerate(tokens)]
    accepted = accepted_length(ratios, numbers.tolist())
    assert accepted == int(matches)
    torch.testing.assert_close(residual(p[accepted], q[accepted]) if accepted < 4 else p[4], asked[0])
    best = int(asked[0].argmax())
    middle = float(asked[0][:best].sum() + asked[0][best] / 2)
    emitted, _ = run(p, Draft(tokens, q), uniforms(accept=numbers.tolist(), sample=[middle] * 5))
    assert emitted == theirs[0].tolist()


def _extra_arguments(utils: object) -> int:
    # before 5.x the function had an `is_done_candidate` argument last
    count: int = utils._speculative_sampling.__code__.co_argcount  # type: ignore[attr-defined]
    return count - 4

"""Learning-rate schedules and batch growth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gristmill.errors import GristmillError
from gristmill.train.optimisers import make_optimiser
from gristmill.train.schedules import BatchGrowth, batches_before, check_schedule, learning_rate

KINDS = ["constant", "linear", "cosine", "wsd", "inverse_sqrt"]
SHARES = st.floats(0, 1)


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Any]:
    warmup = draw(st.floats(0.01, 1))
    return {
        "kind": draw(st.sampled_from(KINDS)),
        "peak": 1.0,
        "warmup": warmup,
        "final": draw(SHARES),
        "decay": draw(st.floats(0, 1 - warmup)),
        "decay_shape": draw(st.sampled_from(["linear", "1-sqrt"])),
    }


@given(schedules(), SHARES, SHARES)
def test_the_rate_rises_to_the_peak_and_never_after(options: dict[str, Any], one: float, two: float) -> None:
    early, late = sorted((one, two))
    first, second = learning_rate(early, **options), learning_rate(late, **options)
    top = options["warmup"]
    assert learning_rate(top, **options) == pytest.approx(1.0)
    assert learning_rate(0.0, **options) == 0.0
    assert 0.0 <= first <= 1.0 + 1e-9
    if late <= top:
        assert first <= second + 1e-9
    if early >= top:
        assert first >= second - 1e-9
        assert first >= (0.0 if options["kind"] == "constant" else options["final"]) - 1e-9


@given(schedules(), SHARES)
def test_the_rate_has_no_jump(options: dict[str, Any], done: float) -> None:
    near = min(1.0, done + 1e-9)
    # a fall over no time is a jump that was asked for
    if options["kind"] == "wsd" and options["decay"] < 1e-3:
        return
    if options["kind"] in ("linear", "cosine") and options["warmup"] > 1 - 1e-3:
        return
    steepest = 1e-9 * 1e3 * 4 + math.sqrt(1e-9 / max(options["decay"], 1e-3))  # 1 - sqrt begins infinitely steep
    assert abs(learning_rate(near, **options) - learning_rate(done, **options)) <= steepest + 1e-6


@given(schedules())
def test_the_rate_ends_where_it_should(options: dict[str, Any]) -> None:
    end = learning_rate(1.0, **options)
    if options["kind"] == "constant" or options["warmup"] == 1.0:
        assert end == pytest.approx(1.0)
    elif options["kind"] == "inverse_sqrt":
        assert end == pytest.approx(max(options["final"], math.sqrt(options["warmup"])))
    elif options["kind"] != "wsd" or options["decay"] > 0.0:
        assert end == pytest.approx(options["final"])


STEPS, WARM, FALL = 60, 12, 15


def theirs(make: Any, **options: Any) -> list[float]:
    """The rates that a torch scheduler gives steps 0 to STEPS."""
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler, found = make(optimiser, **options), []
    for _ in range(STEPS + 1):
        found.append(scheduler.get_last_lr()[0])
        optimiser.step()
        scheduler.step()
    return found


@pytest.mark.peer
@pytest.mark.parametrize(
    ("maker", "asked", "ours"),
    [
        ("get_constant_schedule_with_warmup", {}, {"kind": "constant"}),
        ("get_linear_schedule_with_warmup", {"num_training_steps": STEPS}, {"kind": "linear"}),
        ("get_cosine_schedule_with_warmup", {"num_training_steps": STEPS}, {"kind": "cosine"}),
        (
            "get_cosine_with_min_lr_schedule_with_warmup",
            {"num_training_steps": STEPS, "min_lr_rate": 0.1},
            {"kind": "cosine", "final": 0.1},
        ),
        ("get_inverse_sqrt_schedule", {}, {"kind": "inverse_sqrt"}),
        *(
            (
                "get_wsd_schedule",
                {"num_training_steps": STEPS, "num_decay_steps": FALL, "decay_type": shape},
                {"kind": "wsd", "decay": FALL / STEPS, "decay_shape": shape},
            )
            for shape in ("linear", "1-sqrt")
        ),
    ],
)
def test_equals_transformers_at_every_step(maker: str, asked: dict[str, Any], ours: dict[str, Any]) -> None:
    """Theirs at step k is ours where k of the steps are done; the loop's step k is theirs at k + 1."""
    transformers = pytest.importorskip("transformers")
    expected = theirs(getattr(transformers.optimization, maker), num_warmup_steps=WARM, **asked)
    found = [learning_rate(step / STEPS, peak=3e-4, warmup=WARM / STEPS, **ours) for step in range(STEPS + 1)]
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_worked_values() -> None:
    """Half of a cosine, a quarter into the last fifth, four times the warm-up."""
    assert learning_rate(0.55, "cosine", peak=2.0, warmup=0.1, final=0.5) == pytest.approx(1.5)
    assert learning_rate(0.85, "wsd", peak=1.0, decay=0.2) == pytest.approx(0.5)
    assert learning_rate(0.85, "wsd", peak=1.0, decay=0.2, decay_shape="linear") == pytest.approx(0.75)
    assert learning_rate(0.4, "inverse_sqrt", peak=1.0, warmup=0.1) == pytest.approx(0.5)
    assert learning_rate(0.05, "linear", peak=1.0, warmup=0.1) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cosin"}, "Did you mean cosine"),
        ({"warmup": 1.5}, "warmup must be in"),
        ({"final": math.nan}, "final must be in"),
        ({"decay": -0.1}, "decay must be in"),
        ({"decay_shape": "cubic"}, "decay_shape must be one of"),
        ({"kind": "wsd", "warmup": 0.5, "decay": 0.6}, "more than the whole run"),
        ({"kind": "inverse_sqrt", "warmup": 0.0}, "warmup above 0"),
    ],
)
def test_what_cannot_be_followed_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GristmillError, match=message):
        check_schedule(**{"kind": "linear", "warmup": 0.1, **options})


@st.composite
def growths(draw: st.DrawFn) -> BatchGrowth:
    borders = sorted(draw(st.sets(st.integers(1, 3000), max_size=3)))
    return BatchGrowth(tuple((start, draw(st.integers(1, 9))) for start in [0, *borders]))


@given(growths(), st.integers(1, 50), st.integers(1, 100))
def test_scheduled_tokens_are_the_budget(growth: BatchGrowth, size: int, batches: int) -> None:
    """The plan is the walk: each step as large as `at` says, but for the last, which ends where the budget does."""
    walked: list[int] = []
    while sum(walked) < batches:
        walked.append(min(growth.at(sum(walked) * size), batches - sum(walked)))
    plan = growth.steps(batches * size, size)
    assert [run.batches for run in plan for _ in range(run.steps)] == walked
    assert sum(run.steps * run.batches for run in plan) * size == batches * size
    assert [run.first for run in plan] == [sum(run.steps for run in plan[:n]) for n in range(len(plan))]
    for step in range(len(walked) + 1):
        assert batches_before(plan, step) == sum(walked[:step])


def test_growth_is_a_step_function_of_tokens() -> None:
    growth = BatchGrowth(((0, 1), (1000, 2), (5000, 8)))
    assert [growth.at(tokens) for tokens in (0, 999, 1000, 4999, 5000, 10**12)] == [1, 1, 2, 2, 8, 8]
    assert [(r.first, r.steps, r.batches) for r in growth.steps(10_000, 100)] == [
        (0, 10, 1),
        (10, 20, 2),
        (30, 6, 8),
        (36, 1, 2),
    ]


@pytest.mark.parametrize("stages", [(), ((5, 1),), ((0, 1), (0, 2)), ((0, 1), (9, 2), (8, 3)), ((0, 0),)])
def test_stages_that_make_no_schedule_are_refused(stages: Any) -> None:
    with pytest.raises(GristmillError, match="batch growth"):
        BatchGrowth(stages)


def test_a_budget_of_half_batches_is_refused() -> None:
    with pytest.raises(GristmillError, match="use 1000"):
        BatchGrowth().steps(1030, 100)


def test_growing_by_accumulation_equals_large_batches() -> None:
    """Along a growing schedule, micro-batches whose gradients are added give the weights of one large batch a step."""
    data = torch.randn(120, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    goal = data.sum(dim=1, keepdim=True).sin()
    plan = BatchGrowth(((0, 1), (20, 3), (60, 5))).steps(120, 4)
    accumulated, whole = (nn.Linear(5, 1, dtype=torch.float64) for _ in range(2))
    whole.load_state_dict(accumulated.state_dict())
    optimisers = [make_optimiser(model, "adamw", learning_rate=1e-2) for model in (accumulated, whole)]
    for run in plan:
        for step in range(run.first, run.first + run.steps):
            begin = 4 * batches_before(plan, step)
            rows = slice(begin, begin + 4 * run.batches)
            (whole(data[rows]) - goal[rows]).square().mean().backward()
            for part in range(run.batches):
                some = slice(begin + 4 * part, begin + 4 * part + 4)
                ((accumulated(data[some]) - goal[some]).square().sum() / (4 * run.batches)).backward()
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
    assert batches_before(plan, 10**6) * 4 == 120
    torch.testing.assert_close(accumulated.weight, whole.weight, rtol=1e-10, atol=1e-12)

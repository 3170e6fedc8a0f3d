"""Money, time and data: what binds."""

from __future__ import annotations

from typing import Any

import pytest

from gristmill.errors import GristmillError
from gristmill.scale.budget import Budget, Tier, choose, plan_budget


def budget(**changes: Any) -> Budget:
    """70,000 dollars of compute at 2 dollars a TFLOP-hour, 25,000 of data at 0.015 a thousand tokens."""
    options: dict[str, Any] = {
        "compute_dollars": 70e3,
        "dollars_per_tflop_hour": 2.0,
        "data_dollars": 25e3,
        "tiers": (Tier(name="curated", dollars_per_1k=0.015),),
        "reserve_dollars": 5e3,
    }
    return Budget(**{**options, **changes})


def test_the_worked_plan_is_bound_by_data_and_says_so() -> None:
    plan = plan_budget(budget())
    by_compute = plan.choice.limits["compute"]
    assert by_compute.flops == pytest.approx(1.26e20)
    assert by_compute.parameters == pytest.approx(1.02e9, rel=0.005)
    assert by_compute.tokens == pytest.approx(20.5e9, rel=0.001)
    assert plan.choice.allocation.tokens == pytest.approx(1.67e9, rel=0.003)
    assert plan.choice.allocation.parameters == pytest.approx(1.67e9 / 20, rel=0.003)
    assert plan.choice.binding == "data"
    assert "bound by data" in plan.verdict
    assert "compute alone would allow 1.02B on 20.5B" in plan.verdict
    assert plan.data_dollars == pytest.approx(25e3)


def test_repeating_the_data_moves_the_limit_but_not_for_nothing() -> None:
    plan = plan_budget(budget(epochs=4))
    assert plan.choice.binding == "data"
    assert plan.choice.allocation.tokens == pytest.approx(4 * 25e6 / 0.015)
    assert plan.choice.allocation.tokens > plan.effective_tokens > 3.5 * 25e6 / 0.015


def test_stages_are_rehearsed_from_the_reserve() -> None:
    plan = plan_budget(budget(data_dollars=1e6))
    assert plan.choice.binding == "compute"
    assert [stage.allocation.parameters for stage in plan.stages] == pytest.approx([1e6, 1e8, 1.0247e9], rel=1e-4)
    assert plan.stages[1].dollars == pytest.approx(6 * 1e8 * 2e9 / 3600e12 * 2)
    assert plan.reserve_left == pytest.approx(5e3 - plan.stages[0].dollars - plan.stages[1].dollars)
    assert plan.stages[-1].dollars == pytest.approx(70e3)
    assert plan_budget(budget(data_dollars=1e6, reserve_dollars=0)).reserve_left < 0


def test_a_deadline_can_bind() -> None:
    plan = plan_budget(budget(hours=1, tflops=100))
    assert plan.choice.binding == "deadline"
    assert plan.choice.allocation.flops == pytest.approx(3600 * 100e12)


def test_the_mixture_buys_quality_where_money_is_left() -> None:
    cheap, good = Tier(name="web", dollars_per_1k=1e-4, quality=0.6), Tier(name="books", dollars_per_1k=0.015)
    plan = plan_budget(budget(tiers=(cheap, good)))
    needed, money = plan.choice.limits["compute"].tokens, 25e3
    assert plan.choice.binding == "compute"
    assert sum(plan.mixture.values()) == pytest.approx(needed)
    assert plan.data_dollars == pytest.approx(money, rel=1e-6)
    # all money is spent on exchanging cheap tokens for good ones
    assert plan.mixture["books"] == pytest.approx((money - needed * 1e-7) / (0.015e-3 - 1e-7), rel=1e-6)
    scarce = plan_budget(budget(tiers=(cheap, Tier(name="books", dollars_per_1k=0.015, tokens=1e8))))
    assert scarce.mixture["books"] == pytest.approx(1e8)


def test_free_data_need_no_money() -> None:
    plan = plan_budget(budget(data_dollars=0, tiers=(Tier(name="own", dollars_per_1k=0, tokens=5e9),)))
    assert (plan.choice.binding, plan.choice.allocation.tokens) == ("data", pytest.approx(5e9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compute_dollars": 0}, "compute_dollars"),
        ({"reserve_dollars": -1}, "reserve_dollars"),
        ({"epochs": 0.5}, "epochs"),
        ({"hours": 3}, "hours and tflops"),
        ({"data_dollars": 0}, "no data"),
    ],
)
def test_bad_budgets_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GristmillError, match=message):
        plan_budget(budget(**changes))


def test_a_tier_and_a_plan_without_limits_are_refused() -> None:
    with pytest.raises(GristmillError, match="tier web"):
        Tier(name="web", dollars_per_1k=-1)
    with pytest.raises(GristmillError, match="nothing limits"):
        choose({})

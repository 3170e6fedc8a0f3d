"""Training options: the learning-rate schedule and what is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.errors import GristmillError
from gristmill.train.config import TrainConfig


def rates(**options: object) -> list[float]:
    config = TrainConfig(learning_rate=1.0, **options)  # type: ignore[arg-type]
    return [config.learning_rate_at(step, 0) for step in range(1, config.steps + 1)]


def test_the_rate_rises_and_falls_in_straight_lines() -> None:
    assert rates(steps=10, warmup=0.4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.0])
    assert rates(steps=4, warmup=0.25, final_learning_rate=0.1) == pytest.approx([1.0, 0.7, 0.4, 0.1])
    assert rates(steps=3, warmup=0.0) == pytest.approx([1.0, 0.5, 0.0])
    assert rates(steps=4, warmup=1.0) == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates(steps=1) == [1.0]


@given(st.integers(1, 400), st.floats(0, 1), st.floats(0, 1))
def test_the_rate_has_one_peak_and_keeps_its_bounds(steps: int, warmup: float, final: float) -> None:
    found = rates(steps=steps, warmup=warmup, final_learning_rate=final)
    top = found.index(max(found))
    assert max(found) == pytest.approx(1.0)
    assert all(0.0 <= rate <= 1.0 + 1e-9 for rate in found)
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    if top < steps - 1:
        assert found[-1] == pytest.approx(final, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("micro_batches", 0),
        ("validate_every", 0),
        ("checkpoint_every", -1),
        ("keep_checkpoints", 0),
        ("warmup", 1.1),
        ("warmup", math.nan),
        ("final_learning_rate", -0.1),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("clip_norm", 0.0),
        ("weight_decay", -1.0),
        ("weight_decay", math.nan),
        ("precision", "float8"),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(GristmillError, match=name):
        TrainConfig(**{"steps": 10, name: value})  # type: ignore[arg-type]

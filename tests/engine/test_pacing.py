"""How many prompt tokens go into a step beside requests that wait for their next token."""

from __future__ import annotations

import pytest

from gristmill.engine.pacing import Pacing


def test_no_stretch_and_nobody_waiting_are_no_limit() -> None:
    assert Pacing(None).limit(8) is None
    assert Pacing(2.0).limit(0) is None


def test_costs_are_learned_from_the_steps() -> None:
    pacing = Pacing(2.0)
    assert pacing.limit(4) == 16  # nothing is known yet
    for _ in range(40):
        pacing.measured(0.010, 4, 0)
        pacing.measured(0.010 + 16 * 0.0005, 4, 16)
    assert pacing.limit(4) == pytest.approx(20, abs=1)  # 20 tokens of half a millisecond double a step of ten
    assert Pacing(3.0).limit(4) == 16


def test_one_stalled_step_hardly_moves_the_limit() -> None:
    pacing = Pacing(2.0)
    for _ in range(20):
        pacing.measured(0.010, 4, 0)
        pacing.measured(0.020, 4, 20)
    before = pacing.limit(4)
    pacing.measured(5.0, 4, 20)
    assert before is not None
    assert 0.7 * before <= (pacing.limit(4) or 0) <= before
    pacing.measured(0.001, 4, 20)  # less than a step without prompt tokens: no measurement of theirs
    assert (pacing.limit(4) or 0) <= before

"""UL2's mixture: shares, mode tokens, and that every denoiser keeps the text whole."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.errors import DataError
from gristmill.objectives.sequence_pair import Framing
from gristmill.objectives.span_corruption import splice
from gristmill.objectives.ul2 import DENOISERS, UL2, Denoiser

MARKS = tuple(range(1000, 1100))
MODES: Any = {"R": 1100, "S": 1101, "X": 1102}
FRAMING = Framing.t5(1103)
TEXT = np.arange(2, 102)


def test_the_published_denoisers() -> None:
    table = [(denoiser.mode, denoiser.rate, denoiser.mean_length) for denoiser in DENOISERS]
    assert table == [
        ("R", 0.15, 3),
        ("R", 0.15, 8),
        ("S", 0.25, None),
        ("X", 0.5, 3),
        ("X", 0.5, 8),
        ("X", 0.15, 64),
        ("X", 0.5, 64),
    ]


@given(st.integers(0, 10_000), st.integers(1, 120), st.sampled_from(DENOISERS))
def test_source_and_target_hold_the_text(key: int, length: int, denoiser: Denoiser) -> None:
    objective = UL2(FRAMING, MARKS, MODES, [denoiser])
    text = np.arange(2, 2 + length)
    pair = objective.pair((text, None), np.random.default_rng(key))
    source, target = np.asarray(pair.source), np.asarray(pair.target)
    assert source[0] == MODES[denoiser.mode]
    assert pair.kind == denoiser.mode
    if denoiser.mode == "S":
        assert [*source[1:], *target] == text.tolist()
        assert len(target) == max(1, round(0.25 * length))
    else:
        assert splice(source[1:], target, MARKS).tolist() == text.tolist()
    assert max(len(source), len(target)) + 1 <= length + objective.extra_tokens


def test_modes_follow_the_weights() -> None:
    batch = UL2(FRAMING, MARKS, MODES).prepare([(TEXT, None)] * 2100, [(0, i) for i in range(2100)])
    shares = {mode: count / 2100 for mode, count in Counter(batch.kinds).items()}
    assert shares == {mode: pytest.approx(part / 7, abs=0.04) for mode, part in (("R", 2), ("S", 1), ("X", 4))}
    heads = [source[0].item() for source in batch.source.input_ids.split(batch.source.segment_lengths)]
    assert heads == [MODES[kind] for kind in batch.kinds]
    skewed = [Denoiser("R", 0.15, 3, weight=3), Denoiser("S", 0.25, None)]
    batch = UL2(FRAMING, MARKS, MODES, skewed).prepare([(TEXT, None)] * 2000, [(0, i) for i in range(2000)])
    assert batch.kinds.count("R") / 2000 == pytest.approx(0.75, abs=0.04)


def test_unfit_options_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="modes lacks the token of S, X"):
        UL2(FRAMING, MARKS, {"R": 5})
    with pytest.raises(DataError, match="denoisers need weights"):
        UL2(FRAMING, MARKS, MODES, [])
    with pytest.raises(DataError, match="rate must be in"):
        UL2(FRAMING, MARKS, MODES, [Denoiser("R", 1.5, 3)])

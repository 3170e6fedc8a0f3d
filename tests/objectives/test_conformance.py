"""Every objective keeps the contract of the training loop. Cases of a kind of model stand in `cases_<kind>.py`."""

from __future__ import annotations

import math
from typing import Any

import pytest

from conformance.objective import ObjectiveCase, ObjectiveSuite
from gristmill.objectives.causal import CausalLM
from objectives import cases_encoder, cases_seq2seq


def learned_in_part(number: int) -> tuple[list[int], list[int]]:
    """A segment whose mask leaves out every third token."""
    ids = cases_encoder.words(number)
    return ids, [int(place % 3 > 0) for place in range(len(ids))]


BAD: dict[str, Any] = {"empty": ([], None), "mask of another length": ([5, 6], [1])}
UNIFORM = {"loss": math.log(cases_seq2seq.SIZE)}
CAUSAL = ObjectiveCase("causal", CausalLM(), cases_seq2seq.decoder, learned_in_part, BAD, UNIFORM, random=False)
CASES = [CAUSAL, *cases_encoder.cases(), *cases_seq2seq.cases()]


@pytest.mark.parametrize("case", CASES, ids=str)
class TestObjectives(ObjectiveSuite):
    """The suite, once per case."""


def test_names_of_cases_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)

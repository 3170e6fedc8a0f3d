"""A verdict needs two standard errors, over the same samples."""

import math

import numpy as np
import pytest

from gristmill.core import TaskResult
from gristmill.errors import DataError
from gristmill.evaluate.compare import (
    Comparison,
    compare_accuracy,
    compare_bits_per_byte,
    compare_to_level,
)
from gristmill.evaluate.language_modelling import HeldOutPerplexity
from gristmill.evaluate.metrics import Estimate, mean
from gristmill.scripted import ScriptedLM


def choices(correct: list[float]) -> TaskResult:
    records = [{"prompt": str(i), "options": ["a", "b"], "gold": 0, "correct": c} for i, c in enumerate(correct)]
    estimate = mean(correct)
    return TaskResult("topics", estimate.value, estimate.standard_error, len(correct), records)


def test_z_and_verdict_of_accuracies() -> None:
    base, tuned = [0.0] * 60 + [1.0] * 40, [1.0] * 50 + [0.0] * 10 + [1.0] * 30 + [0.0] * 10
    comparison = compare_accuracy("Topics", choices(tuned), choices(base), names=("tuned", "base"))
    differences = np.subtract(tuned, base)
    assert comparison.difference.value == pytest.approx(0.4)
    assert comparison.z == pytest.approx(0.4 / (differences.std(ddof=1) / 10))
    assert comparison.better
    assert comparison.verdict.startswith("Topics: tuned is better than base (+0.4000 ± 0.0")
    other_way = compare_accuracy("Topics", choices(base), choices(tuned), names=("base", "tuned"))
    assert "base is worse than tuned" in other_way.verdict
    assert not other_way.better


@pytest.mark.parametrize(
    ("value", "higher_is_better", "expected"),
    [(0.021, True, "better"), (0.019, True, "do not differ"), (-0.021, True, "worse"), (-0.021, False, "better")],
)
def test_two_standard_errors_decide(value: float, higher_is_better: bool, expected: str) -> None:
    comparison = Comparison("m", "a", "b", Estimate(value, 0.01, 100), higher_is_better)
    assert expected in comparison.verdict
    assert comparison.better == (expected == "better")


def test_equal_systems_do_not_differ_and_a_constant_gain_is_certain() -> None:
    same = compare_accuracy("m", choices([1.0, 0.0]), choices([1.0, 0.0]), names=("a", "b"))
    assert same.z == 0.0
    assert "do not differ" in same.verdict
    gain = compare_accuracy("m", choices([1.0, 1.0]), choices([0.0, 0.0]), names=("a", "b"))
    assert gain.z == math.inf
    assert "better" in gain.verdict


def test_bits_per_byte_differ_by_the_difference_of_the_values() -> None:
    class Sharper(ScriptedLM):
        def next_logprobs(self, previous: int) -> np.ndarray:
            logits = 2 * super().next_logprobs(previous)
            return np.asarray(logits - np.log(np.exp(logits).sum()))

    documents = ["the cat sat", "on the mat again", "and then it slept for a long time"]
    task = HeldOutPerplexity("held-out", documents, [256])
    a, b = task.evaluate(Sharper([])), task.evaluate(ScriptedLM([]))
    comparison = compare_bits_per_byte("Held-out", a, b, names=("sharp", "plain"))
    assert comparison.difference.value == pytest.approx(a.value - b.value)
    assert comparison.better == (comparison.z < -2)


def test_a_level_has_no_error_of_its_own() -> None:
    comparison = compare_to_level("Topics", choices([1.0] * 3 + [0.0]), 0.5, names=("tuned", "chance"))
    assert comparison.difference.value == pytest.approx(0.25)
    assert comparison.z == pytest.approx(1.0)


def test_other_samples_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="same samples"):
        compare_accuracy("m", choices([1.0, 0.0]), choices([1.0, 0.0, 0.0]), names=("a", "b"))
    with pytest.raises(DataError, match="same samples"):
        compare_accuracy("m", TaskResult("x", 0.5, 0.1, 2), TaskResult("x", 0.5, 0.1, 2), names=("a", "b"))
    one = HeldOutPerplexity("held-out", ["ab", "cd"], [256]).evaluate(ScriptedLM([]))
    two = HeldOutPerplexity("held-out", ["ab", "ce"], [256]).evaluate(ScriptedLM([]))
    with pytest.raises(DataError, match="same samples"):
        compare_bits_per_byte("m", one, two, names=("a", "b"))

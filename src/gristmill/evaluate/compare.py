"""Is one system better than another? The paired difference, its standard error and a verdict at two of them.

Source: Miller 2024, Adding error bars to evals, section 4 (paired differences).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gristmill.core import TaskResult
from gristmill.errors import DataError
from gristmill.evaluate.metrics import Estimate, paired_difference, ratio


@dataclass(frozen=True)
class Comparison:
    """`difference` is a minus b; `a` and `b` are the names of the systems."""

    metric: str
    a: str
    b: str
    difference: Estimate
    higher_is_better: bool = True

    @property
    def z(self) -> float:
        """The difference in standard errors; infinite when every sample differs by the same amount."""
        error = self.difference.standard_error
        if error == 0.0:
            return 0.0 if self.difference.value == 0.0 else math.copysign(math.inf, self.difference.value)
        return self.difference.value / error

    @property
    def better(self) -> bool:
        """Whether a is better by more than two standard errors."""
        return (self.z if self.higher_is_better else -self.z) > 2.0

    @property
    def verdict(self) -> str:
        """One sentence for a report."""
        advantage = self.z if self.higher_is_better else -self.z
        difference = f"{self.difference.value:+.4f} ± {self.difference.standard_error:.4f}, z = {self.z:.1f}"
        evidence = f"({difference}, {self.difference.samples} samples)"
        if advantage > 2.0:
            return f"{self.metric}: {self.a} is better than {self.b} {evidence}."
        if advantage < -2.0:
            return f"{self.metric}: {self.a} is worse than {self.b} {evidence}."
        return f"{self.metric}: {self.a} and {self.b} do not differ by two standard errors {evidence}."


def compare_accuracy(metric: str, a: TaskResult, b: TaskResult, *, names: tuple[str, str]) -> Comparison:
    """Two systems on the same questions (results of MultipleChoice). Raises DataError for other questions."""
    _same_samples(a, b, "prompt", "options", "gold")
    difference = paired_difference(_column(a, "correct"), _column(b, "correct"))
    return Comparison(metric, *names, difference)


def compare_bits_per_byte(metric: str, a: TaskResult, b: TaskResult, *, names: tuple[str, str]) -> Comparison:
    """Two systems on the same documents (results of HeldOutPerplexity), whatever their tokenizers."""
    _same_samples(a, b, "digest")
    bits = [(x - y) / math.log(2) for x, y in zip(_column(a, "nats"), _column(b, "nats"), strict=True)]
    return Comparison(metric, *names, ratio(bits, _column(a, "bytes")), higher_is_better=False)


def compare_to_level(metric: str, result: TaskResult, level: float, *, names: tuple[str, str]) -> Comparison:
    """A system against a fixed level, such as chance: the level itself has no error."""
    difference = Estimate(result.value - level, result.standard_error, result.samples)
    return Comparison(metric, *names, difference)


def _column(result: TaskResult, key: str) -> Sequence[float]:
    return [float(record[key]) for record in result.records]


def _same_samples(a: TaskResult, b: TaskResult, *keys: str) -> None:
    seen_a, seen_b = ([[record.get(key) for key in keys] for record in result.records] for result in (a, b))
    if not seen_a or seen_a != seen_b:
        raise DataError(
            f"{a.name} and {b.name} cannot be compared: they were not run on the same samples in the same order. "
            "Run both models on one task."
        )

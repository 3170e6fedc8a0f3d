"""What a run's report is made of, as plain data: the run fills it, the writers only lay it out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from gristmill.errors import DataError


@dataclass(frozen=True)
class Stage:
    """Costs of one stage; None where a figure does not apply or was not measured."""

    name: str
    seconds: float
    tokens: int | None = None
    flops: float | None = None
    peak_memory_bytes: int | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Speed, where tokens were counted."""
        return None if self.tokens is None or self.seconds <= 0 else self.tokens / self.seconds


@dataclass(frozen=True)
class Series:
    """A line of a chart: y values over tokens seen so far, or over what the curve's x_label says. A NaN leaves a gap.
    `band` holds lower and upper bounds of the values, drawn as a shade."""

    name: str
    tokens: Sequence[float]
    values: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.values) or not self.tokens:
            raise DataError(f"series {self.name}: {len(self.tokens)} tokens and {len(self.values)} values")
        if self.band is not None and any(len(bound) != len(self.values) for bound in self.band):
            raise DataError(f"series {self.name}: a band needs a lower and an upper bound for each value")
        if not any(map(math.isfinite, self.values)):
            raise DataError(f"series {self.name}: no value is a finite number")


@dataclass(frozen=True)
class Curve:
    """A chart of losses, with the learning rate small under it. `hint` says what a healthy one looks like."""

    title: str
    series: Sequence[Series]
    y_label: str = "loss (nats per token)"
    learning_rate: Series | None = None
    hint: str = ""
    x_label: str = "tokens"
    logarithmic: Literal["", "x", "xy"] = ""
    """Axes that are drawn in logarithms."""


@dataclass(frozen=True)
class Table:
    """A table of plain text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class FunnelRow:
    """What is left after one step of the data funnel; the first row is the input."""

    step: str
    documents: int
    size_bytes: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Result:
    """One figure of one system. Raises DataError for a figure without a finite value and standard error."""

    name: str
    value: float
    standard_error: float
    samples: int
    note: str = ""
    system: str = ""
    """Which model: 'base', 'fine-tuned', ..."""
    unit: str = ""
    """Shown after the figure; '%' shows a share in [0, 1] as per cent."""
    chance: float | None = None
    """What guessing gives; a result that has it is a share in [0, 1] and is drawn as a bar against it."""
    majority: float | None = None
    """What always giving the most frequent answer gives."""
    task: str = ""
    """Fingerprint of the task, template included: figures with different ones are not comparable."""
    headline: bool = False
    """Shown large at the top."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and math.isfinite(self.standard_error) and self.standard_error >= 0):
            raise DataError(f"result {self.name} {self.system}: {self.value} ± {self.standard_error} is no figure")
        if self.chance is not None and not 0.0 <= self.value <= 1.0:
            raise DataError(f"result {self.name} {self.system}: {self.value} has a chance level but is no share")


@dataclass(frozen=True)
class Confusion:
    """`counts[i][j]` questions of class `labels[i]` were answered with `labels[j]` by `system`."""

    labels: Sequence[str]
    counts: Sequence[Sequence[int]]
    system: str = ""

    def __post_init__(self) -> None:
        if any(len(row) != len(self.labels) for row in self.counts) or len(self.counts) != len(self.labels):
            raise DataError("confusion: counts must be square, one row and one column per label")


@dataclass(frozen=True)
class Sample:
    """A prompt and what each system answered, by the system's name."""

    prompt: str
    answers: Mapping[str, str]
    reference: str | None = None


@dataclass(frozen=True)
class RunReport:
    """All that `report.md` and `report.html` show. Empty parts are left out of both."""

    name: str
    summary: str = ""
    """One or two sentences: what was trained on what."""
    stages: Sequence[Stage] = ()
    curves: Sequence[Curve] = ()
    tables: Sequence[Table] = ()
    funnel: Sequence[FunnelRow] = ()
    results: Sequence[Result] = ()
    verdicts: Sequence[str] = ()
    """Sentences of `Comparison.verdict`."""
    confusion: Confusion | None = None
    samples: Sequence[Sample] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)
    commands: Sequence[tuple[str, str]] = ()
    """What one can do with the run, and the command that does it."""

    @property
    def seconds(self) -> float:
        """Time of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def chance_charts(self) -> dict[str, list[Result]]:
        """Results that are read against chance, by their name, in order."""
        charts: dict[str, list[Result]] = {}
        for result in self.results:
            if result.chance is not None:
                charts.setdefault(result.name, []).append(result)
        return charts

"""A run report as Markdown: the tables of the page, for terminals, diffs and pull requests."""

import math
import re
from collections.abc import Iterable, Sequence

from gristmill.evaluate.formatting import count, dropped, duration, figure, flops, memory, percent
from gristmill.evaluate.run_report import Curve, RunReport


def markdown(report: RunReport) -> str:
    """GitHub-flavoured Markdown that ends in a newline; empty parts are left out."""
    parts = [f"# {_line(report.name)}"]
    if report.summary:
        parts.append(_line(report.summary))
    parts += _results(report) + _tables(report) + _training(report) + _data(report)
    parts += _samples(report) + _costs(report) + _use(report)
    if report.provenance:
        parts += ["## Provenance", _table(["what", "value"], report.provenance.items())]
    return "\n\n".join(parts) + "\n"


def _results(report: RunReport) -> list[str]:
    if not report.results:
        return []
    header = ["metric", "model", "value ± standard error", "chance", "samples", "task", "note"]
    rows = [[r.name, r.system, figure(r), percent(r.chance), f"{r.samples:,}", r.task, r.note] for r in report.results]
    parts = ["## Results", _table(header, rows)]
    if report.verdicts:
        parts.append("\n".join(f"- {_line(verdict)}" for verdict in report.verdicts))
    if report.confusion is not None:
        owner = f" ({_line(report.confusion.system)})" if report.confusion.system else ""
        counts = zip(report.confusion.labels, report.confusion.counts, strict=True)
        rows_of_counts = [[label, *map(str, row)] for label, row in counts]
        parts.append(f"Right answers in rows, choices in columns{owner}:")
        parts.append(_table(["", *report.confusion.labels], rows_of_counts))
    return parts


def _tables(report: RunReport) -> list[str]:
    return [part for table in report.tables for part in (f"## {_line(table.title)}", _table(table.header, table.rows))]


def _training(report: RunReport) -> list[str]:
    parts = [part for curve in report.curves for part in _curve(curve)]
    return ["## Training", *parts] if parts else []


def _curve(curve: Curve) -> list[str]:
    rows = []
    for series in curve.series:
        values = [value for value in series.values if math.isfinite(value)]
        ends = [f"{value:.4f}" for value in (values[0], min(values), values[-1])]
        rows.append([series.name, count(series.tokens[-1]), *ends])
    table = _table([curve.y_label, curve.x_label, "first", "lowest", "last"], rows)
    return [f"### {_line(curve.title)}", table, *([_line(curve.hint)] if curve.hint else [])]


def _data(report: RunReport) -> list[str]:
    if not report.funnel:
        return []
    rows = [
        [row.step, f"{row.documents:,}", gone, memory(row.size_bytes), row.note]
        for row, gone in zip(report.funnel, dropped(report.funnel), strict=True)
    ]
    return ["## Data", _table(["step", "documents", "dropped", "size", "note"], rows)]


def _samples(report: RunReport) -> list[str]:
    parts = []
    for sample in report.samples:
        parts += ["Prompt:", _fence(sample.prompt)]
        for system, answer in sample.answers.items():
            parts += [f"{_line(system)}:", _fence(answer)]
        if sample.reference is not None:
            parts += ["Reference:", _fence(sample.reference)]
    return ["## Samples", *parts] if parts else []


def _costs(report: RunReport) -> list[str]:
    if not report.stages:
        return []
    header = ["stage", "time", "tokens", "tokens/s", "compute", "peak memory"]
    rows = []
    for stage in report.stages:
        work = [count(stage.tokens), count(stage.tokens_per_second), flops(stage.flops)]
        rows.append([stage.name, duration(stage.seconds), *work, memory(stage.peak_memory_bytes)])
    rows.append(["all", duration(report.seconds), "", "", "", ""])
    return ["## Costs", _table(header, rows)]


def _use(report: RunReport) -> list[str]:
    parts = [part for purpose, command in report.commands for part in (f"{_line(purpose)}:", _fence(command))]
    return ["## Use it", *parts] if parts else []


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_row(header), _row(["---"] * len(header)), *(_row(row) for row in rows)]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_line(cell) for cell in cells) + " |"


def _line(text: str) -> str:
    """One line of plain text: no cell ends early, no tag or link begins."""
    return re.sub(r"([\\`*_\[\]|<>&~])", r"\\\1", " ".join(text.split()))


def _fence(text: str) -> str:
    """A block of literal text, fenced by more backticks than it holds in a row."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"

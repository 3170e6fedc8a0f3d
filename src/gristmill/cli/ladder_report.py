"""The report of a ladder: table, chart of the law with its band, and whether the forecast held."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from gristmill.errors import DataError
from gristmill.evaluate.formatting import count, duration, flops
from gristmill.evaluate.provenance import provenance
from gristmill.evaluate.report import Curve, Result, RunReport, Series, Stage, Table, write_report
from gristmill.scale.fit import fit_emergence
from gristmill.scale.ladder import Ladder, LadderConfig, Rung


def write_ladder_report(config: LadderConfig, ladder: Ladder) -> RunReport:
    """Write report.md and report.html into the ladder's directory. Raises MissingExtra without matplotlib."""
    report = ladder_report(config, ladder)
    write_report(report, config.directory)
    return report


def ladder_report(config: LadderConfig, ladder: Ladder) -> RunReport:
    """Test loss and task accuracy of every size side by side, and the forecast against what was measured."""
    forecast, law = ladder.forecast, ladder.forecast.law
    rungs = (*ladder.rungs, *ladder.checks)
    spread = float(np.std([rung.loss for rung in ladder.checks], ddof=1)) if len(ladder.checks) > 1 else 0.0
    error = math.hypot(
        spread / math.sqrt(len(ladder.checks)), float(np.mean([rung.standard_error for rung in ladder.checks]))
    )
    bounds = f"{'within' if ladder.held else 'outside'} the {forecast.confidence:.0%} bounds"
    off = 100 * (ladder.measured / forecast.loss - 1)
    floor = f" + {law.floor:.4g}" if law.floor else ""
    verdicts = [
        f"The law of {len(ladder.rungs)} runs, loss = {law.a:.4g} C^{law.b:.4f}{floor}, foretold {forecast.loss:.4f} "
        f"[{forecast.low:.4f}, {forecast.high:.4f}] for {flops(forecast.flops)}.",
        f"Measured: {ladder.measured:.4f} ± {error:.4f}, {off:+.1f} % off and {bounds}. "
        "The forecast was written down before the model was trained.",
    ]
    result = Result(
        "Loss foretold and measured",
        ladder.measured,
        error,
        len(ladder.checks),
        note=f"foretold {forecast.loss:.4f} [{forecast.low:.4f}, {forecast.high:.4f}]",
        system=f"{ladder.checks[0].name} parameters",
        headline=True,
    )
    return RunReport(
        name="Ladder of small models",
        summary=f"One family of models on {config.tokens_per_parameter:g} tokens a parameter, alike but for size.",
        results=[result],
        verdicts=verdicts,
        tables=[_table(rungs)],
        curves=[_law(ladder), *_tasks(rungs)],
        stages=[
            Stage(f"{rung.name}, seed {rung.seed}", rung.seconds, tokens=rung.tokens, flops=rung.flops)
            for rung in rungs
        ],
        provenance={
            **provenance(dataclasses.asdict(config), config.seed),
            "seeds": ", ".join(str(config.seed + turn) for turn in range(config.seeds)),
            **ladder.data,
        },
    )


def _table(rungs: Sequence[Rung]) -> Table:
    tasks = list(rungs[0].tasks)
    header = ["parameters", "seed", "shape", "tokens", "epochs", "compute", "time", "loss", *tasks]
    rows = []
    for rung in rungs:
        cells = [rung.name, str(rung.seed), f"{rung.layers} x {rung.hidden_size}", count(rung.tokens)]
        cells += [f"{rung.epochs:.2f}", flops(rung.flops), duration(rung.seconds)]
        cells.append(f"{rung.loss:.4f} ± {rung.standard_error:.4f}")
        cells += [f"{100 * right / trials:.1f} %" for right, trials in rung.tasks.values()]
        rows.append(cells)
    return Table("Held-out loss and task accuracy by size", header, rows)


def _law(ladder: Ladder) -> Curve:
    xs = [float(x) for x in ladder.band_flops]
    low, high = ([float(y) for y in bound] for bound in ladder.band)
    line = [ladder.forecast.law(x) for x in xs]
    return Curve(
        "The law, and the size that was foretold",
        [
            Series("law", xs, line, band=(low, high)),
            _points("fitted", ladder.rungs),
            _points("measured afterwards", ladder.checks),
        ],
        x_label="operations",
        logarithmic="xy",
        hint=f"The shade holds {ladder.forecast.confidence:.0%} of the refits. Points that bend away from the line say "
        "that the sizes are too few or too small, or the learning rate wrong.",
    )


def _points(name: str, rungs: Sequence[Rung]) -> Series:
    """Losses as points: the gap behind each keeps them from being joined, as runs of one size are no line."""
    flops = [rung.flops for rung in rungs for _ in range(2)]
    return Series(name, flops, [value for rung in rungs for value in (rung.loss, math.nan)])


def _tasks(rungs: Sequence[Rung]) -> list[Curve]:
    """Accuracy over size, with the emergence curve where there is one to fit."""
    curves = []
    for task in rungs[0].tasks:
        sizes = [float(rung.parameters) for rung in rungs]
        right, trials = zip(*(rung.tasks[task] for rung in rungs), strict=True)
        shares = [hits / of for hits, of in zip(right, trials, strict=True)]
        series = [Series("measured", sizes, shares)]
        try:
            fitted = fit_emergence(sizes, shares, trials)
            grid = np.geomspace(min(sizes), max(sizes), 50)
            series.append(Series("logistic in ln N", grid.tolist(), fitted(grid).tolist()))
        except DataError:
            pass  # all models succeed always or never: the points say so
        curves.append(Curve(f"Task: {task}", series, y_label="share right", x_label="parameters", logarithmic="x"))
    return curves

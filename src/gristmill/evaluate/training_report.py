"""The report of one training run, made from its metrics.jsonl alone: it can be made anew at any time, anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gristmill.errors import DataError
from gristmill.evaluate.formatting import count, duration, percent
from gristmill.evaluate.report import write_report
from gristmill.evaluate.run_report import Curve, Result, RunReport, Series, Stage, Table
from gristmill.files import read_jsonl

Record = dict[str, Any]


def write_training_report(
    directory: Path, *, name: str | None = None, provenance: Mapping[str, str] | None = None
) -> None:
    """Write report.html and report.md beside `directory/metrics.jsonl`; see `training_report`.

    Raises DataError as it does, and MissingExtra where matplotlib is missing.
    """
    write_report(training_report(directory, name=name, provenance=provenance), directory)


def training_report(
    directory: Path, *, name: str | None = None, provenance: Mapping[str, str] | None = None
) -> RunReport:
    """Losses, speed and whatever the monitors of the run recorded; a chart for each, and tables of probes and alarms.

    A last line that a kill cut off is left out. Raises DataError for a missing, broken or empty file, naming the line.
    """
    path = directory / "metrics.jsonl"
    records = _read(path)
    if not records:
        raise DataError(f"{path}: no step is recorded yet")
    last = records[-1]
    validated = [record for record in records if record.get("validation_loss") is not None]
    summary = f"{last['step']:,} steps, {count(last['tokens'])} tokens in {duration(last['seconds'])}."
    if validated:
        best = min(validated, key=lambda record: float(record["validation_loss"]))
        summary += f" Lowest held-out loss: {best['validation_loss']:.4f} nats at step {best['step']:,}."
    alarms = _alarms(records)
    if alarms:
        summary += f" Steps with alarms: {len({row[0] for row in alarms}):,}."
    peak = max(record.get("gpu_peak_memory_bytes") or record.get("peak_memory_bytes") or 0 for record in records)
    return RunReport(
        name=name or directory.name,
        summary=summary,
        stages=[Stage("training", last["seconds"], last["tokens"], peak_memory_bytes=peak or None)],
        curves=_curves(records),
        tables=[
            table
            for table in (
                _probe_table(records),
                Table("Alarms", ["step", "alarm"], alarms),
                Table("Skipped steps", ["step", "why"], _skipped(records)),
            )
            if table.rows
        ],
        results=_probe_results(records),
        provenance=provenance or {},
    )


def _read(path: Path) -> list[Record]:
    """The records; only the last line may be broken."""
    broken: list[DataError] = []
    records: list[Record] = []
    for number, record in read_jsonl(path, on_error=broken.append):
        if broken:
            raise broken[0]
        for key in ("step", "tokens", "seconds"):
            if not isinstance(record.get(key), int | float):
                raise DataError(f"{path} line {number}: {key} is missing or no number")
        records.append(record)
    return records


def _curves(records: Sequence[Record]) -> list[Curve]:
    rate = _series("learning rate", records, _at("learning_rate"))
    training = [_series("training", records, _at("loss")), _series("held out", records, _at("validation_loss"))]
    terms = [key.removeprefix("validation_") for record in records for key in record if key.startswith("validation_")]
    drawn = [
        _curve("Loss", training, learning_rate=rate, hint="Both lines fall and stay close."),
        *(
            _curve(
                f"Loss term {term}",
                [_series("training", records, _at(term)), _series("held out", records, _at(f"validation_{term}"))],
            )
            for term in dict.fromkeys(terms)
            if term != "loss"
        ),
        _curve("Gradient norm", [_series("before clipping", records, _at("gradient_norm"))], "norm"),
        _curve("Speed", [_series("tokens per second", records, _at("tokens_per_second"))], "tokens/s"),
        _curve("Use of the device", [_series("model FLOPs utilisation", records, _at("mfu"))], "share of the peak"),
        _layers("Gradient norm by layer", records, ("gradient_norms",), "norm"),
        _layers(
            "Update of the weights by layer",
            records,
            ("update_ratios",),
            "norm of the change / norm",
            "A healthy run is near 0.001.",
        ),
        _layers("Activations: largest value by layer", records, ("activations", "max_abs"), "absolute value"),
        _layers("Activations: standard deviation by layer", records, ("activations", "std"), "deviation"),
        _layers(
            "Attention entropy by layer",
            records,
            ("attention_entropy", "share"),
            "share of the greatest possible",
            "Near 0 attention has collapsed onto single tokens.",
        ),
        _layers("Dead units by layer", records, ("dead_units",), "share of the units"),
        _layers("Experts without a token by layer", records, ("dead_experts",), "share of the experts"),
        _curve(
            "Probes",
            [_series(kind, records, _at("probes", kind, "right")) for kind in _kinds(records)],
            "share of right answers",
            hint="The sets are small: read the trend.",
        ),
    ]
    return [curve for curve in drawn if curve is not None]


def _curve(
    title: str,
    series: Sequence[Series | None],
    y_label: str = "loss (nats per token)",
    *,
    learning_rate: Series | None = None,
    hint: str = "",
) -> Curve | None:
    """A chart of what there is; None when there is nothing."""
    found = [line for line in series if line is not None]
    return Curve(title, found[:4], y_label, learning_rate, hint) if found else None


def _layers(title: str, records: Sequence[Record], keys: tuple[str, ...], y_label: str, hint: str = "") -> Curve | None:
    """Greatest, middle and least figure over the layers: a chart of every layer shows nothing."""

    def over(choose: Callable[[list[float]], float]) -> Callable[[Record], float | None]:
        def figure(record: Record) -> float | None:
            layers = record.get(keys[0]) or {}
            values = [_dig(layer, keys[1:]) for layer in layers.values()]
            numbers = sorted(value for value in values if value is not None)
            return choose(numbers) if numbers else None

        return figure

    lines = [
        _series("greatest", records, over(lambda values: values[-1])),
        _series("median", records, over(lambda values: values[len(values) // 2])),
        _series("least", records, over(lambda values: values[0])),
    ]
    return _curve(title, lines, y_label, hint=hint)


def _series(name: str, records: Sequence[Record], figure: Callable[[Record], float | None]) -> Series | None:
    """Figure over tokens, where the record has it; None where none has."""
    points = [(record["tokens"], value) for record in records if (value := figure(record)) is not None]
    return Series(name, [x for x, _ in points], [y for _, y in points]) if points else None


def _at(*keys: str) -> Callable[[Record], float | None]:
    return lambda record: _dig(record, keys)


def _dig(value: Any, keys: Sequence[str]) -> float | None:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _kinds(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(kind for record in records for kind in record.get("probes", {})))


def _probe_table(records: Sequence[Record]) -> Table:
    rows = [
        [f"{record['step']:,}", kind, percent(found["right"]), percent(found["chance"]), percent(found["exact"])]
        for record in records
        for kind, found in record.get("probes", {}).items()
    ]
    return Table("Probes at checkpoints", ["step", "probe", "right", "chance", "exact"], rows)


def _probe_results(records: Sequence[Record]) -> list[Result]:
    """Those of the last checkpoint."""
    asked = [record for record in records if record.get("probes")]
    return [
        Result(
            f"Probe: {kind}",
            found["right"],
            found["standard_error"],
            found["samples"],
            note=f"{percent(found['exact'])} written exactly by greedy decoding",
            system=f"step {asked[-1]['step']:,}",
            unit="%",
            chance=found["chance"],
        )
        for kind, found in (asked[-1]["probes"].items() if asked else ())
    ]


def _alarms(records: Sequence[Record]) -> list[list[str]]:
    return [[f"{record['step']:,}", alarm] for record in records for alarm in record.get("alarms", [])]


def _skipped(records: Sequence[Record]) -> list[list[str]]:
    return [[f"{record['step']:,}", str(record["skipped"])] for record in records if record.get("skipped")]

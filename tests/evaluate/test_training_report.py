"""The report of a run is made of metrics.jsonl alone and shows what was recorded there."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from gristmill.errors import DataError
from gristmill.evaluate.training_report import training_report, write_training_report

PROBES = {"right": 0.75, "exact": 0.25, "chance": 0.2, "standard_error": 0.125, "samples": 12}


def record(step: int, **more: Any) -> dict[str, Any]:
    plain = {"step": step, "loss": 3.0 / step, "learning_rate": 1e-3, "gradient_norm": 1.0, "tokens_per_second": 500.0}
    return plain | {"tokens": 64 * step, "seconds": 0.5 * step} | more


def layers(*values: float | None) -> dict[str, Any]:
    return {f"layers.{number}": value for number, value in enumerate(values)}


RECORDS = [
    record(1),
    record(2, validation_loss=2.0, mfu=0.4, skipped="not finite: loss nan", loss=None, gradient_norm=None),
    record(
        3,
        gradient_norms=layers(1.0, 3.0, 2.0),
        activations=layers({"mean": 0.0, "std": 1.0, "max_abs": 5.0}, {"mean": 0.0, "std": None, "max_abs": None}),
        attention_entropy=layers({"nats": 1.0, "share": 0.5}),
        alarms=["activations/layers.1/std is not finite"],
        peak_memory_bytes=3 << 30,
    ),
    record(4, validation_loss=2.5, probes={"facts": PROBES}),
]


def write(directory: Path, records: list[dict[str, Any]], tail: str = "") -> Path:
    directory.mkdir(exist_ok=True)
    text = "".join(json.dumps(item) + "\n" for item in records)
    (directory / "metrics.jsonl").write_text(text + tail, encoding="utf-8")
    return directory


def test_both_files_show_losses_probes_alarms_and_skipped_steps(tmp_path: Path) -> None:
    write_training_report(write(tmp_path / "run", RECORDS), provenance={"seed": "7"})
    page, text = ((tmp_path / "run" / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    for part in (
        "Lowest held-out loss: 2.0000 nats at step 2",
        "Steps with alarms: 1.",
        "75.0 %",
        "Attention entropy by layer",
        "not finite: loss nan",
        "3.00 GiB",
    ):
        assert part in page
        assert part in text
    assert "activations/layers.1/std is not finite" in page
    assert page.count("<svg") >= 9


def test_charts_hold_the_recorded_figures(tmp_path: Path) -> None:
    curves = {curve.title: curve for curve in training_report(write(tmp_path, RECORDS)).curves}
    loss, held_out = curves["Loss"].series
    assert (list(loss.tokens), list(loss.values)) == ([64, 192, 256], [3.0, 1.0, 0.75])
    assert (list(held_out.tokens), list(held_out.values)) == ([128, 256], [2.0, 2.5])
    by_layer = {series.name: list(series.values) for series in curves["Gradient norm by layer"].series}
    assert by_layer == {"greatest": [3.0], "median": [2.0], "least": [1.0]}
    assert list(curves["Activations: largest value by layer"].series[0].values) == [5.0]
    assert list(curves["Probes"].series[0].values) == [0.75]
    assert "Dead units by layer" not in curves


def test_probes_are_shown_with_error_and_chance(tmp_path: Path) -> None:
    report = training_report(write(tmp_path, RECORDS), name="my run")
    (result,) = report.results
    assert (result.value, result.standard_error, result.samples, result.chance) == (0.75, 0.125, 12, 0.2)
    assert (report.name, result.system) == ("my run", "step 4")
    assert [table.title for table in report.tables] == ["Probes at checkpoints", "Alarms", "Skipped steps"]


def test_several_loss_terms_have_a_chart_each(tmp_path: Path) -> None:
    records = [record(1, mlm=2.0, nsp=0.7, validation_loss=2.7, validation_mlm=2.1, validation_nsp=0.6)]
    curves = {curve.title: curve for curve in training_report(write(tmp_path, records)).curves}
    assert [list(s.values) for s in curves["Loss term nsp"].series] == [[0.7], [0.6]]


def test_a_torn_last_line_is_left_out_and_other_damage_named(tmp_path: Path) -> None:
    assert training_report(write(tmp_path, RECORDS, '{"step": 5, "lo')).summary.startswith("4 steps")
    with pytest.raises(DataError, match="line 5"):
        training_report(write(tmp_path, RECORDS, '{"step": 5, "lo\n' + json.dumps(record(6)) + "\n"))
    with pytest.raises(DataError, match="line 1: tokens"):
        training_report(write(tmp_path, [{"step": 1, "seconds": 1.0}]))
    with pytest.raises(DataError, match="no step"):
        training_report(write(tmp_path, []))
    with pytest.raises(DataError, match="cannot be read"):
        training_report(tmp_path / "nowhere")
    assert not math.isnan(training_report(write(tmp_path, RECORDS[:1])).seconds)

"""bench: a report of quality and efficiency of one and the same run, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from engine import helpers
from gristmill import cli
from gristmill.engine.metrics.report import BenchReport, compare_reports

PERCENTILES = {"mean", "p50", "p95", "p99"}
SMALL = ("--requests", "4", "--prompt_tokens", "12", "--output_tokens", "6")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers.save(tmp_path_factory.mktemp("bench") / "model")


def bench(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert cli.main(["bench", "engine", *map(str, words)]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def swept(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """The report of a sweep, what was printed, and the folder of its files."""
    import contextlib
    import io

    folder, printed = tmp_path_factory.mktemp("out"), io.StringIO()
    files = ("--out", str(folder / "a.json"), "--plot", str(folder / "a.svg"))
    with contextlib.redirect_stdout(printed):
        words = ["bench", "engine", str(model), *SMALL, "--sweep", "[1,3]", "--watts", "50", "--dollars_per_hour", "2"]
        assert cli.main([*words, *files]) == 0
    text = printed.getvalue()
    return json.loads(text.splitlines()[-1]), text, folder


def test_the_report_holds_quality_and_efficiency(swept: tuple[dict[str, Any], str, Path]) -> None:
    report, text, folder = swept
    assert set(report) == set(get_type_hints(BenchReport))
    assert report["quality"].keys() == {"perplexity", "tokens", "text"}
    assert report["quality"]["perplexity"] > 1
    assert report["memory"].keys() == {"weights", "cache", "peak"}
    assert report["memory"]["weights"] == 4 * helpers.model().count_parameters()
    assert report["machine"]["flops"] > 0 < report["machine"]["bandwidth"]
    assert report["provenance"]["seed"] == "0"
    assert report["prefill"]["bound"] in ("memory", "compute")
    assert [point["level"] for point in report["points"]] == [1, 3]
    for point in report["points"]:
        summary = point["summary"]
        assert (summary["requests"], summary["prompt_tokens"], summary["output_tokens"]) == (4, 48, 24)
        for name in ("time_to_first_token", "inter_token_latency", "time_per_output_token", "latency"):
            assert summary[name].keys() == PERCENTILES
            assert 0 < summary[name]["p50"] <= summary[name]["p95"] <= summary[name]["p99"]
        assert summary["output_throughput"] == pytest.approx(24 / summary["duration"])
        assert summary["request_throughput"] == pytest.approx(4 / summary["duration"])
        # four requests, three at once: the last one is alone
        busy = {1: 1.0, 3: (6 * 3 + 6 * 1) / (12 * 3)}[point["level"]]
        assert point["slots_busy"] == pytest.approx(busy)
        assert point["errors"] == 0
        assert point["decode"]["share"] == pytest.approx(point["decode"]["least_seconds"] / point["decode"]["seconds"])
        energy = point["energy"]
        assert energy["joules"] == pytest.approx(50 * summary["duration"], rel=0.2)
        assert energy["joules_per_token"] == pytest.approx(energy["joules"] / 24)
        price = 2 / (summary["output_throughput"] * 3600) * 1e6
        assert point["dollars_per_million_tokens"] == pytest.approx(price)
    assert report["engine"]["generated_tokens"] >= 48
    assert json.loads((folder / "a.json").read_text()) == report
    assert (folder / "a.svg").read_text().lstrip().startswith("<?xml")
    assert "in flight" in text


def test_two_deployments_side_by_side(
    model: Path, swept: tuple[dict[str, Any], str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    earlier, _, folder = swept
    words = ["bench", "engine", str(model), *SMALL, "--dtype", "bfloat16", "--against", str(folder / "a.json")]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    now = json.loads(out.splitlines()[-1])
    compared = compare_reports(earlier, now)
    assert compared["weights, bytes"][0] == 2 * (compared["weights, bytes"][1] or 0)
    assert compared["perplexity"] == (earlier["quality"]["perplexity"], now["quality"]["perplexity"])
    assert compared["J/token"][0] is not None
    assert now["points"][0]["energy"]["source"]
    assert all(name in out for name in compared)


@pytest.mark.parametrize(
    "words", [("--arrivals", "poisson", "--rate", "200"), ("--arrivals", "burst", "--rate", "200", "--burst", "2")]
)
def test_open_loops(model: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    report = bench(capsys, model, *SMALL, *words, "--shared_prefix", "10", "--policy", "shortest", "--prefill_first")
    (point,) = report["points"]
    assert point["level"] == 200
    assert point["summary"]["requests"] == 4
    assert point["dollars_per_million_tokens"] is None


def test_a_text_of_ones_own_is_scored_in_windows(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = " ".join(helpers.CORPUS * 20)
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    report = bench(capsys, model, *SMALL, "--text", tmp_path / "t.txt")
    count = len(helpers.tokenizer().encode(text))
    assert count > 128, "longer than the context"
    assert report["quality"]["tokens"] == count - 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--rate", "3"], "--rate"),
        (["--arrivals", "poisson"], "--rate"),
        (["--arrivals", "poisson", "--rate", "1", "--concurrency", "2"], "--concurrency"),
        (["--arrivals", "burst", "--rate", "1"], "--burst"),
        (["--arrivals", "poisson", "--rate", "1", "--burst", "2"], "--burst"),
        (["--sweep", "[1,2]", "--concurrency", "2"], "--sweep"),
        (["--sweep", "[1.5]"], "whole number"),
        (["--concurrency", "0"], "above 0"),
        (["--requests", "0"], "requests"),
        (["--prompt_tokens", "500"], "context"),
        (["--plot", "a.txt"], ".svg"),
        (["--against", "nowhere.json"], "nowhere.json"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--shared_prefix", "999"], "shared_prefix"),
    ],
)
def test_what_does_not_apply_is_refused(
    model: Path, words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "engine", str(model), *words]) == 1
    assert named in capsys.readouterr().err

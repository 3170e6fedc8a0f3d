"""More and more languages in a model of one size."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest

from gristmill.errors import DataError
from gristmill.objectives.causal import CausalLM
from gristmill.train.language_sweep import SweepResult, language_sweep, sweep_markdown
from programs import program

EXAMPLE = program("languages")


def test_the_sweep_reports_every_number_of_languages_at_one_size() -> None:
    languages = [EXAMPLE.make_language(number) for number in range(6)]
    results = language_sweep(EXAMPLE.build, CausalLM(), languages, (1, 6), steps=60, seeds=(0, 1))
    assert [(result.languages, result.seed) for result in results] == [(1, 0), (1, 1), (6, 0), (6, 1)]
    assert {result.parameters for result in results} == {EXAMPLE.build(0).count_parameters()}
    for result in results:
        assert list(result.losses) == [f"language {number + 1}" for number in range(result.languages)]
        assert all(0 < loss < math.log(EXAMPLE.WORDS) for loss in result.losses.values())
    alone, crowded = (
        statistics.fmean(result.losses["language 1"] for result in results if result.languages == count)
        for count in (1, 6)
    )
    assert crowded > alone + 0.3  # interference: the same model and steps, shared


def test_a_sweep_is_the_same_again() -> None:
    languages = [EXAMPLE.make_language(number, documents=20) for number in range(2)]
    first, again = (
        language_sweep(EXAMPLE.build, CausalLM(), languages, (2,), steps=2, documents_per_step=4) for _ in range(2)
    )
    assert first == again


def test_the_table_has_means_errors_and_what_the_first_lost() -> None:
    results = [
        SweepResult(1, 0, 1000, {"en": 1.0}),
        SweepResult(1, 1, 1000, {"en": 1.2}),
        SweepResult(2, 0, 1000, {"en": 1.5, "zh": 2.0}),
        SweepResult(2, 1, 1000, {"en": 1.5, "zh": 2.2}),
    ]
    assert sweep_markdown(results).splitlines() == [
        "| languages | parameters | en | all | change of en |",
        "|---:|---:|---:|---:|---:|",
        "| 1 | 1,000 | 1.100 ± 0.100 | 1.100 ± 0.100 | +0.000 |",
        "| 2 | 1,000 | 1.500 ± 0.000 | 1.800 ± 0.050 | +0.400 |",
    ]


def test_counts_without_their_languages_are_refused() -> None:
    for counts in ((), (0,), (1, 3)):
        with pytest.raises(DataError, match="2 languages"):
            language_sweep(EXAMPLE.build, CausalLM(), [EXAMPLE.make_language(n) for n in range(2)], counts, steps=1)


def test_the_example_writes_its_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("COUNTS", (1, 2)), ("SEEDS", (0,)), ("STEPS", 1)):
        monkeypatch.setattr(EXAMPLE, name, value)
    EXAMPLE.main()
    assert "| 2 | " in capsys.readouterr().out
    written = json.loads((tmp_path / "languages.json").read_text())["results"]
    assert [len(result["losses"]) for result in written] == [1, 2]

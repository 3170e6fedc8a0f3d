"""A ladder is climbed once, goes on after a stop, writes its forecast first and shows everything side by side."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gristmill import cli
from gristmill.cli.ladder_report import ladder_report
from gristmill.corpus.shards import write_shards
from gristmill.errors import CheckpointError, DataError, GristmillError
from gristmill.evaluate.report_html import html
from gristmill.evaluate.report_markdown import markdown
from gristmill.model.transformer import Transformer
from gristmill.scale import ladder
from gristmill.scale.ladder import LadderConfig, Rung, climb, foretell
from gristmill.scale.laws import PowerLaw

VOCABULARY = 64


@cache
def documents() -> list[list[int]]:
    """Sequences in which the next token mostly follows from the last."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(400):
        ids = [int(draw.integers(VOCABULARY))]
        while len(ids) < 60:
            ids.append((5 * ids[-1] + 3) % VOCABULARY if draw.random() < 0.8 else int(draw.integers(VOCABULARY)))
        found.append(ids)
    return found


def config(directory: Path, **changes: Any) -> LadderConfig:
    """Three sizes of a few thousand weights, and a fourth."""
    if not (directory / "shards").exists():
        items = ((ids, None) for ids in documents())
        write_shards(items, directory / "shards", vocab_size=VOCABULARY, tokenizer_hash="t", eos_token_id=None)
    options: dict[str, Any] = {
        "data": str(directory / "shards"),
        "out": str(directory / "ladder"),
        "sizes": (9216, 15360, 41984),
        "next": 67840,
        "tokens_per_parameter": 0.25,
        "row_length": 64,
    }
    return LadderConfig(**{**options, **changes})


def test_a_ladder_is_climbed_reported_and_not_climbed_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def success(model: Transformer) -> tuple[int, int]:
        return model.config.hidden_size, 100

    chosen = config(tmp_path)
    found = climb(chosen, tasks={"width": success})
    assert [rung.parameters for rung in (*found.rungs, *found.checks)] == [9216, 15360, 41984, 67840]
    assert found.rungs[0].loss > found.checks[0].loss
    assert found.forecast.low < found.forecast.loss < found.forecast.high
    assert found.held == (found.forecast.low <= found.checks[0].loss <= found.forecast.high)
    text = markdown(ladder_report(chosen, found))
    # test loss and task accuracy of each size stand in one row, seeds and data beside them
    for rung in (*found.rungs, *found.checks):
        row = next(line for line in text.splitlines() if line.startswith(f"| {rung.name} |"))
        right, trials = rung.tasks["next token"]
        assert f"{rung.loss:.4f} ±" in row
        assert f"{100 * right / trials:.1f} %" in row
        assert f"{rung.hidden_size}.0 %" in row
    assert "| seeds | 0 |" in text
    assert "data hash" in text
    page = html(ladder_report(chosen, found))
    assert page.count("<svg") == 3  # the law and two tasks
    monkeypatch.setattr(ladder, "train", lambda *_, **__: pytest.fail("a rung was trained again"))
    assert climb(chosen, tasks={"width": success}).facts() == found.facts()
    assert "done before" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="other settings"):
        climb(dataclasses.replace(chosen, learning_rate=1.0))


def test_the_forecast_is_written_before_the_next_size_is_trained_and_a_stop_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, real, trained = config(tmp_path), ladder.train, []

    def stopping(model: Transformer, *arguments: Any, **options: Any) -> Any:
        trained.append(model.config.hidden_size)
        assert (tmp_path / "ladder" / "forecast.json").exists() == (len(trained) == 4)
        if len(trained) == 4:
            raise KeyboardInterrupt
        return real(model, *arguments, **options)

    monkeypatch.setattr(ladder, "train", stopping)
    arguments = ["plan", "ladder", "--ladder.data", chosen.data, "--ladder.out", chosen.out]
    arguments += ["--ladder.sizes", "[9216, 15360, 41984]", "--ladder.next", "67840"]
    arguments += ["--ladder.tokens_per_parameter", "0.25", "--ladder.row_length", "64"]
    assert cli.main(arguments) == 130
    before = json.loads((tmp_path / "ladder" / "forecast.json").read_text())
    monkeypatch.setattr(ladder, "train", real)
    assert cli.main(arguments) == 0
    assert json.loads((tmp_path / "ladder" / "forecast.json").read_text()) == before
    assert (tmp_path / "ladder" / "report.html").exists()
    assert trained == [16, 24, 32, 40]


def rung(parameters: int, loss: float) -> Rung:
    return Rung(f"{parameters}", 0, 2, 16, parameters, 1, 1.0, 120.0 * parameters**2, 1.0, loss, 0.01)


@pytest.mark.parametrize(("law", "truth"), [("power", PowerLaw(20, -0.06)), ("floor", PowerLaw(300, -0.2, 1.5))])
def test_the_forecast_of_a_law_without_noise_is_the_law(law: Any, truth: PowerLaw) -> None:
    sizes = [100_000 * 2**turn for turn in range(6)]
    rungs = [rung(size, truth(120.0 * size**2)) for size in sizes]
    forecast, _, band = foretell(rungs, 1e15, LadderConfig(law=law))
    assert forecast.loss == pytest.approx(truth(1e15), rel=1e-5)
    assert forecast.high - forecast.low < 1e-3
    assert (band[1] - band[0] < 1e-3).all()


def test_the_copying_task_counts_the_second_turn() -> None:
    class Copier:
        """Predicts what came `period` tokens before the next one."""

        config = type("", (), {"vocab_size": VOCABULARY})
        embed_tokens = type("", (), {"weight": type("", (), {"device": "cpu"})})
        period = 8

        def __call__(self, rows: Any) -> Any:
            import torch

            return torch.nn.functional.one_hot(rows.roll(self.period - 1, dims=1), VOCABULARY).float()

    right, trials = ladder.copying(Copier(), length=8)  # type: ignore[arg-type]
    assert right == trials == ladder.COPIES * 7


def test_held_out_documents_are_not_trained_on(tmp_path: Path) -> None:
    source, held_out, _ = ladder._open(config(tmp_path))
    assert len(source.lengths) == 380
    read = held_out.read(np.array([[0, 0, 60], [19, 0, 60]]))
    assert [ids.tolist() for ids, _ in read] == [documents()[19], documents()[399]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": (1, 2)}, "sizes"),
        ({"next": 20_000}, "next"),
        ({"law": "floor"}, "at least 4"),
        ({"seeds": 0}, "seeds"),
        ({"confidence": 1.0}, "confidence"),
        ({"sizes": (9216, 9300, 41984)}, "same shapes"),
        ({"sizes": (10, 15360, 41984)}, "too few for a vocabulary"),
    ],
)
def test_bad_ladders_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(GristmillError, match=message):
        climb(config(tmp_path, **changes))


def test_too_little_data_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="times the 22,800 there are"):
        climb(config(tmp_path, tokens_per_parameter=20.0))
    assert not (tmp_path / "ladder").exists()

"""gristmill quantize: a directory that every command reads, and a report beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cli.river import error, output, write_river
from gristmill.model.load import load_model
from gristmill.model.quantised.linear import Int4Linear

TEXT = "The river runs to the sea, and the sea is wide. So it went, from the wide sea to the river. " * 60


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    write_river(directory / "river")
    (directory / "calibration.txt").write_text(TEXT)
    (directory / "held.txt").write_text(TEXT[::-1])
    return directory


@pytest.mark.parametrize("scheme", ["int8", "w8a8", "int4"])
@pytest.mark.parametrize("method", ["round", "gptq", "awq"])
def test_it_writes_a_model_and_tells_what_it_cost(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], scheme: str, method: str
) -> None:
    options = ["--calibration", source / "calibration.txt"] if method != "round" else []
    told = output(
        capsys, "quantize", source / "river", tmp_path / "out", "--scheme", scheme, "--method", method,
        "--verify", "--text", source / "held.txt", *options,
    )  # fmt: skip
    facts = json.loads((tmp_path / "out/quantisation.json").read_text())
    assert (facts["scheme"], facts["method"], len(facts["layers"])) == (scheme, method, 2 * 4 + 1)
    assert facts["bytes_on_disk"] == (tmp_path / "out/model.safetensors").stat().st_size
    assert facts["bytes_after"] < 0.3 * facts["bytes_before"]
    assert f"9 matrices as {scheme} by method {method}" in told
    comparison = facts["comparison"]
    assert f"perplexity {comparison['perplexity_before']:.3f} -> {comparison['perplexity_after']:.3f}" in told
    assert 0 < comparison["largest_difference"] < 10 * comparison["spread"]
    assert comparison["greedy_agreement"] > 0.5
    assert facts["provenance"]["config hash"]
    model, _ = load_model(tmp_path / "out")
    assert isinstance(model.layers[0].mlp.down_proj, Int4Linear) == (scheme == "int4")
    said = output(capsys, "generate", tmp_path / "out", "--prompt", "The river", "--max_tokens", "3")
    assert said
    assert torch.isfinite(model(torch.arange(20))).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--group_size", "64"], "--group_size applies with --scheme int4 only"),
        (["--calibration", "x.txt"], "--calibration applies with --method gptq or awq only"),
        (["--method", "awq", "--by_activation", "false"], "--by_activation applies with --method gptq only"),
        (["--text", "x.txt"], "--text applies with --verify only"),
        (["--verify", "--text_tokens", "9"], "--text_tokens must be at least 1024"),
        (["--verify", "--text", "short.txt"], "--text: 4 tokens of text; at least"),
        (["--method", "gptq", "--calibration", "none.txt"], "none.txt"),
    ],
)
def test_what_does_not_apply_is_refused_and_nothing_written(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("the")
    assert words in error(capsys, "quantize", source / "river", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_it_neither_overwrites_nor_quantises_twice(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output(capsys, "quantize", source / "river", tmp_path / "out")
    assert "there already" in error(capsys, "quantize", source / "river", tmp_path / "out")
    assert "quantised already" in error(capsys, "quantize", tmp_path / "out", tmp_path / "again")

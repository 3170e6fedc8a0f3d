"""What the quickstart refuses, in one clear line, before it costs time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("rensa")

from gristmill import cli
from gristmill.errors import CheckpointError, GristmillError
from gristmill.quickstart import config as quickstart_config
from gristmill.quickstart.config import QuickstartConfig, choose_precision, train_config
from gristmill.quickstart.pipeline import settings
from gristmill.quickstart.run import StageRecord, claim, stage
from quickstart.toy import arguments, shrink, toy_articles, write_corpus


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setitem)
        yield


def refused(capsys: pytest.CaptureFixture[str], directory: Path, corpus: Path, *more: str) -> str:
    """The error of a run that must end with code 1 before anything is trained."""
    assert cli.main(arguments(directory, corpus, *more)) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("gristmill: ")
    assert not (directory / "tokenizer").exists()
    return last


def article(**changes: object) -> dict[str, object]:
    return {**next(iter(toy_articles().values())), **changes}


def lines(*records: object) -> str:
    return "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.json", b"", "a.json line 1"),
        ("a.json", b"{}", "a.json: the corpus is empty"),
        ("a.json", b"[]", "a.json: expected a JSON object of articles by title, found an array"),
        ("a.json", b'{"Mars":\n {"title": "Mars",\n "extract": }}', "a.json line 3 column 13: not JSON"),
        ("a.json", b'{"Mars": 3}', "a.json article 'Mars': expected a JSON object, found a number"),
        ("a.json", '{"Caf\u00e9": 1}'.encode("latin-1"), "a.json line 1: not UTF-8 at byte 5 (0xe9)"),
        ("a.json", json.dumps({"Mars": {"title": "Mars"}}).encode(), "article 'Mars': field \"extract\" is missing"),
        ("a.json", json.dumps({"x": article(topic=None)}).encode(), 'field "topic" must be a string, found null'),
        ("a.json", json.dumps({"x": article(title=" ")}).encode(), "article 'x': field \"title\" is empty"),
        ("a.jsonl", b"", "a.jsonl: the corpus is empty"),
        ("a.jsonl", lines(article(), '{"title": ').encode(), "a.jsonl line 2, column"),
        ("a.jsonl", lines(article(), article(extract=5)).encode(), 'a.jsonl line 2: field "extract" must be a string'),
        ("a.jsonl", lines(article()).encode() + b"\xff\n", "a.jsonl line 2: not UTF-8"),
    ],
)
def test_a_broken_corpus_is_named_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, wanted: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert wanted in refused(capsys, tmp_path / "run", tmp_path / name)


def test_a_corpus_that_is_not_there_leaves_no_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for corpus in (tmp_path / "gone.json", tmp_path):
        assert str(corpus) in refused(capsys, tmp_path / "run", corpus)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("count", "topics"), [(90, 1), (3, 3)])
def test_too_few_topics_are_told_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int, topics: int
) -> None:
    corpus = write_corpus(tmp_path / "a.json", toy_articles(count, topics))
    error = refused(capsys, tmp_path / "run", corpus)
    assert "the topic questions need at least two topics" in error
    assert "Astronomy" in error


def test_articles_that_are_all_cleaned_away_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = {title: {**item, "extract": "Short."} for title, item in toy_articles(9).items()}
    error = refused(capsys, tmp_path / "run", write_corpus(tmp_path / "a.json", short))
    assert "no document is left of 9; dropped by step: too-short 9" in error


def test_after_a_broken_corpus_is_mended_the_same_command_works_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "a.json"
    corpus.write_text("{")
    refused(capsys, tmp_path / "run", corpus)
    write_corpus(corpus)
    monkeypatch.setattr("gristmill.quickstart.stages.train_bpe", stop)
    with pytest.raises(Stop):
        cli.main(arguments(tmp_path / "run", corpus))


class Stop(Exception):
    """The run came so far."""


def stop(*_: object) -> None:
    raise Stop


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--seed", "-1"], "seed must be in"),
        (["--seed", str(2**70)], "seed must be in"),
        (["--device", "gpu"], "device must be cpu, cuda or cuda:N, got 'gpu'"),
        (["--device", "cuda:99"], "device cuda:99: no such CUDA device"),
    ],
)
def test_an_option_out_of_range_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], named: str
) -> None:
    assert named in refused(capsys, tmp_path / "run", write_corpus(tmp_path / "a.json"), *more)


def test_a_run_directory_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    error = refused(capsys, tmp_path / "file", write_corpus(tmp_path / "a.json"))
    assert f"{tmp_path / 'file'}: cannot be used as a run directory" in error


def begun(directory: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose first stage is done."""
    with monkeypatch.context() as patch:
        patch.setattr("gristmill.quickstart.stages.train_bpe", stop)
        with pytest.raises(Stop):
            cli.main(arguments(directory, corpus))


def test_other_settings_in_the_same_directory_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, run = write_corpus(tmp_path / "a.json"), tmp_path / "run"
    begun(run, corpus, monkeypatch)
    before = (run / "settings.json").read_bytes()
    error = refused(capsys, run, corpus, "--seed", "1", "--precision", "bfloat16")
    assert "seed: 0 there, 1 now" in error
    assert "precision: 'float32' there, 'bfloat16' now" in error
    assert "preset" not in error
    assert "--out" in error
    write_corpus(corpus, toy_articles(99))
    assert "corpus: 'a.json, SHA-256 " in refused(capsys, run, corpus), "another text in the same file"
    assert (run / "settings.json").read_bytes() == before


def test_the_same_corpus_may_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    places = [write_corpus(tmp_path / "a.json"), write_corpus(tmp_path / "b" / "a.json")]
    first, second = (settings(QuickstartConfig(preset="nano", corpus=str(place))) for place in places)
    assert first == second


def test_settings_may_change_until_a_stage_is_done(tmp_path: Path) -> None:
    claim(tmp_path, {"seed": 0})
    claim(tmp_path, {"seed": 1})
    stage(tmp_path, "corpus", lambda record: None)
    claim(tmp_path, {"seed": 1})
    with pytest.raises(CheckpointError, match="seed: 1 there, 2 now"):
        claim(tmp_path, {"seed": 2})


@pytest.mark.parametrize("content", ["", '{"name": "corpus", "sec', "[]", "{}", '{"name": "x", "surprise": 1}', "3"])
def test_a_damaged_record_of_a_stage_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    corpus, run = write_corpus(tmp_path / "a.json"), tmp_path / "run"
    begun(run, corpus, monkeypatch)
    (run / "stages" / "corpus.json").write_text(content)
    error = refused(capsys, run, corpus)
    assert f"{run / 'stages' / 'corpus.json'}: not a readable record" in error
    assert "Delete it" in error


@pytest.mark.parametrize("content", ["", "{", "[1]", "3"])
def test_damaged_settings_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    corpus, run = write_corpus(tmp_path / "a.json"), tmp_path / "run"
    begun(run, corpus, monkeypatch)
    (run / "settings.json").write_text(content)
    assert "settings.json: not a JSON object" in refused(capsys, run, corpus)


def test_a_stage_is_done_once_and_a_failed_one_again(tmp_path: Path) -> None:
    calls: list[str] = []

    def work(record: StageRecord) -> None:
        calls.append("called")
        if len(calls) == 1:
            raise GristmillError("not yet")
        record.facts = {"n": 3}

    with pytest.raises(GristmillError):
        stage(tmp_path, "corpus", work)
    first, second = stage(tmp_path, "corpus", work), stage(tmp_path, "corpus", work)
    assert len(calls) == 2
    assert first == second
    assert first.facts == {"n": 3}
    assert first.peak_memory_bytes is not None
    assert first.peak_memory_bytes > 1 << 20


def test_the_presets_spend_what_their_table_says() -> None:
    for name, budget in quickstart_config.BUDGETS.items():
        made = train_config(budget.pretrain_epochs, 1e-3, 40, "float32")
        assert made.steps == round(40 * budget.pretrain_epochs), name
        assert made.checkpoint_every <= 50
    assert train_config(0.001, 1e-3, 3, "float32").steps == 1


def test_precision_is_what_was_asked_for_or_fits_the_processor() -> None:
    for asked in ("float32", "bfloat16"):
        assert choose_precision(QuickstartConfig(precision=asked)) == asked
    assert choose_precision(QuickstartConfig()) in ("float32", "bfloat16")

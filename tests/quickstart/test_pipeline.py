"""The quickstart from a corpus to a report, on a toy corpus."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("rensa")
pytest.importorskip("matplotlib")

from gristmill import LLM, cli, load_model
from gristmill.align.encyclopedia import UNKNOWN_TOPIC
from gristmill.corpus.shards import TokenDataset
from gristmill.corpus.sources import read_articles, read_documents
from gristmill.evaluate.run_report import RunReport
from gristmill.quickstart import evaluation
from gristmill.quickstart.config import QuickstartConfig
from gristmill.quickstart.pipeline import make_report
from gristmill.quickstart.run import StageRecord
from gristmill.quickstart.stages import Quickstart, spread
from gristmill.tokens.tokenizer import Tokenizer
from gristmill.tokens.train import train_bpe
from quickstart.toy import STAGES, arguments, shrink, toy_articles, write_corpus


@pytest.fixture(scope="module")
def small() -> Iterator[pytest.MonkeyPatch]:
    """The toy preset, for all tests of the module."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setitem)
        yield patch


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, small: pytest.MonkeyPatch) -> Quickstart:
    """A finished run."""
    directory = tmp_path_factory.mktemp("quick")
    corpus = write_corpus(directory / "toy.json")
    assert cli.main(arguments(directory / "run", corpus)) == 0
    return Quickstart(
        QuickstartConfig(preset="nano", out=str(directory / "run"), corpus=str(corpus), precision="float32")
    )


@pytest.fixture(scope="module")
def report(done: Quickstart) -> RunReport:
    return make_report(done, records(done))


def records(run: Quickstart) -> dict[str, StageRecord]:
    return {name: StageRecord(**json.loads((run.directory / "stages" / f"{name}.json").read_text())) for name in STAGES}


def digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_all_files_stand_and_nothing_half_written(done: Quickstart) -> None:
    files = digests(done.directory)
    expected = {
        "settings.json", "report.md", "report.html", "tokenizer/tokenizer.json", "corpus/documents.jsonl",
        "corpus/rejects.jsonl", "corpus/funnel.json", "pretrain/metrics.jsonl", "finetune/metrics.jsonl",
    }  # fmt: skip
    expected |= {f"{model}/{name}" for model in ("base", "export") for name in ("config.json", "model.safetensors")}
    expected |= {f"stages/{name}.json" for name in STAGES}
    assert expected <= files.keys()
    assert not [name for name in files if name.endswith(".tmp")]


def test_a_second_run_does_nothing_and_leaves_every_byte(
    done: Quickstart, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digests(done.directory)
    monkeypatch.setattr("gristmill.evaluate.provenance.git_revision", lambda _: "another revision")
    assert cli.main(arguments(done.directory, Path(done.config.corpus))) == 0
    assert capsys.readouterr().err.splitlines() == [f"{name}: done before" for name in STAGES]
    assert digests(done.directory) == before, "figures keep the provenance of the run that measured them"


def test_it_ends_by_telling_what_to_do_next_and_that_works(
    done: Quickstart, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(done.directory, Path(done.config.corpus))) == 0
    out = capsys.readouterr().out
    assert f"chat {done.directory}" in out
    assert f"serve {done.directory}" in out
    assert f"{done.directory / 'report.html'}" in out
    for model in (done.directory, done.base_directory):
        assert cli.main(["generate", str(model), "--prompt", "The star", "--max_tokens", "4"]) == 0
    assert LLM(done.directory).renderer.stop_token_ids


@pytest.mark.peer
def test_the_export_has_the_logits_of_transformers(done: Quickstart) -> None:
    transformers = pytest.importorskip("transformers")
    model, tokenizer = load_model(done.directory)
    ids = torch.tensor([tokenizer.encode(done.documents[1][0].text)])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(done.export_directory, dtype=torch.float32)
    assert float((theirs(ids).logits - model(ids)).detach().abs().max()) < 1e-4
    assert records(done)["export"].facts["checked"] == "transformers"
    loaded = transformers.AutoTokenizer.from_pretrained(done.export_directory)
    assert loaded.encode("The star orbits.") == tokenizer.encode("The star orbits.")


def test_the_export_is_the_fine_tuned_model_and_base_is_the_pretrained_one(done: Quickstart) -> None:
    (base, _), (tuned, _) = load_model(done.base_directory), load_model(done.export_directory)
    assert not torch.equal(base.embed_tokens.weight, tuned.embed_tokens.weight)
    for name, model in (("pretrain", base), ("finetune", tuned)):
        from safetensors.torch import load_file

        newest = sorted((done.directory / name / "checkpoints").iterdir())[-1]
        weights = load_file(newest / "model.safetensors")
        assert all(torch.equal(weights[key], value) for key, value in model.named_parameters())


def test_losses_fall(done: Quickstart, report: RunReport) -> None:
    assert [curve.title for curve in report.curves] == ["Pretraining", "Fine-tuning"]
    for curve in report.curves:
        training, held_out = curve.series
        assert training.values[-1] < training.values[0] - 0.5
        assert held_out.values[-1] < held_out.values[0]


def held_out_ids(run: Quickstart) -> set[str]:
    training, held_out = run.documents
    assert held_out
    assert not {document.id for document in training} & {document.id for document in held_out}
    everything = {document.id for document in read_documents(run.directory / "corpus" / "documents.jsonl")}
    assert {document.id for document in training + held_out} == everything
    return {document.id for document in held_out}


def test_held_out_articles_are_in_no_training_data(done: Quickstart) -> None:
    """Neither the tokenizer nor pretraining nor fine-tuning has seen them; each toy title is a name of its own."""
    hidden = held_out_ids(done)
    for name in ("train", "questions"):
        source = TokenDataset.open(done.directory / "tokens" / name)
        texts = [done.tokenizer.decode(source.document(number).tolist()) for number in range(len(source))]
        joined = "\n".join(texts)
        assert not [title for title in hidden if title in joined], name
        assert all(document.id in joined for document in done.documents[0]), "while the others all are"
    for name in ("held-out", "questions-held-out"):
        source = TokenDataset.open(done.directory / "tokens" / name)
        joined = "\n".join(done.tokenizer.decode(source.document(number).tolist()) for number in range(len(source)))
        assert not [document.id for document in done.documents[0] if document.id in joined], name
        assert all(title in joined for title in hidden)


def test_the_tokenizer_is_made_of_the_training_text_alone(done: Quickstart) -> None:
    alone = train_bpe([document.text for document in done.documents[0]], 400)
    assert alone.backend.to_str() == Tokenizer.load(done.directory / "tokenizer").backend.to_str()
    leaking = train_bpe([document.text for part in done.documents for document in part], 400)
    assert leaking.backend.to_str() != alone.backend.to_str(), "the comparison can tell"


def test_the_questions_are_about_held_out_articles_of_every_topic(done: Quickstart) -> None:
    asked, left_out = evaluation._topic_articles(done)
    assert left_out == 0
    assert {article.title for article in asked} <= held_out_ids(done)
    assert {article.topic for article in asked} == {document.metadata["topic"] for document in done.documents[1]}


def test_the_report_reads_its_figures_against_chance_majority_and_the_better_base(
    done: Quickstart, report: RunReport
) -> None:
    topic = {result.system: result for result in report.results if result.name == "Topic questions"}
    assert topic.keys() == {"fine-tuned", "base", "base, plain text"}
    asked, _ = evaluation._topic_articles(done)
    counts = [sum(article.topic == name for article in asked) for name in {article.topic for article in asked}]
    for result in topic.values():
        assert result.samples == len(asked)
        assert result.chance == pytest.approx(1 / len(counts))
        assert result.majority == pytest.approx(max(counts) / len(asked))
    to_chance, to_base, to_majority = report.verdicts
    best = max(topic["base"].value, topic["base, plain text"].value)
    for verdict, level in ((to_chance, 1 / len(counts)), (to_base, best), (to_majority, max(counts) / len(asked))):
        assert f"({topic['fine-tuned'].value - level:+.4f} " in verdict
        assert f"{len(asked)} samples" in verdict
    assert {result.name for result in report.results} > {"Bits per byte", "Perplexity per token"}


def test_base_and_fine_tuned_model_answer_the_same_questions(done: Quickstart) -> None:
    asked, _ = evaluation._topic_articles(done)
    labels = sorted({article.topic for article in asked})
    llm = LLM(done.export_directory)
    chat, plain = evaluation._topic_task(asked, labels, llm.renderer), evaluation._plain_task(asked, labels)
    assert [question.gold for question in chat.questions] == [question.gold for question in plain.questions]
    assert [labels[question.gold] for question in chat.questions] == [article.topic for article in asked]
    assert chat.end == "<|im_end|>", "an option that begins another has no advantage"
    assert llm.tokenizer.encode(chat.end)[-1] in llm.tokenizer.stop_token_ids
    for question, article in zip(plain.questions, asked, strict=True):
        assert article.topic not in str(question.prompt)


def test_costs_and_provenance_are_in_both_reports(done: Quickstart, report: RunReport) -> None:
    assert [stage.name for stage in report.stages] == list(STAGES)
    by_name = {stage.name: stage for stage in report.stages}
    for name in ("pretrain", "finetune"):
        stage = by_name[name]
        last = json.loads((done.directory / name / "metrics.jsonl").read_text().splitlines()[-1])
        assert stage.tokens == last["tokens"]
        assert stage.seconds == pytest.approx(last["seconds"], rel=0.5)
        assert stage.flops is not None
        assert stage.flops > 6 * 20_000 * last["tokens"] / 2
    digest = hashlib.sha256(Path(done.config.corpus).read_bytes()).hexdigest()
    assert report.provenance["corpus"] == f"toy.json, SHA-256 {digest}"
    assert report.provenance["seed"] == "0"
    assert report.provenance["precision"] == "float32"
    markdown, html = ((done.directory / f"report.{kind}").read_text(encoding="utf-8") for kind in ("md", "html"))
    for text in (markdown, html):
        assert digest in text
        assert "always the most frequent topic" in text
        assert "Astronomy" in text
    assert "<svg" in html
    training, held_out = done.documents
    assert f"{len(training)} short articles" in report.summary
    assert f"{len(held_out)} other articles are held out" in report.summary
    assert report.funnel[0].documents == len(toy_articles())
    assert report.funnel[-1].documents == len(training) + len(held_out)


def test_jsonl_gives_the_same_documents(tmp_path: Path, done: Quickstart) -> None:
    lines = tmp_path / "toy.jsonl"
    lines.write_text("".join(json.dumps(article) + "\n" for article in toy_articles().values()), encoding="utf-8")
    assert list(read_articles(lines)) == list(read_articles(Path(done.config.corpus)))


def test_articles_that_do_not_fit_are_counted_and_the_run_goes_on(
    tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sentences longer than the context, words of the template in the text, topics that are not told."""
    monkeypatch.setattr(evaluation, "logits_difference", lambda *_: 1e-6)
    articles, draw = toy_articles(180), random.Random(0)
    for number, article in enumerate(articles.values()):
        if number % 6 == 0:
            article["extract"] = " ".join(draw.choices(article["extract"].replace(".", "").split(), k=300))
        elif number % 6 == 1:
            article["description"] = "<|im_start|>"
        elif number % 6 == 2:
            article["topic"] = ("", UNKNOWN_TOPIC)[number % 12 == 2]
    assert cli.main(arguments(tmp_path / "run", write_corpus(tmp_path / "odd.json", articles))) == 0
    err = capsys.readouterr().err
    run = Quickstart(QuickstartConfig(preset="nano", out=str(tmp_path / "run"), corpus=str(tmp_path / "odd.json")))
    facts = records(run)["questions"].facts
    assert facts["left_out"] > 0
    assert f"{facts['left_out']} of {facts['left_out'] + facts['pairs']} pairs left out, the first: conversation" in err
    asked, left_out = evaluation._topic_articles(run)
    assert asked
    assert left_out > 0
    assert f"{left_out} too long to ask" in (run.directory / "report.md").read_text()
    assert all(article.has_topic for article in asked)


@pytest.mark.parametrize("difference", [2e-3, float("nan")])
def test_an_export_with_other_logits_is_refused(
    done: Quickstart, monkeypatch: pytest.MonkeyPatch, difference: float
) -> None:
    monkeypatch.setattr(evaluation, "logits_difference", lambda *_: difference)
    with pytest.raises(Exception, match="logits differ"):
        evaluation.check_export(done, StageRecord("export"))


def test_spread_keeps_the_shares_of_a_sorted_list() -> None:
    items = ["a"] * 50 + ["b"] * 30 + ["c"] * 20
    chosen = spread(items, 10)
    assert [chosen.count(letter) for letter in "abc"] == [5, 3, 2]
    assert spread(items, None) == spread(items, 100) == spread(items, 1000) == items
    assert spread(list(range(10_033)), 3000)[-1] >= 10_029
    assert len(set(spread(list(range(7)), 5))) == 5

"""From text to a model on disk, with every objective; what is refused; and what an interruption leaves."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from gristmill import cli
from gristmill.cli.options import parse
from gristmill.corpus.loader import ExampleLoader
from gristmill.corpus.shards import write_shards
from gristmill.errors import CheckpointError, DataError, GristmillError
from gristmill.files import exclusive
from gristmill.model.accounting import flops_per_token
from gristmill.model.load import load_any
from gristmill.pretrain import run
from gristmill.pretrain.config import (
    ENCODER,
    ENCODER_DECODER,
    ObjectiveName,
    PretrainConfig,
    Training,
    WatchConfig,
)
from gristmill.pretrain.data import prepare_tokenizer
from gristmill.pretrain.recipes import build
from gristmill.pretrain.run import pretrain
from gristmill.tokens.tokenizer import Tokenizer
from gristmill.train.metrics import read_metrics
from gristmill.train.parallel.layout import Parallel

WORDS = [
    "the",
    "a",
    "mill",
    "grinds",
    "old",
    "wheat",
    "while",
    "wide",
    "water",
    "turns",
    "its",
    "slow",
    "stone",
    "and",
    "nobody",
    "sees",
    "who",
    "fills",
    "the",
    "sacks",
]
TRAIN = Training(steps=2, validate_every=1, checkpoint_every=1)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred paragraphs."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("text") / "mill.txt"
    sentence = lambda: " ".join(draw.choices(WORDS, k=draw.randint(4, 9))).capitalize() + "."  # noqa: E731
    path.write_text("\n\n".join(" ".join(sentence() for _ in range(draw.randint(2, 6))) for _ in range(300)))
    return path


def config(directory: Path, text: Path, **changes: Any) -> PretrainConfig:
    options: dict[str, Any] = {"data": str(text), "model": "nano", "vocab_size": 400, "row_length": 64, "train": TRAIN}
    return PretrainConfig(directory, **{**options, **changes})


@pytest.mark.parametrize("objective", get_args(ObjectiveName))
def test_every_objective_gives_a_model_that_loads(tmp_path: Path, text: Path, objective: ObjectiveName) -> None:
    done = pretrain(config(tmp_path, text, objective=objective))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    assert records[-1]["validation_loss"] > 0
    loaded = load_any(done.model)
    found = json.loads((done.model / "config.json").read_text())["architectures"][0]
    family = "Bert" if objective in ENCODER else "T5" if objective in ENCODER_DECODER else "Llama"
    assert found.startswith(family) or (objective == "electra" and found.startswith("Electra"))
    assert loaded is not None
    assert Tokenizer.load(done.model).vocab_size <= 400 + 100
    assert (tmp_path / "report.html").exists()


@pytest.mark.peer
@pytest.mark.parametrize(
    ("objective", "name"),
    [("masked", "BertForMaskedLM"), ("span_corruption", "T5ForConditionalGeneration"), ("causal", "LlamaForCausalLM")],
)
def test_transformers_reads_what_it_leaves(tmp_path: Path, text: Path, objective: ObjectiveName, name: str) -> None:
    import transformers

    done = pretrain(config(tmp_path, text, objective=objective))
    model, told = getattr(transformers, name).from_pretrained(done.model, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert model.num_parameters() == pytest.approx(done.parameters, rel=0.01)


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pretrain(config(tmp_path / "whole", text))
    original = run.train

    def stopping(*arguments: Any, **keywords: Any) -> Any:
        class Loader:
            inner = arguments[2]
            batches_per_epoch = inner.batches_per_epoch

            def batch(self, number: int) -> Any:
                if number == 1:
                    raise KeyboardInterrupt
                return self.inner.batch(number)

        return original(*arguments[:2], Loader(), *arguments[3:], **keywords)

    monkeypatch.setattr(run, "train", stopping)
    assert cli.main(["pretrain", str(tmp_path / "cut"), "--config", str(written(tmp_path, text))]) == 130
    monkeypatch.setattr(run, "train", original)
    (tmp_path / "cut" / "tokenizer" / "tokenizer.json").touch()
    cut = pretrain(config(tmp_path / "cut", text))
    ours, theirs = (load_any(done.model)[0] for done in (cut, whole))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def written(tmp_path: Path, text: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"data: {text}\nmodel: nano\nvocab_size: 400\nrow_length: 64\n"
        "train:\n  tokens: null\n  steps: 2\n  validate_every: 1\n  checkpoint_every: 1\n"
    )
    return path


def test_several_sources_are_mixed_by_weight_and_workers_change_nothing(tmp_path: Path, text: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"Line {number} of the book."}) + "\n" for number in range(400)))
    both = {"data": (str(text), str(other)), "weights": (0.7, 0.3)}
    one = pretrain(config(tmp_path / "one", text, **both))
    two = pretrain(config(tmp_path / "two", text, workers=1, **both))
    assert (one.position.tokens, one.utilisation) == (two.position.tokens, two.utilisation)
    losses = [[r["loss"] for r in read_metrics(tmp_path / n / "metrics.jsonl")] for n in ("one", "two")]
    assert losses[0] == losses[1]


def test_what_is_watched_is_recorded(tmp_path: Path, text: Path) -> None:
    watch = WatchConfig(every=1, mfu=True, probes=True, patience=5)
    pretrain(config(tmp_path, text, watch=watch))
    record = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert {"mfu", "gradient_norms", "activations", "probes"} <= record.keys()
    assert "arithmetic" in (tmp_path / "report.md").read_text()


def test_the_speed_of_two_models_at_once_counts_both(tmp_path: Path, text: Path) -> None:
    watched = config(tmp_path, text, objective="electra", watch=WatchConfig(mfu=True))
    tokenizer = prepare_tokenizer(watched)
    recipe = build(watched, tokenizer)
    examples = [([*range(5, 45)], None)] * 20
    loader = ExampleLoader(examples, examples_per_batch=20, seed=0, prepare=recipe.objective.prepare)
    monitor: Any = run._callbacks(watched, tokenizer, recipe, loader)[0]
    both = flops_per_token(recipe.model.discriminator.config, 42) + flops_per_token(recipe.model.generator.config, 42)
    assert both < monitor.flops_per_token < 1.5 * both  # the heads come on top


def test_the_speed_of_an_encoder_with_a_decoder_is_known(tmp_path: Path, text: Path) -> None:
    pretrain(config(tmp_path, text, objective="span_corruption", watch=WatchConfig(mfu=True)))
    assert all(record["mfu"] > 0 for record in read_metrics(tmp_path / "metrics.jsonl"))


def test_a_run_with_other_options_is_refused_and_they_are_named(tmp_path: Path, text: Path) -> None:
    pretrain(config(tmp_path, text))
    with pytest.raises(CheckpointError, match=r"other settings \(train.learning_rate: 0.001 there, 0.5 now\)"):
        pretrain(config(tmp_path, text, train=replace(TRAIN, learning_rate=0.5)))
    with pytest.raises(CheckpointError, match="vocab_size: 400 there, 300 now"):
        pretrain(config(tmp_path, text, vocab_size=300))


def test_what_does_not_decide_the_weights_may_change_on_the_way(tmp_path: Path, text: Path) -> None:
    pretrain(config(tmp_path, text))
    train = replace(TRAIN, checkpoint_every=5, validate_every=7, keep_checkpoints=3)
    done = pretrain(config(tmp_path, text, train=train, watch=WatchConfig(every=3)))
    assert done.position.step == 2
    assert cli.main(["pretrain", "--config", str(tmp_path / "settings.json")]) == 0


def test_other_data_are_refused_and_those_of_the_run_stay(tmp_path: Path, text: Path) -> None:
    source = tmp_path / "own.txt"
    source.write_text(text.read_text())
    pretrain(config(tmp_path / "run", source))
    index = (tmp_path / "run" / "tokens" / "00" / "train" / "index.json").read_text()
    source.write_text(text.read_text() + "\n\nOne paragraph more.")
    with pytest.raises(CheckpointError, match=r"own\.txt gives other tokens than those"):
        pretrain(config(tmp_path / "run", source))
    assert (tmp_path / "run" / "tokens" / "00" / "train" / "index.json").read_text() == index
    source.write_text(text.read_text())  # with another time
    assert pretrain(config(tmp_path / "run", source)).position.step == 2


def test_a_tokenizer_on_which_nothing_hangs_yet_is_made_anew(tmp_path: Path, text: Path) -> None:
    first = prepare_tokenizer(config(tmp_path, text))
    assert first.id_of("[MASK]") is None
    second = prepare_tokenizer(config(tmp_path, text, objective="masked", vocab_size=300))
    assert second.id_of("[MASK]") is not None
    assert second.vocab_size <= 300


def test_shards_that_a_run_left_bring_their_held_out_part(tmp_path: Path, text: Path) -> None:
    first = pretrain(config(tmp_path / "first", text))
    left = tmp_path / "first" / "tokens" / "00"
    pretrain(config(tmp_path / "second", left, tokenizer=str(first.model)))
    ours, theirs = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("first", "second"))
    assert [record["validation_loss"] for record in ours] == [record["validation_loss"] for record in theirs]


def test_the_field_of_the_text_and_what_to_do_about_broken_lines_are_options(tmp_path: Path) -> None:
    source = tmp_path / "pages.jsonl"
    lines = [json.dumps({"title": "x", "body": f"Page {number} of the book of the mill."}) for number in range(200)]
    source.write_text("\n".join([*lines, '{"body": 3']))
    with pytest.raises(DataError, match=r"line 1: .*Use --text_field body, or --on_error skip"):
        pretrain(config(tmp_path / "run", source))
    with pytest.raises(DataError, match="line 201"):
        pretrain(config(tmp_path / "run", source, text_field="body"))
    pretrain(config(tmp_path / "run", source, text_field="body", on_error="skip"))
    assert (tmp_path / "run" / "export" / "config.json").exists()


def test_a_length_in_steps_needs_no_word_about_tokens(tmp_path: Path, text: Path) -> None:
    words = [str(tmp_path), "--data", str(text)]
    assert parse(PretrainConfig, "pretrain", [*words, "--train.steps", "3"]).train.tokens is None
    assert parse(PretrainConfig, "pretrain", words).train.tokens == 2_000_000
    with pytest.raises(GristmillError, match="tokens or steps"):
        parse(PretrainConfig, "pretrain", [*words, "--train.steps", "3", "--train.tokens", "9"])


def test_two_runs_in_one_directory_are_refused(tmp_path: Path, text: Path) -> None:
    with exclusive(tmp_path), pytest.raises(GristmillError, match="another process is running here"):
        pretrain(config(tmp_path, text))


def test_processes_that_would_all_do_the_same_are_refused(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(GristmillError, match=r"--parallel\.data null"):
        pretrain(config(tmp_path, text))
    assert not (tmp_path / "tokenizer").exists()


def test_two_processes_of_torchrun_learn_what_one_does(tmp_path: Path, text: Path) -> None:
    """The verb as docs/scale-out.md starts it, with the objective whose model is two."""
    train = replace(TRAIN, micro_batches=2)
    pretrain(config(tmp_path / "one", text, objective="electra", train=train))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", sys.executable]
    words += ["-m", "gristmill", "pretrain", "--config", str(tmp_path / "one" / "settings.json")]
    words += [str(tmp_path / "two"), "--parallel.shard", "2"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-5)
    assert load_any(tmp_path / "two") is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "no-such-file"}, "no-such-file is neither a file"),
        ({"model": "gpt2", "row_length": 2000}, "context of 1024: set row_length to 1024"),
        ({"model": "gpt2", "objective": "masked"}, "takes a preset"),
        ({"model": "smal"}, "Did you mean small"),
        ({"model": "bert-base"}, "bert-base is an encoder"),
        ({"data": "a.txt,b.txt"}, r"Several are written \[a,b\]"),
        ({"held_out": 1e-9}, "too few documents to hold out"),
        ({"device": "cuda"}, "no CUDA device"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, text: Path, changes: dict[str, Any], message: str) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(GristmillError, match=message):
        pretrain(config(tmp_path, text, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ()}, "data is missing"),
        ({"weights": (0.5, 0.5)}, "2 weights for 1 entries"),
        ({"objective": "casual"}, "Did you mean causal"),
        ({"held_out": 0.0}, "held_out"),
        ({"workers": -1}, "workers"),
        ({"seed": -1}, "seed"),
        ({"device": "gpu"}, "device must be one of cpu, cuda"),
        ({"objective": "masked", "watch": WatchConfig(probes=True)}, "watch.probes asks a decoder"),
    ],
)
def test_options_out_of_range_are_named(tmp_path: Path, text: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GristmillError, match=message):
        config(tmp_path, text, **changes)


def test_an_unknown_key_and_a_wrong_type_are_named(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line, message in (("train:\n  lerning_rate: 1\n", "lerning_rate"), ("row_length: long\n", "row_length")):
        path = tmp_path / "bad.yaml"
        path.write_text(f"data: {text}\n{line}")
        with pytest.raises(SystemExit) as ended:
            cli.main(["pretrain", str(tmp_path / "run"), "--config", str(path)])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_shards_of_another_tokenizer_are_refused(tmp_path: Path, text: Path) -> None:
    done = pretrain(config(tmp_path / "first", text))
    write_shards([([1, 2, 3], None)], tmp_path / "shards", vocab_size=400, tokenizer_hash="other", eos_token_id=0)
    with pytest.raises(DataError, match="another tokenizer"):
        pretrain(config(tmp_path / "run", tmp_path / "shards", tokenizer=str(done.model)))
    with pytest.raises(DataError, match="give --tokenizer"):
        pretrain(config(tmp_path / "run", tmp_path / "shards"))


def test_a_layout_without_torchrun_is_refused(tmp_path: Path, text: Path) -> None:
    with pytest.raises(GristmillError, match="torchrun"):
        pretrain(config(tmp_path, text, parallel=Parallel(data=2)))

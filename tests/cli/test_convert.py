"""import and export: what goes in comes out the same, verified, whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from cli.river import SIZES, error, output, write_river
from engine import helpers
from gristmill import cli
from gristmill.errors import CheckpointError, RequestError
from gristmill.files import write_json
from gristmill.model import convert
from gristmill.model.config import ModelConfig
from gristmill.model.convert import import_model, parse_size
from gristmill.model.formats.huggingface import save_huggingface
from gristmill.model.formats.model_card import read_licence
from gristmill.model.load import load_model
from gristmill.model.transformer import Transformer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "river"
    write_river(directory)
    return directory


def logits(path: Path) -> torch.Tensor:
    model, _ = load_model(path)
    with torch.inference_mode():
        found: torch.Tensor = model(torch.arange(40)[None])
    return found


def entries(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_import_keeps_model_tokenizer_and_licence_and_names_what_it_leaves(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "here/river"
    told = output(capsys, "import", source, target)
    assert torch.equal(logits(target), logits(source))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE", "README.md"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
        assert name in told
    assert "left out: onnx/, training_args.bin\n" in told
    assert not {"onnx", "training_args.bin"} & entries(target)
    assert entries(target.parent) == {"river"}, "something temporary stayed"


@pytest.mark.peer
def test_import_verifies_against_transformers(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = output(capsys, "import", source, tmp_path / "same", "--verify").splitlines()[-1]
    assert re.fullmatch(
        r"Verified: greatest difference of logits \S+e-(0[4-9]|1\d), .* over 64 tokens against transformers .*", line
    )
    line = output(capsys, "import", source, tmp_path / "bf16", "--verify", "--dtype", "bfloat16").splitlines()[-1]
    assert line.endswith("for bfloat16)")
    assert line.startswith("Verified")


def encoder(directory: Path, vocab_size: int = 90) -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=vocab_size, max_position_embeddings=40, pad_token_id=3, initializer_range=0.2, **SIZES
    )
    BertModel(config).eval().save_pretrained(directory)
    write_json(
        directory / "modules.json",
        [{"idx": 0, "path": "", "type": "x.Transformer"}, {"idx": 1, "path": "1_Pooling", "type": "x.Pooling"}],
    )
    (directory / "1_Pooling").mkdir()
    write_json(directory / "1_Pooling/config.json", {"pooling_mode_mean_tokens": True})
    (directory / "1_Pooling/weights.bin").write_bytes(b"pickle")
    (directory / "vocab.txt").write_text("[PAD]\n")


def roberta(directory: Path) -> Any:
    """Its positions count tokens that are not padding: the ids of a comparison must not hold any."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    config = RobertaConfig(vocab_size=12, max_position_embeddings=50, pad_token_id=1, initializer_range=0.2, **SIZES)
    RobertaForMaskedLM(config).eval().save_pretrained(directory)


def classifier(directory: Path) -> Any:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    labels = {0: "dry", 1: "wet", 2: "frozen"}
    config = DistilBertConfig(
        vocab_size=90, dim=32, n_layers=2, n_heads=4, hidden_dim=64, id2label=labels, label2id={"dry": 0}
    )
    DistilBertForSequenceClassification(config).eval().save_pretrained(directory)


def seq2seq(directory: Path) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=90, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    T5ForConditionalGeneration(config).eval().save_pretrained(directory)
    (directory / "generation_config.json").unlink()


@pytest.mark.peer
@pytest.mark.parametrize("make", [encoder, roberta, classifier, seq2seq])
def test_models_of_other_kinds_go_in_and_out_verified(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "theirs")
    for command in (("import", "theirs", "ours"), ("export", "ours", "back")):
        told = output(capsys, command[0], tmp_path / command[1], tmp_path / command[2], "--verify")
        assert "\nVerified: greatest difference of " in told
    assert "\nVerified" in output(capsys, "inspect", tmp_path / "back", "--verify")
    theirs, back = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back"))
    assert theirs["architectures"] == back["architectures"]
    assert theirs.get("pad_token_id") == back.get("pad_token_id")
    if make is classifier:
        assert list(back["id2label"].values()) == ["dry", "wet", "frozen"]
    if make is seq2seq:
        generation = json.loads((tmp_path / "ours/generation_config.json").read_text())
        assert generation["decoder_start_token_id"] == 0
        assert generation["eos_token_id"] == [1]
    if make is encoder:
        assert (tmp_path / "back/1_Pooling/config.json").is_file()
        assert (tmp_path / "back/vocab.txt").is_file()
        again = output(capsys, "import", tmp_path / "theirs", tmp_path / "again")
        assert "left out: 1_Pooling/weights.bin" in again
        assert "README.md" in entries(tmp_path / "back")
        assert "left out: README.md\n" not in again


def test_export_writes_shards_and_a_card_that_says_what_is_there(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    output(capsys, "export", source, target, "--max_shard_size", "20KB", "--dtype", "bfloat16")
    assert len(list(target.glob("model-*-of-*.safetensors"))) > 1
    model, tokenizer = load_model(target)
    reference = load_model(source)[0]
    for name, weight in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.bfloat16().float()), name
    card = (target / "README.md").read_text()
    assert read_licence(target) == "mit"
    assert card.startswith("---\n")
    for fact in (
        "# river\n",
        "`LlamaForCausalLM`",
        f"{model.count_parameters():,}",
        "LlamaForCausalLM.from_pretrained",
        "load_model(",
        "llama-cli",
        "Not verified",
    ):
        assert fact in card, fact
    stops = json.loads((target / "generation_config.json").read_text())["eos_token_id"]
    assert stops == list(tokenizer.stop_token_ids)


@pytest.mark.peer
def test_the_card_is_one_that_hubs_read_and_holds_the_verdict(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import ModelCard

    told = output(capsys, "export", source, tmp_path / "out", "--verify")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llama"],
        "license": "mit",
    }
    verdict = next(line for line in told.splitlines() if line.startswith("Verified"))
    assert verdict in card.text
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.inference_mode():
        assert (theirs(torch.arange(40)[None]).logits - logits(source)).abs().max() < 1e-4
    text = "The river runs wide."
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode(text) == load_model(source)[1].encode(text)


@pytest.mark.parametrize("file_type", [None, "f32", "f16", "bf16", "q8_0", "q4_0"])
def test_gguf_out_and_in_again(
    file_type: str | None, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "river.gguf"
    options = [] if file_type is None else ["--file_type", file_type]
    told = output(capsys, "export", source, file, "--format", "gguf", "--verify", *options)
    assert "\nVerified: " in told
    back = tmp_path / "back"
    output(capsys, "import", file, back, "--verify")
    if file_type in (None, "f32"):
        assert torch.equal(logits(back), logits(source))
    assert torch.equal(logits(back), logits(file))
    ours, theirs = load_model(back)[1], load_model(source)[1]
    assert ours.encode("The river, the sea") == theirs.encode("The river, the sea")
    assert (ours.chat_template, ours.stop_token_ids) == (theirs.chat_template, theirs.stop_token_ids)
    assert entries(tmp_path) == {"river.gguf", "back"}


@pytest.mark.peer
@pytest.mark.parametrize("verb", ["import", "export"])
def test_what_is_not_verified_is_not_written(
    verb: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = convert.save_huggingface

    def broken(model: Any, *arguments: Any, **options: Any) -> str:
        with torch.no_grad():
            model.layers[0].mlp.down_proj.weight[0] += 1.0
        return save(model, *arguments, **options)

    monkeypatch.setattr(convert, "save_huggingface", broken)
    line = error(capsys, verb, source, tmp_path / "out", "--verify")
    assert "NOT verified: greatest difference" in line
    assert "nothing was written" in line
    assert not entries(tmp_path)


def test_a_gguf_that_is_not_verified_is_not_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = convert.save_gguf

    def broken(config: Any, tensors: Any, *arguments: Any, **options: Any) -> Any:
        changed = {name: tensor + 0.1 if "q_proj" in name else tensor for name, tensor in tensors.items()}
        return save(config, changed, *arguments, **options)

    monkeypatch.setattr(convert, "save_gguf", broken)
    assert "NOT verified" in error(capsys, "export", source, tmp_path / "m.gguf", "--format", "gguf", "--verify")
    assert not entries(tmp_path)


@pytest.mark.parametrize("verb", ["import", "export", "gguf"])
def test_an_interrupt_leaves_nothing(
    verb: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "save_gguf" if verb == "gguf" else "save_huggingface"
    save = getattr(convert, name)

    def interrupted(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, name, interrupted)
    words = (
        ["export", source, tmp_path / "m.gguf", "--format", "gguf"]
        if verb == "gguf"
        else [verb, source, tmp_path / "m"]
    )
    assert cli.main([str(word) for word in words]) == 130
    assert not entries(tmp_path)


def test_what_is_there_is_not_overwritten(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    output(capsys, "import", source, kept)  # an empty directory is no loss
    before = (kept / "model.safetensors").read_bytes()
    file = tmp_path / "m.gguf"
    file.write_text("mine")
    for words in (["import", source, kept], ["export", source, kept], ["export", source, file, "--format", "gguf"]):
        assert "there already" in error(capsys, *words)
    assert (kept / "model.safetensors").read_bytes() == before
    assert file.read_text() == "mine"


def test_errors_name_file_and_key(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    config = json.loads((broken / "config.json").read_text())
    write_json(broken / "config.json", config | {"clever_trick": 3})
    for words in (["import", broken, tmp_path / "x"], ["export", broken, tmp_path / "x"], ["inspect", broken]):
        line = error(capsys, *words)
        assert str(broken / "config.json") in line
        assert "clever_trick = 3" in line
    write_json(broken / "config.json", config | {"num_hidden_layers": 3})
    assert "layers.2." in error(capsys, "import", broken, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    (broken / "modules.json").write_text('{"a": 1}')
    write_json(broken / "config.json", config)
    assert str(broken / "modules.json") in error(capsys, "import", broken, tmp_path / "x")
    assert "no-such-model" in error(capsys, "inspect", "no-such-model")
    (broken / "modules.json").unlink()
    (broken / "tokenizer.json").unlink()
    line = error(capsys, "export", broken, tmp_path / "x.gguf", "--format", "gguf")
    assert "no tokenizer.json" in line
    assert entries(tmp_path) == {"broken"}


def test_errors_name_the_target_and_not_where_it_is_being_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        where = next(argument for argument in arguments if isinstance(argument, Path))
        raise CheckpointError(f"{where}: no place for this")

    monkeypatch.setattr(convert, "save_gguf", refuse)
    monkeypatch.setattr(convert, "save_huggingface", refuse)
    for words in (["m.gguf", "--format", "gguf"], ["m"]):
        target = tmp_path / words[0]
        assert error(capsys, "export", source, target, *words[1:]) == f"gristmill: {target}: no place for this\n"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--format", "gguf", "--dtype", "float32"], "--dtype does not apply to --format gguf"),
        (["--format", "gguf", "--max_shard_size", "1GB"], "--max_shard_size does not apply"),
        (["--format", "gguf"], "must end in .gguf"),
        (["--file_type", "q8_0"], "--file_type does not apply to --format huggingface"),
        (["--max_shard_size", "much"], "'much' is no size"),
    ],
)
def test_options_that_do_not_apply_are_refused(
    options: list[str], named: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in error(capsys, "export", source, tmp_path / "out", *options)


@given(
    count=st.integers(1, 999), unit=st.sampled_from([("", 1), ("B", 1), ("kB", 1000), ("MB", 10**6), ("GiB", 2**30)])
)
def test_sizes(count: int, unit: tuple[str, int]) -> None:
    assert parse_size(f"{count}{unit[0]}") == parse_size(f" {count} {unit[0]} ") == count * unit[1]
    for wrong in (f"-{count}GB", f"{count}XB", "", "0", "0.0001B"):
        with pytest.raises(RequestError):
            parse_size(wrong)


def test_verify_without_transformers_names_the_extra(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for words in (["import", source, tmp_path / "a"], ["export", source, tmp_path / "a"], ["inspect", source]):
        assert 'pip install "gristmill[verify]"' in error(capsys, *words, "--verify")
    assert not entries(tmp_path)


def test_an_import_stays_in_its_family(tmp_path: Path) -> None:
    """Llama could hold this Mistral, and comes first."""
    from gristmill.model.formats.families.mistral import MISTRAL

    tiny = ModelConfig(vocab_size=64, num_key_value_heads=4, head_dim=8, tie_word_embeddings=False, **SIZES)
    save_huggingface(Transformer(tiny), tmp_path / "a", prefer="mistral")
    done = import_model(tmp_path / "a", tmp_path / "b")
    assert done.header.family == MISTRAL
    assert done.header.architecture == "MistralForCausalLM"


def test_a_licence_is_taken_from_the_front_matter_or_not_at_all(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    for text, wanted in (
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: river licence\n---\n", "river licence"),
        ("---\ntags: [a]\n---\nlicense: mit", None),
        ("license: mit", None),
        ("---\n- a\n---\n", None),
    ):
        card.write_text(text)
        assert read_licence(tmp_path) == wanted
    card.write_text("---\na: [\n---\n")
    with pytest.raises(CheckpointError, match=r"README\.md: the front matter is not YAML"):
        read_licence(tmp_path)


def test_a_full_disk_is_told_of_the_target_and_leaves_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("gristmill.model.formats.safetensors_file.save_file", full)
    for verb in ("import", "export"):
        said = error(capsys, verb, source, tmp_path / "out")
        assert f"{tmp_path / 'out/model.safetensors'}: could not be written" in said
        assert "No space left" in said
    assert not entries(tmp_path)


def test_weights_are_as_readable_as_all_else(source: Path, tmp_path: Path) -> None:
    import_model(source, tmp_path / "out")
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


def test_a_null_that_says_something_is_written(tmp_path: Path) -> None:
    """Without a window is not the same as with the family's own."""
    write_river(tmp_path / "llama")
    values = json.loads((tmp_path / "llama/config.json").read_text())
    del values["attention_bias"], values["mlp_bias"]
    changes = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    write_json(tmp_path / "llama/config.json", values | changes)
    import_model(tmp_path / "llama", tmp_path / "mistral")
    assert load_model(tmp_path / "mistral")[0].config.layers == ()
    assert json.loads((tmp_path / "mistral/config.json").read_text())["sliding_window"] is None


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("import", "river", "out.gguf"), "name one"),
        (("export", "river", "out.gguf"), "add --format gguf"),
        (("export", "river", "out.safetensors"), "name a directory"),
        (("inspect", "./nowhere"), "no such file or directory"),
        (("import", "./nowhere", "out"), "no such file or directory"),
    ],
)
def test_wrong_places_are_refused(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...],
    words: str,
) -> None:
    (tmp_path / "river").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    assert words in error(capsys, *command)
    assert entries(tmp_path) == {"river"}


def test_places_with_spaces_and_relative_ones(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(source)
    there = tmp_path / "two words/out put"
    output(capsys, "import", ".", there)
    monkeypatch.chdir(there)
    output(capsys, "export", ".", "../as file.gguf", "--format", "gguf")
    assert entries(there.parent) == {"out put", "as file.gguf"}
    output(capsys, "inspect", "../as file.gguf")


@pytest.mark.peer
@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_an_encoder_does_not_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    encoder(tmp_path / "bert", vocab_size=helpers.VOCABULARY)
    helpers.tokenizer().save(tmp_path / "bert")
    options = ["--prompt", "hi"] if verb == "generate" else []
    assert cli.main([verb, str(tmp_path / "bert"), *options]) == 1
    assert "is an encoder: it reads whole texts and has no next token" in capsys.readouterr().err


def test_what_lies_behind_a_linked_folder_is_not_copied(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/keys.txt").write_text("x")
    shutil.copytree(source, tmp_path / "model")
    (tmp_path / "model/1_Pooling").symlink_to(tmp_path / "secret")
    write_json(tmp_path / "model/modules.json", [{"path": "."}, {"path": ".."}, {"path": "1_Pooling"}])
    done = import_model(tmp_path / "model", tmp_path / "out")
    assert "1_Pooling/" in done.left_out
    assert not (tmp_path / "out/1_Pooling").exists()

"""Reading and writing Hugging Face tokenizer directories."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from gristmill.errors import CheckpointError, DataError
from gristmill.tokens.tokenizer import Tokenizer
from tokens.formats import BY_NAME

CHAT = BY_NAME["chatml"].tokenizer


def directory(path: Path, settings: dict[str, Any], **others: Any) -> Path:
    CHAT.save(path)
    (path / "generation_config.json").unlink()
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, value in others.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


def test_save_and_load_keep_everything(tmp_path: Path) -> None:
    CHAT.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.backend.to_str() == CHAT.backend.to_str()
    for field in ("bos_token_id", "eos_token_id", "pad_token_id", "stop_token_ids", "chat_template", "add_bos_token"):
        assert getattr(loaded, field) == getattr(CHAT, field)


def test_other_threads_run_while_a_long_text_is_encoded() -> None:
    text, turns, over = "hello world " * 20_000, [], threading.Event()

    def other() -> None:
        while not over.wait(0.001):
            turns.append(begun.is_set())

    begun, thread = threading.Event(), threading.Thread(target=other)
    thread.start()
    begun.set()
    ids = CHAT.encode(text)
    count = sum(turns)
    over.set()
    thread.join()
    assert count > 5
    assert ids == CHAT.backend.encode(text, add_special_tokens=False).ids


def test_saving_over_another_tokenizer_drops_its_template_file(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("old")
    CHAT.save(tmp_path)
    assert Tokenizer.load(tmp_path).chat_template == CHAT.chat_template


def test_special_tokens_may_be_objects_or_stand_in_the_map(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<|im_start|>", "lstrip": False}, "pad_token": None}
    loaded = Tokenizer.load(directory(tmp_path, config, special_tokens_map={"eos_token": "<|im_end|>"}))
    assert loaded.token_of(loaded.bos_token_id) == "<|im_start|>"
    assert loaded.token_of(loaded.eos_token_id) == "<|im_end|>"
    assert loaded.pad_token_id is None


def test_a_special_token_outside_the_vocabulary_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="eos_token '<end>' is not in the vocabulary"):
        Tokenizer.load(directory(tmp_path, {"eos_token": "<end>"}))


def test_tokens_known_only_to_the_configuration_are_added_at_their_ids(tmp_path: Path) -> None:
    listed = {str(CHAT.vocab_size): {"content": "<tool>", "special": True}, "0": {"content": "<|endoftext|>"}}
    loaded = Tokenizer.load(directory(tmp_path, {"eos_token": "<tool>", "added_tokens_decoder": listed}))
    assert loaded.encode("a<tool>")[-1] == CHAT.vocab_size == loaded.eos_token_id
    assert "<tool>" in loaded.special_tokens


def test_an_added_token_at_another_id_is_refused(tmp_path: Path) -> None:
    listed = {"9999": {"content": "<tool>", "special": True}}
    with pytest.raises(CheckpointError, match="'<tool>' should have id 9999"):
        Tokenizer.load(directory(tmp_path, {"added_tokens_decoder": listed}))


@pytest.mark.parametrize("stops", [2, [2, 0], [2]])
@pytest.mark.parametrize("name", ["generation_config", "config"])
def test_stop_ids_hold_those_of_the_configuration_and_the_end_token(tmp_path: Path, name: str, stops: Any) -> None:
    loaded = Tokenizer.load(directory(tmp_path, {"eos_token": "<|endoftext|>"}, **{name: {"eos_token_id": stops}}))
    assert loaded.stop_token_ids == (2, 0)


def test_a_stop_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id 70000"):
        Tokenizer.load(directory(tmp_path, {}, generation_config={"eos_token_id": 70000}))


def test_of_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert Tokenizer.load(directory(tmp_path, {"chat_template": named})).chat_template == "D"
    with pytest.raises(CheckpointError, match="found: tool_use"):
        Tokenizer.load(directory(tmp_path, {"chat_template": named[:1]}))


def test_a_template_file_wins_over_the_configuration(tmp_path: Path) -> None:
    directory(tmp_path, {"chat_template": "from the configuration"})
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.load(tmp_path).chat_template == "from the file"


def test_stored_truncation_and_padding_are_off(tmp_path: Path) -> None:
    backend = Backend.from_str(CHAT.backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    Tokenizer(backend).save(tmp_path)
    assert Tokenizer.load(tmp_path).encode("a, b, c, d, e, f") == CHAT.encode("a, b, c, d, e, f")


def test_a_start_token_put_by_the_post_processor_is_noticed(tmp_path: Path) -> None:
    backend = Backend.from_str(CHAT.backend.to_str())
    backend.post_processor = processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    Tokenizer(backend).save(tmp_path)
    config = {"bos_token": "<|im_start|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).encode("x") == [1, *CHAT.encode("x")]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": False}))
    assert Tokenizer.load(tmp_path).encode("x") == CHAT.encode("x")


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)
    directory(tmp_path, {})
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_half_a_surrogate_pair_is_refused_with_its_place() -> None:
    with pytest.raises(DataError, match=r"text 0 .* character 1"):
        CHAT.encode("a\ud83d")
    with pytest.raises(DataError, match=r"text 1 .* character 0"):
        CHAT.encode_batch(["fine", "\ud83d"])


def test_special_tokens_spelled_in_a_corpus_can_be_taken_for_text() -> None:
    text = "it ends a turn with <|im_end|>, and a text with <|endoftext|>"
    specials = set(CHAT.special_tokens.values())
    (plain,) = CHAT.encode_batch([text], special_tokens=False)
    assert not specials & set(plain)
    assert CHAT.decode(plain) == text
    assert len(specials & set(CHAT.encode_batch([text])[0])) == 2  # the other way still recognises them
    harmless = ["nothing special here", "a < b | c > d"]
    assert CHAT.encode_batch(harmless, special_tokens=False) == CHAT.encode_batch(harmless)

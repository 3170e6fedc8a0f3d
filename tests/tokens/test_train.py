"""Training a byte-level BPE tokenizer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.errors import DataError
from gristmill.tokens.renderer import JinjaRenderer
from gristmill.tokens.templates import CHATML
from gristmill.tokens.tokenizer import Tokenizer
from gristmill.tokens.train import CHATML_SPECIALS, compression, train_bpe
from gristmill.tokens.words import split_words
from tokens.formats import CORPUS

TRAINED = train_bpe(CORPUS, 400)
SAMPLES = [
    "",
    " ",
    "The fox's 2024 house",
    "a\r\n\tb\n\n\nc",
    "Brücke 三十七 😀👩‍🚀",
    "\x00\x7f",
    "x" * 50,
    "<|im_end|>",
]


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    assert TRAINED.decode(TRAINED.encode(text), skip_special_tokens=False) == text


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=8), st.sampled_from(CHATML_SPECIALS), st.text(max_size=8))
def test_special_tokens_are_never_split(before: str, special: str, after: str) -> None:
    index = TRAINED.special_tokens[special]
    ids = TRAINED.encode(before + special + after)
    assert ids == [*TRAINED.encode(before), index, *TRAINED.encode(after)]


def test_digits_stand_alone() -> None:
    assert [TRAINED.decode([index]) for index in TRAINED.encode("12345")] == list("12345")


def test_special_tokens_have_their_roles() -> None:
    end, turn = TRAINED.id_of("<|endoftext|>"), TRAINED.id_of("<|im_end|>")
    assert TRAINED.bos_token_id == TRAINED.eos_token_id == TRAINED.pad_token_id == end
    assert TRAINED.stop_token_ids == (end, turn)
    assert TRAINED.chat_template == CHATML
    assert TRAINED.vocab_size <= 400
    assert JinjaRenderer(TRAINED).stop_token_ids == (end, turn)


def test_without_turn_tokens_there_is_no_chat_template() -> None:
    plain = train_bpe(CORPUS, 300, special_tokens=["</s>"])
    assert plain.chat_template is None
    assert plain.stop_token_ids == (plain.id_of("</s>"),)


def test_merges_save_tokens() -> None:
    bytes_only = train_bpe(CORPUS, 256 + len(CHATML_SPECIALS))
    assert compression(bytes_only, CORPUS) == 1.0
    assert compression(TRAINED, CORPUS) > 1.5


def test_the_vocabulary_is_as_large_as_asked_while_there_are_pairs_to_merge() -> None:
    assert train_bpe(CORPUS, 300).vocab_size == 300
    assert train_bpe(CORPUS, 10_000).vocab_size < 1_000


def test_progress_counts_the_texts() -> None:
    seen: list[int] = []
    train_bpe(iter(CORPUS), 300, progress=seen.append)
    assert sum(seen) == len(CORPUS)


def test_another_process_trains_the_same_tokenizer() -> None:
    program = "from tokens.formats import CORPUS; from gristmill.tokens.train import train_bpe; import sys; "
    program += "sys.stdout.buffer.write(train_bpe(CORPUS, 400).backend.to_str().encode())"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True).stdout
    assert other.decode() == TRAINED.backend.to_str()


@pytest.mark.parametrize("texts", [[], [""]])
def test_an_empty_corpus_is_refused(texts: list[str]) -> None:
    with pytest.raises(DataError, match="corpus is empty"):
        train_bpe(texts, 300)


def test_a_vocabulary_without_room_is_refused() -> None:
    with pytest.raises(DataError, match=r"vocab_size 258 is too small.*259"):
        train_bpe(CORPUS, 258)
    with pytest.raises(DataError, match="special_tokens"):
        train_bpe(CORPUS, 300, special_tokens=[])


def test_compression_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="no text"):
        compression(TRAINED, [""])


@pytest.mark.peer
def test_a_saved_directory_loads_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    TRAINED.save(tmp_path)
    peer = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*SAMPLES, *CORPUS]:
        assert peer(text, add_special_tokens=False)["input_ids"] == TRAINED.encode(text)
        assert Tokenizer.load(tmp_path).encode(text) == TRAINED.encode(text)
    assert (peer.eos_token_id, peer.pad_token_id) == (TRAINED.eos_token_id, TRAINED.pad_token_id)
    messages = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes"}]
    ids = peer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids == JinjaRenderer(TRAINED).render(messages).token_ids


def test_words_and_punctuation_are_the_simplest_tokens() -> None:
    words = split_words("I love the food here. It's amazing!")
    assert words == ["I", "love", "the", "food", "here", ".", "It", "'s", "amazing", "!"]
    assert len(words) == 10


def test_quotes_and_other_scripts_split_too() -> None:
    assert split_words("'the' Brücke\u2019s  42%\n") == ["'", "the", "'", "Brücke", "\u2019s", "42", "%"]
    assert split_words(" \n") == []

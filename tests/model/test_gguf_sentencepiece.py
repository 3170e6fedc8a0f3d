"""SentencePiece tokenizers in GGUF files, against the sentencepiece library, transformers and llama.cpp.

sentencepiece.json holds a small BPE model that the sentencepiece library 0.2.3 trained (identity normalisation, byte
fallback, a blank in front), and the ids it gives to some texts.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from gristmill.errors import CheckpointError
from gristmill.model.formats.gguf.load import load_gguf_tokenizer
from gristmill.model.formats.gguf.sentencepiece import merges_of
from gristmill.model.formats.gguf.tokenizer import write_tokenizer
from gristmill.tokens.tokenizer import Tokenizer
from model import gguf_files

TRAINED = json.loads((Path(__file__).parent / "sentencepiece.json").read_text(encoding="utf-8"))
TOKENS: list[str] = TRAINED["tokens"]
TEXTS: list[tuple[str, list[int]]] = TRAINED["texts"]
IDS = {token: index for index, token in enumerate(TOKENS)}
SPECIALS = ["<s>hi</s>", "wheel<|end|>turns <|end|>  x", "<|end|>", "a<unk>b"]


def write(path: Path, architecture: str = "llama", **changes: Any) -> Path:
    """The trained model as the converters of llama.cpp write it; double underscores of a key are dots."""
    fields = {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.scores": [float(score) for score in TRAINED["scores"]],
        "tokenizer.ggml.token_type": TRAINED["kinds"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    fields |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return gguf_files.write(path, fields, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sentencepiece")


@pytest.fixture(scope="module")
def prefixed(folder: Path) -> Tokenizer:
    return load_gguf_tokenizer(write(folder / "prefixed.gguf"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> Tokenizer:
    return load_gguf_tokenizer(write(folder / "plain.gguf", add_space_prefix=False))


def test_ids_are_those_of_the_sentencepiece_library(prefixed: Tokenizer) -> None:
    for text, ids in TEXTS:
        assert prefixed.encode(text, add_bos=False) == ids, text
        assert prefixed.decode(ids) == text.replace("▁", " ")


def test_without_a_blank_in_front(prefixed: Tokenizer, plain: Tokenizer) -> None:
    for text, ids in TEXTS:
        if text:
            assert plain.encode(" " + text, add_bos=False) == ids
        assert plain.decode(plain.encode(text)) == text.replace("▁", " ")


@given(st.text().filter(lambda text: not any(mark in text for mark in ("\u2581", "<unk>", "<s>", "</s>"))))
@settings(deadline=None, max_examples=200)
def test_any_text_comes_back(prefixed: Tokenizer, plain: Tokenizer, text: str) -> None:
    for tokenizer in (prefixed, plain):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_special_tokens_are_found_and_followed_by_a_blank_of_their_own(prefixed: Tokenizer, plain: Tokenizer) -> None:
    assert prefixed.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    end, unknown = IDS["<|end|>"], 0
    for tokenizer in (prefixed, plain):
        a, b = (tokenizer.encode(letter, add_bos=False) for letter in "ab")
        assert tokenizer.encode("a<|end|>b", add_bos=False) == [*a, end, *b]
        assert tokenizer.encode("a<unk>b</s>", add_bos=False) == [*a, unknown, *b, 2]
        assert tokenizer.encode("a") == [1, *a]  # a start token unless the file says otherwise
    assert prefixed.encode("a", add_bos=False)[0] == IDS["▁a"]
    assert plain.encode("a", add_bos=False) == [IDS["a"]]
    assert prefixed.decode(prefixed.encode("<s>a<|end|>")) == "a<|end|>"


def test_the_file_says_whether_there_is_a_start_token(tmp_path: Path) -> None:
    tokenizer = load_gguf_tokenizer(write(tmp_path / "x.gguf", add_bos_token=False))
    assert not tokenizer.add_bos_token
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.stop_token_ids) == (1, 2, (2,))


def test_merges_of_the_file_come_before_scores(tmp_path: Path) -> None:
    tokenizer = load_gguf_tokenizer(write(tmp_path / "x.gguf", merges=["▁ t", "i n"], scores=None))
    found = tokenizer.backend.encode("tin in").tokens
    assert found == ["▁t", "in", "▁", "in"]


def test_a_character_without_bytes_is_unknown(tmp_path: Path) -> None:
    few = {"tokens": ["<unk>", "▁", "a", "▁a"], "scores": [0.0, -2.0, -3.0, -1.0], "token_type": [2, 1, 1, 1]}
    ids = {"bos_token_id": None, "eos_token_id": None}
    tokenizer = load_gguf_tokenizer(write(tmp_path / "x.gguf", **few, **ids))
    assert tokenizer.encode("aéxa") == [3, 0, 2]


def test_gemma_merges_in_the_order_of_its_pieces_and_spells_blanks_as_blanks(tmp_path: Path) -> None:
    tokens = ["<unk>", "a", "b", "c", "▁", "bc", "ab", "  ", *TOKENS[4:260]]
    kinds = [2, 1, 1, 1, 1, 1, 1, 4, *[6] * 256]
    scores = [float(index) for index in range(len(tokens))]
    path = write(tmp_path / "x.gguf", "gemma2", tokens=tokens, scores=scores, token_type=kinds)
    tokenizer = load_gguf_tokenizer(path)
    assert tokenizer.encode("abc", add_bos=False) == [1, 5]
    assert tokenizer.encode("a   b", add_bos=False) == [1, 7, 4, 2]
    assert tokenizer.decode([1, 7, 4, 2]) == "a   b"


def test_special_tokens_of_phi3_take_the_blanks_after_them(tmp_path: Path) -> None:
    tokenizer = load_gguf_tokenizer(write(tmp_path / "x.gguf", "phi3"))
    assert tokenizer.encode("<|end|> \n a", add_bos=False) == tokenizer.encode("<|end|>a", add_bos=False)
    assert tokenizer.encode("<s> a", add_bos=False) != tokenizer.encode("<s>a", add_bos=False)


def with_token(index: int, token: str) -> list[str]:
    return [*TOKENS[:index], token, *TOKENS[index + 1 :]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scores": None}, ["tokenizer.ggml.scores", "missing"]),
        ({"scores": [0.0, 1.0]}, ["tokenizer.ggml.scores", str(len(TOKENS))]),
        ({"scores": [float("nan")] * len(TOKENS)}, ["tokenizer.ggml.scores"]),
        ({"token_type": None}, ["tokenizer.ggml.token_type", "missing"]),
        ({"merges": ["no such"]}, ["tokenizer.ggml.merges"]),
        ({"merges": ["nothing"]}, ["tokenizer.ggml.merges"]),
        ({"unknown_token_id": 10**6}, ["tokenizer.ggml.unknown_token_id 1000000"]),
        ({"add_eos_token": True}, ["tokenizer.ggml.add_eos_token"]),
        ({"remove_extra_whitespaces": True}, ["tokenizer.ggml.remove_extra_whitespaces"]),
        ({"precompiled_charsmap": [1, 2, 3]}, ["tokenizer.ggml.precompiled_charsmap"]),
        ({"tokens": with_token(4, "zero")}, ["'zero'", "<0x00>"]),
        ({"tokens": with_token(300, "x" * 2000)}, ["2000 characters"]),
        ({"token_type": [1] * len(TOKENS), "tokens": with_token(4, "zero"), "unknown_token_id": None}, ["<0x00>"]),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    path = write(tmp_path / "x.gguf", **changes)
    with pytest.raises(CheckpointError) as caught:
        load_gguf_tokenizer(path)
    assert all(word in str(caught.value) for word in (*words, str(path))), caught.value


def test_gemma_has_one_spelling_of_blanks(tmp_path: Path) -> None:
    tokens = with_token(300, "  ")
    assert "▁▁" in tokens
    assert load_gguf_tokenizer(write(tmp_path / "x.gguf", tokens=tokens)).id_of("  ") == 300
    with pytest.raises(CheckpointError, match="two spellings"):
        load_gguf_tokenizer(write(tmp_path / "y.gguf", "gemma", tokens=tokens))


# Writing.


def again(path: Path, tokenizer: Tokenizer, vocab_size: int = len(TOKENS), architecture: str = "llama") -> Tokenizer:
    """What is read from the metadata that is written."""
    fields = write_tokenizer(tokenizer, vocab_size, architecture)
    return load_gguf_tokenizer(gguf_files.write(path, {"general.architecture": architecture, **fields}, {}))


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_tokenizer_comes_back(tmp_path: Path, prefix: bool, architecture: str) -> None:
    path = write(tmp_path / "x.gguf", architecture, add_space_prefix=prefix)
    expected = load_gguf_tokenizer(path)
    found = again(tmp_path / "y.gguf", expected, len(TOKENS), architecture)
    assert found.backend.to_str() == expected.backend.to_str()
    assert replace(found, backend=expected.backend) == expected


def test_scores_alone_give_the_merges_back(prefixed: Tokenizer) -> None:
    fields = write_tokenizer(prefixed, len(TOKENS) + 2, "llama")
    tokens = fields["tokenizer.ggml.tokens"]
    assert tokens == [*TOKENS, f"[PAD{len(TOKENS)}]", f"[PAD{len(TOKENS) + 1}]"]
    assert fields["tokenizer.ggml.token_type"] == [*TRAINED["kinds"], 5, 5]
    merges = [" ".join(pair) for pair in merges_of("x", tokens, fields["tokenizer.ggml.scores"])]
    assert merges == fields["tokenizer.ggml.merges"]


def test_what_scores_cannot_express_is_refused(tmp_path: Path, prefixed: Tokenizer) -> None:
    def refused(values: dict[str, Any], word: str, architecture: str = "llama") -> None:
        backend = Backend.from_str(json.dumps(values))
        with pytest.raises(CheckpointError) as caught:
            write_tokenizer(Tokenizer(backend=backend), len(TOKENS) + 1, architecture)
        assert word in str(caught.value)

    values = json.loads(prefixed.backend.to_str())
    model, merges = values["model"], values["model"]["merges"]
    with pytest.raises(CheckpointError, match="phi3"):
        write_tokenizer(prefixed, len(TOKENS), "phi3")
    refused({**values, "model": {**model, "merges": merges[1:]}}, "not those that pieces and scores imply")
    several = next(index for index, pair in enumerate(merges) if "".join(pair) == "".join(merges[index + 1]))
    parted = [*merges[:several], *merges[several + 1 :], merges[several]]
    refused({**values, "model": {**model, "merges": parted}}, "do not follow each other")
    refused({**values, "model": {**model, "ignore_merges": True}}, "ignore_merges")
    missing = {("zero" if token == "<0x00>" else token): index for token, index in model["vocab"].items()}
    refused({**values, "model": {**model, "vocab": missing}}, "<0x00>")
    for part, value in {"normalizer": normalizers.NFC(), "pre_tokenizer": pre_tokenizers.Metaspace()}.items():
        other = Backend.from_str(prefixed.backend.to_str())
        setattr(other, part, value)
        refused(json.loads(other.to_str()), type(value).__name__)
    looser = Backend.from_str(prefixed.backend.to_str())
    looser.add_tokens([AddedToken("<|new|>", normalized=True)])
    refused(json.loads(looser.to_str()), "normalized text")


# The list of merges and the rule of scores.


def by_scores(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's rule: the best joint piece first, of equals the left one."""
    parts = list(text)
    while True:
        joint = [(-scores[a + b], at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not joint:
            return parts
        at = min(joint)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def by_list(text: str, scores: dict[str, float]) -> list[str]:
    tokens = list(scores)
    merges = merges_of("x", tokens, list(scores.values()))
    vocabulary = {token: at for at, token in enumerate(tokens)}
    tokens = Backend(models.BPE(vocab=vocabulary, merges=merges)).encode(text).tokens
    return tokens


@given(st.data(), st.sets(st.text("ab", min_size=2, max_size=6), min_size=1, max_size=14), st.text("ab", max_size=16))
@settings(deadline=None, max_examples=300)
def test_pieces_with_scores_of_their_own_are_merged_as_sentencepiece_does(
    data: st.DataObject, pieces: set[str], text: str
) -> None:
    order = data.draw(st.permutations(["a", "b", *sorted(pieces)]))
    scores = {piece: -float(rank) for rank, piece in enumerate(order)}
    assert by_list(text, scores) == by_scores(text, scores)


def test_of_pieces_with_one_score_the_list_prefers_one_everywhere() -> None:
    scores = {"a": -9.0, "b": -9.0, "c": -9.0, "bc": -1.0, "ab": -1.0}
    assert by_scores("abc", scores) == ["ab", "c"]
    assert by_list("abc", scores) == ["a", "bc"]


# What others make of the same metadata.


@pytest.mark.peer
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma", "gemma3"])
def test_ids_are_those_of_transformers(tmp_path: Path, architecture: str) -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    path = write(tmp_path / "x.gguf", architecture)
    ours = load_gguf_tokenizer(path)
    name, values, config = mapping.get_gguf_tokenizer(str(path))
    theirs, _ = mapping.convert_gguf_tokenizer(name, values)
    assert config["add_bos_token"] == ours.add_bos_token
    texts = [text for text, _ in TEXTS] + ([] if architecture in ("llama", "phi3") else SPECIALS)
    for text in texts:
        ids = ours.encode(text, add_bos=False)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
        if architecture != "llama" or not text.startswith((" ", "▁")):  # where the text has a blank, they add none
            assert ids == theirs.encode(text, add_special_tokens=False).ids, text


LLAMA_CPP = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], vocab_only=True, verbose=False)
texts = json.loads(sys.argv[2])
print(json.dumps([model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]))
"""


@pytest.mark.peer
@pytest.mark.parametrize("prefix", [True, False])
def test_ids_are_those_of_llama_cpp_from_what_we_write(tmp_path: Path, prefix: bool) -> None:
    python = os.environ.get("GRISTMILL_LLAMA_PYTHON")
    if python is None:
        pytest.skip("GRISTMILL_LLAMA_PYTHON does not name an interpreter that has llama-cpp-python")
    tokenizer = load_gguf_tokenizer(write(tmp_path / "x.gguf", add_space_prefix=prefix))
    fields = gguf_files.metadata(gguf_files.tokenizer())
    fields = {key: value for key, value in fields.items() if not key.startswith("tokenizer.")}
    fields |= write_tokenizer(tokenizer, len(TOKENS), "llama")
    path = gguf_files.write(tmp_path / "y.gguf", fields, gguf_files.tensors(gguf_files.weights()))
    texts = [text for text, _ in TEXTS if text and "\0" not in text] + SPECIALS
    done = subprocess.run([python, "-c", LLAMA_CPP, str(path), json.dumps(texts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [tokenizer.encode(text, add_bos=False) for text in texts]

"""Encoders behind `LLM`: they embed, and refuse the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gristmill.engine.llm import LLM
from gristmill.errors import CheckpointError, RequestError
from gristmill.model.formats.huggingface import save_huggingface
from gristmill.model.sentence import SentenceEncoder
from model.test_sentence import TEXTS, encoder, wordpiece


@pytest.fixture(params=[True, False], ids=["normalised", "not"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    SentenceEncoder(encoder(), wordpiece(), pooling="cls", normalise=request.param).save(tmp_path / "m")
    return tmp_path / "m"


def test_vectors_are_those_of_the_sentence_encoder_at_length_one(saved: Path) -> None:
    wanted = SentenceEncoder.load(saved).embed(TEXTS)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    found = LLM(saved).embed(TEXTS)
    assert found.dtype == np.float32
    assert np.allclose(found, wanted, atol=1e-6)


def test_an_encoder_alone_is_pooled_by_its_mean(tmp_path: Path) -> None:
    save_huggingface(encoder(), tmp_path)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        LLM(tmp_path)
    wordpiece().save(tmp_path)
    assert np.allclose(LLM(tmp_path).embed(TEXTS), SentenceEncoder(encoder(), wordpiece()).embed(TEXTS), atol=1e-6)


def test_a_text_that_is_too_long_is_refused_not_cut(saved: Path) -> None:
    with pytest.raises(RequestError, match="text 1 has 22 tokens, at most 20") as caught:
        LLM(saved).embed(["cat", "cat " * 20])
    assert caught.value.field == "texts"


def test_what_needs_a_next_token_is_refused_in_one_sentence(saved: Path) -> None:
    llm = LLM(saved)
    calls: list[Any] = [
        lambda: llm.generate("cat"),
        lambda: llm.chat([{"role": "user", "content": "cat"}]),
        lambda: llm.score("cat", "sleep"),
        lambda: llm.score_many([]),
        lambda: llm.hypotheses(),
        lambda: llm.engine,
    ]
    for call in calls:
        with pytest.raises(RequestError, match=r"is an encoder: .* no next token") as caught:
            call()
        assert caught.value.field == "model"


def test_options_of_generation_are_refused_by_name(saved: Path) -> None:
    options = {"quantization": "int8", "kv_cache_dtype": "int8", "speculation": "ngram", "response_cache": 3}
    for name, value in (options | {"max_num_seqs": 3}).items():
        with pytest.raises(RequestError, match="is an encoder") as caught:
            LLM(saved, **{name: value})
        assert caught.value.field == name


@pytest.mark.asset
def test_a_real_encoder_tells_what_is_alike() -> None:
    llm = LLM("all-minilm-l6-v2")
    texts = ["A cat sleeps on the sofa.", "The kitten naps on the couch.", "Interest rates rose again. " * 5]
    vectors = llm.embed(texts)
    assert np.allclose(vectors, SentenceEncoder.load("all-minilm-l6-v2").embed(texts), atol=1e-6)
    alike = vectors @ vectors.T
    assert alike[0, 1] > 0.5 > alike[0, 2] + 0.3

"""Tiny random classifiers, cross-encoders and reward models, as directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conformance.family import randomise
from engine import helpers
from gristmill.model.encoder import Encoder
from gristmill.model.formats.huggingface import save_huggingface
from gristmill.model.heads import HeadConfig, Headed
from gristmill.model.transformer import Stack
from model import tiny
from model.test_sentence import encoder, wordpiece


def save_encoder(directory: Path, *labels: str, **config: Any) -> Path:
    """A BERT that judges; `config` are keys added to its config.json."""
    head = HeadConfig(kind="sequence_classifier", labels=labels, dense="tanh")
    save_huggingface(randomise(Headed(Encoder(encoder().config), head)), directory)
    wordpiece().save(directory)
    return with_keys(directory, **config)


def save_decoder(directory: Path, *labels: str, **config: Any) -> Path:
    """A Llama that judges, a reward model by one label. Its padding token is its end-of-sequence token."""
    head = HeadConfig(kind="sequence_classifier", labels=labels, pooling="last", bias=False)
    save_huggingface(randomise(Headed(Stack(tiny.CONFIG), head)), directory)
    helpers.tokenizer().save(directory)
    return with_keys(directory, **{"pad_token_id": helpers.tokenizer().pad_token_id, **config})


def with_keys(directory: Path, **config: Any) -> Path:
    """Write keys into config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return directory

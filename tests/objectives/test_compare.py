"""The example that compares all objectives: the same data, steps and parameters, and one table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gristmill.model.config import ModelConfig
from gristmill.objectives.taxonomy import Symbols, pairs
from gristmill.train.config import TrainConfig

SIZE = 64
SYMBOLS = Symbols(
    size=SIZE, cls=1, sep=2, mask=3, start=0, sentinels=tuple(range(4, 14)), sentence_ends=frozenset({20})
)
CONFIG = ModelConfig(
    vocab_size=SIZE,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=160,
    max_position_embeddings=64,
    initializer_range=0.1,
)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import compare_objectives

    yield compare_objectives
    sys.modules.pop("compare_objectives")


def test_all_objectives_are_trained_alike_and_reported_in_one_table(example: Any) -> None:
    draw = np.random.default_rng(0)

    def corpus(count: int) -> Any:
        topics = draw.integers(2, size=count)
        documents = [draw.integers(15, 40, size=draw.integers(6, 14)) + 24 * topic for topic in topics]
        return example.Corpus(documents, topics, SYMBOLS)

    training, held_out = corpus(60), corpus(30)
    config = TrainConfig(steps=6, learning_rate=1e-2, checkpoint_every=6)
    results = list(example.compare(training, held_out, CONFIG, config, documents_per_batch=8))
    assert [(r.objective, r.architecture) for r in results] == [(entry.name, kind) for entry, kind in pairs()]
    counts = [r.parameters for r in results]
    assert max(counts) < 1.03 * min(counts)
    assert all(np.isfinite([r.loss_before, r.loss_after]).all() for r in results)
    assert np.mean([r.loss_after < r.loss_before for r in results]) >= 0.8
    assert min(r.accuracy for r in results) > 0.8  # the topics share no word
    lines = example.table(results).splitlines()
    assert len(lines) == 2 + 20
    assert lines[2].startswith("| causal LM | decoder | ")


def test_every_objective_gets_each_document_once(example: Any) -> None:
    documents = [np.arange(20, 30), np.arange(30, 38), np.arange(40, 45)]
    corpus = example.Corpus(documents, np.zeros(3, int), SYMBOLS)
    for entry, _ in pairs():
        made = example.examples(entry.name, corpus)
        assert len(made) == 3
    following = example.examples("next sentence prediction", corpus)
    assert [pair.label for pair in following] == [0, 1, 0]
    assert [*following[0].first, *following[0].second] == documents[0].tolist()
    assert following[1].second.tolist() == documents[0][5:].tolist()
    classified = example.examples("token classification", corpus)[0]
    assert (np.asarray(classified.ids) != documents[0]).astype(int).tolist() == classified.labels.tolist()

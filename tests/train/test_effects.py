"""The program that measures effects: what is held equal is equal, and its figures are read right."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gristmill.corpus.shards import TokenList
from gristmill.model.config import ModelConfig
from gristmill.objectives.taxonomy import Symbols
from gristmill.scale.ladder import LadderConfig
from programs import program

EFFECTS = program("effects")
VOCABULARY = 96
SYMBOLS = Symbols(
    size=VOCABULARY, cls=1, sep=2, mask=3, start=0, sentinels=tuple(range(4, 20)), sentence_ends=frozenset()
)
SIZE = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=64,
    max_position_embeddings=64,
    initializer_range=0.1,
)


@pytest.fixture(scope="module")
def corpus() -> Any:
    """Documents of two topics, which have no word in common, each ending with token 0."""
    draw = np.random.default_rng(0)

    def side(count: int) -> list[tuple[np.ndarray, int]]:
        topics = [number % 2 for number in range(count)]
        return [(np.append(draw.integers(20, 58, draw.integers(12, 40)) + 38 * topic, 0), topic) for topic in topics]

    training, unseen = side(300), side(40)
    sources = [TokenList([(ids, None) for ids, _ in part], vocab_size=VOCABULARY) for part in (training, unseen)]
    return EFFECTS.Corpus(sources[0], sources[1], training[:64], unseen, ("a", "b"), SYMBOLS)


@pytest.fixture(scope="module")
def settings() -> Any:
    return EFFECTS.Settings(
        precision="float32", size=SIZE, seeds=(0, 1), tokens=12_000, length=64, fine_tuning_epochs=4
    )


def test_objectives_get_the_same_compute_and_then_the_same_task(corpus: Any, settings: Any) -> None:
    found = EFFECTS.objectives(corpus, replace(settings, seeds=(0,)))
    results = found["results"]
    budget = results["causal LM"]["flops"]
    for name in EFFECTS.OBJECTIVES:
        assert results[name]["flops"] == pytest.approx(budget, rel=0.15)  # whole steps
    assert results["causal LM"]["text"] == pytest.approx(settings.tokens, rel=0.1)
    controls = set(results) - set(EFFECTS.OBJECTIVES)
    assert len(controls) == 2
    assert all(results[name]["flops"] == 0 for name in controls)
    assert all(result["accuracy"]["mean"] > 0.9 for result in results.values())
    assert found["most_frequent_topic"] == 0.5
    lines = EFFECTS.table("objectives", found).splitlines()
    assert len(lines) == 2 + len(results)
    assert {line.count("|") for line in lines} == {5}


def test_across_and_within_read_the_same_tokens_and_differ_in_who_sees_whom(corpus: Any, settings: Any) -> None:
    rows = [corpus.training.read(np.array([[2, 0, 9], [5, 0, 7]])), corpus.training.read(np.array([[8, 0, 5]]))]
    within, across = EFFECTS.within(rows, []), EFFECTS.across(rows, [])
    assert within.input_ids.tolist() == across.input_ids.tolist()
    assert (within.segment_lengths, across.segment_lengths) == ((9, 7, 5), (16, 5))
    found = EFFECTS.documents(corpus, settings)
    both = [found["results"][label]["loss"]["values"] for label in ("within", "across")]
    assert found["gain"]["values"] == pytest.approx([a - w for w, a in zip(*both, strict=True)])
    assert found["documents_per_row"] > 1
    assert all(loss < math.log(VOCABULARY) for losses in both for loss in losses)


def test_each_optimiser_has_its_best_rate(corpus: Any, settings: Any) -> None:
    found = EFFECTS.optimisers(corpus, settings, rates=(1e-5, 1e-2))
    for name in ("adamw", "muon"):
        result = found["results"][name]
        assert result["rate"] == 1e-2
        assert result["search"]["0.01"] == result["loss"]["values"][0] < result["search"]["1e-05"]
        assert len(result["loss"]["values"]) == 2
    assert len(found["share_of_tokens"]["values"]) == 2


def test_tokens_to_a_loss_are_read_between_the_points() -> None:
    curve = [(100, 6.0), (200, 5.0), (300, 5.5), (400, 4.0)]
    assert EFFECTS.tokens_to(curve, 6.5) == 100
    assert EFFECTS.tokens_to(curve, 5.5) == 150
    assert EFFECTS.tokens_to(curve, 4.75) == 350
    assert EFFECTS.tokens_to(curve, 3.9) == math.inf


def test_mean_and_standard_error() -> None:
    found = EFFECTS.measured([1.0, 2.0, 6.0])
    assert (found["mean"], found["error"]) == (3.0, pytest.approx(math.sqrt(7 / 3)))
    assert EFFECTS.measured([1.0]) == {"mean": 1.0, "error": None, "values": [1.0]}
    assert EFFECTS.measured([1.0, math.inf]) == {"mean": None, "error": None, "values": [1.0, None]}


def test_the_exponent_of_an_exact_law_is_found_and_noise_widens_its_band() -> None:
    sizes = np.geomspace(1e4, 1e6, 12)
    exact = EFFECTS.exponent(sizes, 9 * sizes**-0.07, 0.9)
    assert [exact[name] for name in ("exponent", "low", "high")] == pytest.approx([-0.07] * 3)
    noise = np.exp(np.random.default_rng(0).normal(0, 0.01, 12))
    noisy = EFFECTS.exponent(sizes, 9 * sizes**-0.07 * noise, 0.9)
    assert noisy["low"] < -0.07 < noisy["high"]
    assert noisy["high"] - noisy["low"] > 0.001


def test_the_ladder_tells_exponents_by_compute_and_by_inner_size(corpus: Any, tmp_path: Path) -> None:
    folders = {name: str(tmp_path / name) for name in ("data", "held_out")}
    ladder = LadderConfig(
        **folders,
        out=str(tmp_path / "ladder"),
        sizes=(10_000, 16_000, 43_000),
        next=69_000,
        tokens_per_parameter=0.1,
        row_length=64,
    )
    found = EFFECTS.scaling(corpus, ladder)
    assert list(found["results"]) == ["8192", "13824", "39936", "65280"]  # without embedding and head
    means = [result["loss"]["mean"] for result in found["results"].values()]
    assert found["forecast"]["measured"] == means[-1]
    assert set(found["exponents"]) == {"compute", "size"}
    assert len(EFFECTS.table("scaling", found).splitlines()) == 2 + 4

"""BERT's pretraining with and without next sentence prediction, on the same pairs for the same tokens.

    python examples/next_sentence.py             # about a minute on one core

Documents are made up: each has a topic that decides which words are frequent in it, so the second part of a wrong pair
mostly speaks of something else. Prints a Markdown table: the masked loss on held-out pairs, the pair loss, and the
weights of each model. Source of the question: Liu et al. 2019 (RoBERTa), section 4.2.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gristmill.corpus.loader import ExampleLoader
from gristmill.model.encoder import Encoder
from gristmill.model.heads import HeadConfig, Headed
from gristmill.model.presets import published
from gristmill.objectives.bert import BertPretraining
from gristmill.objectives.pairs import SentencePairs
from gristmill.objectives.vocabulary import EncoderVocabulary
from gristmill.train.config import TrainConfig
from gristmill.train.loop import train
from gristmill.train.metrics import read_metrics

WORDS, TOPICS = 200, 8
VOCABULARY = EncoderVocabulary(size=WORDS + 3, mask_id=WORDS, cls_id=WORDS + 1, sep_id=WORDS + 2)


@dataclass(frozen=True)
class Outcome:
    """One run: held-out losses in nats (the pair's None without it), tokens read and number of weights."""

    masked: float
    pair: float | None
    tokens: int
    weights: int


def documents(seed: int, count: int) -> list[list[list[int]]]:
    """Documents of six sentences of five to nine words of their topic."""
    draw = np.random.default_rng(seed)
    topics = np.random.default_rng(0).dirichlet(np.full(WORDS, 0.05), size=TOPICS)
    return [
        [draw.choice(WORDS, size=draw.integers(5, 10), p=topics[topic]).tolist() for _ in range(6)]
        for topic in draw.integers(TOPICS, size=count)
    ]


def run(pair: bool, seed: int, steps: int, directory: Path) -> Outcome:
    """Train on pairs with or without the decision about them."""
    shape = replace(
        published("bert-base"),
        vocab_size=VOCABULARY.size,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        intermediate_size=128,
        max_position_embeddings=32,
    )
    head = HeadConfig(kind="pretraining" if pair else "masked_lm", dense="gelu", norm=True)
    model = Headed(Encoder(shape), head)
    model.initialise(seed)
    objective = BertPretraining(VOCABULARY, pair=pair)
    loaders = [
        ExampleLoader(
            SentencePairs(documents(number, count), seed=seed),
            examples_per_batch=32,
            seed=seed,
            prepare=objective.prepare,
        )
        for number, count in ((seed + 1, 400), (1000, 60))
    ]
    config = TrainConfig(steps=steps, learning_rate=3e-3, validate_every=steps, checkpoint_every=steps)
    position = train(model, objective, loaders[0], config, directory, validation=loaders[1])
    last = read_metrics(directory / "metrics.jsonl")[-1]
    masked = last["validation_masked_lm"] if pair else last.get("validation_masked_lm", last["validation_loss"])
    return Outcome(masked, last.get("validation_pair"), position.tokens, model.count_parameters())


def compare(seeds: tuple[int, ...] = (0, 1, 2), steps: int = 400) -> dict[str, list[Outcome]]:
    """Runs of both kinds, seed by seed."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            name: [run(pair, seed, steps, Path(folder) / f"{name}-{seed}") for seed in seeds]
            for name, pair in (("with", True), ("without", False))
        }


def main() -> None:
    """Print the table."""
    print("| next sentence prediction | masked loss | pair loss | tokens | weights |\n|---|---|---|---|---|")
    for name, outcomes in compare().items():
        masked = [outcome.masked for outcome in outcomes]
        pairs = [outcome.pair for outcome in outcomes if outcome.pair is not None]
        error = statistics.stdev(masked) / len(masked) ** 0.5
        pair = f"{statistics.mean(pairs):.3f}" if pairs else "-"
        first = outcomes[0]
        print(
            f"| {name} | {statistics.mean(masked):.3f} ± {error:.3f} | {pair} | {first.tokens:,} | {first.weights:,} |"
        )


if __name__ == "__main__":
    main()

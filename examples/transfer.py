"""Supervised pretraining: learn sentiment from many labels, then subjectivity from few.

    python examples/transfer.py                  # about ten seconds

Sentences are made up. The source task tells positive from negative words; the target task tells sentences with an
opinion, whichever, from those with none. The same encoder is trained on the target's few labels from scratch and from
the source task's weights under a new head. Prints the accuracy of both for several numbers of labels and seeds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from gristmill.model.config import ModelConfig
from gristmill.model.encoder import Encoder
from gristmill.model.heads import HeadConfig, Headed
from gristmill.train.transfer import accuracy, fit, transfer

POSITIVE, NEGATIVE, PLAIN = range(1, 41), range(41, 81), range(81, 161)
"""Token ids of words; 0 begins every sentence."""
LENGTH = 10
CONFIG = ModelConfig(
    vocab_size=161,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=64,
    max_position_embeddings=LENGTH,
    causal=False,
    initializer_range=0.1,
)
SENTIMENT = HeadConfig(kind="sequence_classifier", labels=("negative", "positive"))
SUBJECTIVITY = replace(SENTIMENT, labels=("objective", "subjective"))
LABELS, SEEDS = (16, 32, 64, 256), (0, 1, 2)


@dataclass(frozen=True)
class Task:
    """Sentences (rows, LENGTH) of token ids, and their labels (rows,)."""

    input_ids: Tensor
    labels: Tensor


def draw(pools: tuple[range, ...], opinions: int, rows: int, generator: Generator) -> Task:
    """Sentences of plain words with `opinions` of them from the pool of the row's label."""
    labels = torch.arange(rows) % len(pools)
    input_ids = torch.randint(PLAIN.start, PLAIN.stop, (rows, LENGTH), generator=generator)
    input_ids[:, 0] = 0
    for row, label in enumerate(labels.tolist()):
        places = torch.randperm(LENGTH - 1, generator=generator)[:opinions] + 1
        pool = pools[label]
        input_ids[row, places] = torch.randint(pool.start, pool.stop, (opinions,), generator=generator)
    return Task(input_ids, labels)


def sentiment(rows: int, generator: Generator) -> Task:
    """The source task."""
    return draw((NEGATIVE, POSITIVE), 3, rows, generator)


def subjectivity(rows: int, generator: Generator) -> Task:
    """The target task; an opinion is positive or negative."""
    return draw((PLAIN, range(POSITIVE.start, NEGATIVE.stop)), 3, rows, generator)


def pretrain(seed: int, steps: int = 100) -> Headed:
    """A classifier of the source task."""
    model = Headed(Encoder(CONFIG), SENTIMENT)
    model.initialise(seed)
    task = sentiment(2000, Generator().manual_seed(seed))
    fit(model, task.input_ids, task.labels, steps=steps, seed=seed)
    return model


def compare(source: Headed, seed: int, labels: int, steps: int = 60) -> tuple[float, float]:
    """Accuracy on unseen target sentences: from scratch, and from `source`; the same labels, head and steps."""
    generator = Generator().manual_seed(1000 + seed)
    unseen, known = subjectivity(500, generator), subjectivity(labels, generator)
    scratch = Headed(Encoder(CONFIG), SUBJECTIVITY)
    scratch.initialise(seed)
    found = []
    for model in (scratch, transfer(source, SUBJECTIVITY, seed)):
        fit(model, known.input_ids, known.labels, steps=steps, seed=seed)
        found.append(accuracy(model, unseen.input_ids, unseen.labels))
    return found[0], found[1]


def main() -> None:
    """Compare for several numbers of labels and seeds."""
    torch.set_num_threads(1)  # products this small are slower on more
    sources = [pretrain(seed) for seed in SEEDS]
    print("| labels | from scratch | transferred |\n|---:|---|---|")
    for labels in LABELS:
        pairs = [compare(source, seed, labels) for seed, source in zip(SEEDS, sources, strict=True)]
        scratch, moved = (", ".join(f"{value:.1%}" for value in side) for side in zip(*pairs, strict=True))
        print(f"| {labels} | {scratch} | {moved} |")


if __name__ == "__main__":
    main()

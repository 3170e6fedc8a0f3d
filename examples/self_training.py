"""Which meaning of "bank": four labelled sentences, the rest learned by self-training.

    python examples/self_training.py             # about a second

Sentences are made up: a handful of words around "bank", most of them typical of its meaning, and only a few typical
words stand in the labelled sentences. A naive Bayes classifier labels what it is sure of and learns the other words
from that. Prints the accuracy of each round on unseen sentences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gristmill.train.self_training import Predict, Round, self_train

TYPICAL = (
    ("river", "water", "shore", "mud", "fish", "boat", "reeds", "flood", "fishing", "willow", "stream", "ferry"),
    ("money", "loan", "credit", "account", "cash", "interest", "deposit", "savings", "teller", "cheque", "debt", "fee"),
)
COMMON = ("the", "near", "old", "new", "went", "saw", "big", "they")
WORDS = [*TYPICAL[0], *TYPICAL[1], *COMMON]
NAMES = ("the land beside a river", "the firm that lends money")


@dataclass(frozen=True)
class Sentences:
    """How often each of WORDS occurs, (sentences, words), and the meaning of each (sentences,)."""

    counts: Tensor
    labels: Tensor


def draw_sentences(count: int, generator: Generator) -> Sentences:
    """Each sentence has three words typical of its meaning, neighbours in a list as topics have them, and two common
    ones."""
    counts = torch.zeros(count, len(WORDS))
    labels = torch.arange(count) % 2
    size = len(TYPICAL[0])
    first = torch.randint(size - 2, (count,), generator=generator)
    common = torch.randint(len(COMMON), (count, 2), generator=generator)
    for sentence, (label, start) in enumerate(zip(labels.tolist(), first.tolist(), strict=True)):
        for place in (*range(label * size + start, label * size + start + 3), *(2 * size + common[sentence]).tolist()):
            counts[sentence, place] += 1
    return Sentences(counts, labels)


def seed_sentences() -> Sentences:
    """Two sentences of each meaning, with the first words of its list only."""
    counts = torch.zeros(4, len(WORDS))
    for sentence in range(4):
        for word in (*TYPICAL[sentence % 2][:2], COMMON[sentence // 2], COMMON[sentence // 2 + 2]):
            counts[sentence, WORDS.index(word)] = 1
    return Sentences(counts, torch.arange(4) % 2)


def naive_bayes(counts: Tensor, labels: Tensor) -> Predict:
    """Multinomial, with one added to each count; both meanings are taken to be as frequent."""
    words = torch.stack([counts[labels == label].sum(dim=0) for label in range(2)]) + 1
    logs = (words / words.sum(dim=1, keepdim=True)).log()
    return lambda inputs: (inputs @ logs.T).softmax(dim=1)


def accuracy(predict: Predict, sentences: Sentences) -> float:
    """Share of sentences whose meaning is found."""
    return float((predict(sentences.counts).argmax(dim=1) == sentences.labels).float().mean())


def run(seed: int, unlabelled: int = 400) -> tuple[list[Round], list[float]]:
    """The rounds, and the accuracy of each on unseen sentences."""
    generator = Generator().manual_seed(seed)
    known, unseen = seed_sentences(), draw_sentences(400, generator)
    others = draw_sentences(unlabelled, generator).counts if unlabelled else known.counts[:0]
    history = self_train(naive_bayes, known.counts, known.labels, others, threshold=0.9, rounds=20)
    return history, [accuracy(one.predict, unseen) for one in history]


def main() -> None:
    """One run, round by round."""
    history, found = run(0)
    print("| round | pseudo-labels | accuracy |\n|---:|---:|---:|")
    for number, (one, share) in enumerate(zip(history, found, strict=True)):
        print(f"| {number} | {len(one.indices)} | {share:.1%} |")
    print(f"\nMeanings: {NAMES[0]}, {NAMES[1]}.")


if __name__ == "__main__":
    main()

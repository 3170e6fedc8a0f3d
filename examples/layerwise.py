"""Pretraining without labels, layer by layer: a deep sigmoid network from few labels, with and without it.

    python examples/layerwise.py                 # a few seconds

Samples are black-and-white pictures of a few hidden patterns with many flipped pixels; a class is a group of patterns.
Pictures without a label are many, labelled ones few. Prints the reconstruction loss of each layer and, per seed, the
accuracy of the same classifier from a random start and from the pretrained layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from gristmill.train.layerwise import pretrain_layers

PIXELS, PATTERNS, CLASSES = 64, 24, 4
WIDTHS = (48, 48, 48)
SEEDS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Pictures:
    """Values 0 and 1, (samples, PIXELS), and their classes (samples,)."""

    inputs: Tensor
    labels: Tensor


def draw_pictures(patterns: Tensor, count: int, generator: Generator) -> Pictures:
    """Noisy copies of `patterns` (PATTERNS, PIXELS)."""
    which = torch.randint(PATTERNS, (count,), generator=generator)
    flipped = torch.rand(count, PIXELS, generator=generator) < 0.2
    return Pictures(patterns[which].logical_xor(flipped).float(), which % CLASSES)


def network(seed: int) -> tuple[list[nn.Linear], nn.Sequential]:
    """The layers to pretrain, and the classifier made of them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(before, after) for before, after in zip((PIXELS, *WIDTHS), WIDTHS, strict=False)]
        head = nn.Linear(WIDTHS[-1], CLASSES)
    parts = [part for layer in layers for part in (layer, nn.Sigmoid())]
    return layers, nn.Sequential(*parts, head)


def train_classifier(model: nn.Sequential, pictures: Pictures, steps: int) -> None:
    """The whole network on all labelled pictures at once."""
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(model(pictures.inputs), pictures.labels).backward()
        optimiser.step()


@torch.inference_mode()
def accuracy(model: nn.Sequential, pictures: Pictures) -> float:
    """Share of pictures whose class is found."""
    return float((model(pictures.inputs).argmax(dim=1) == pictures.labels).float().mean())


def compare(
    seed: int, *, labelled: int = 120, unlabelled: int = 1000, steps: int = 300
) -> tuple[float, float, list[list[float]]]:
    """Accuracy from a random start and from pretrained layers (the same random ones before), and the reconstruction
    loss of each layer by epoch."""
    generator = Generator().manual_seed(seed)
    patterns = torch.rand(PATTERNS, PIXELS, generator=generator) < 0.5
    known = draw_pictures(patterns, labelled, generator)
    others = draw_pictures(patterns, unlabelled, generator)
    unseen = draw_pictures(patterns, 1000, generator)
    _, plain = network(seed)
    train_classifier(plain, known, steps)
    layers, model = network(seed)
    history = pretrain_layers(layers, others.inputs, epochs=20, corruption=0.2, seed=seed)
    train_classifier(model, known, steps)
    return accuracy(plain, unseen), accuracy(model, unseen), history


def main() -> None:
    """Compare over several seeds."""
    torch.set_num_threads(1)  # products this small are slower on more
    print("| seed | random start | pretrained | reconstruction loss of each layer, first to last epoch |")
    print("|---:|---:|---:|---|")
    for seed in SEEDS:
        plain, pretrained, history = compare(seed)
        losses = ", ".join(f"{losses[0]:.1f} to {losses[-1]:.1f}" for losses in history)
        print(f"| {seed} | {plain:.1%} | {pretrained:.1%} | {losses} |")


if __name__ == "__main__":
    main()

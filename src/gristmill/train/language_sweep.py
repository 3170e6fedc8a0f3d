"""How many languages a model of one size can hold: train it on more and more of them, and look at each.

Languages share the training steps. What the first languages lose as others come is interference; what they gain is
transfer. Source: Conneau et al. 2020 (XLM-R), section 5.2.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gristmill.core import Objective
from gristmill.errors import DataError


@dataclass(frozen=True, eq=False)
class Language:
    """Token ids of documents to train on and held-out ones, all in the one vocabulary of the model."""

    name: str
    training: Sequence[np.ndarray]
    held_out: Sequence[np.ndarray]


@dataclass(frozen=True)
class SweepResult:
    """A model trained on the first `languages` of a list. `losses`: nats per held-out target of each, by name."""

    languages: int
    seed: int
    parameters: int
    losses: dict[str, float]


def language_sweep(
    build: Callable[[int], nn.Module],
    objective: Objective,
    languages: Sequence[Language],
    counts: Sequence[int],
    *,
    steps: int,
    documents_per_step: int = 16,
    learning_rate: float = 3e-3,
    seeds: Sequence[int] = (0,),
) -> list[SweepResult]:
    """Train `build(seed)` on the first n languages for every n of `counts` and every seed; the steps are the same for
    all, and each language has the same chance to give a document. Raises DataError for a count without its languages.
    """
    if not counts or not 1 <= min(counts) <= max(counts) <= len(languages):
        raise DataError(f"counts must be from 1 to the {len(languages)} languages given, got {list(counts)}")
    results = []
    for count in counts:
        chosen = languages[:count]
        for seed in seeds:
            model = build(seed)
            _train(model, objective, chosen, steps, documents_per_step, learning_rate, seed)
            with torch.no_grad():
                losses = {one.name: float(_mean_loss(model, objective, one.held_out, (0, 0))) for one in chosen}
            size = sum(parameter.numel() for parameter in model.parameters())
            results.append(SweepResult(count, seed, size, losses))
    return results


def sweep_markdown(results: Sequence[SweepResult]) -> str:
    """A table of the sweep: nats per held-out target of the first language and of all, mean and standard error over
    seeds, and what the first has lost since the smallest number of languages."""
    counts = sorted({result.languages for result in results})
    first = next(iter(results[0].losses))
    alone = statistics.fmean(result.losses[first] for result in results if result.languages == counts[0])
    lines = [f"| languages | parameters | {first} | all | change of {first} |", "|---:|---:|---:|---:|---:|"]
    for count in counts:
        these = [result for result in results if result.languages == count]
        own = [result.losses[first] for result in these]
        every = [statistics.fmean(result.losses.values()) for result in these]
        lines.append(
            f"| {count} | {these[0].parameters:,} | {_spread(own)} | {_spread(every)} | "
            f"{statistics.fmean(own) - alone:+.3f} |"
        )
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else mean


def _train(
    model: nn.Module,
    objective: Objective,
    languages: Sequence[Language],
    steps: int,
    documents: int,
    learning_rate: float,
    seed: int,
) -> None:
    draw = np.random.default_rng([seed, len(languages)])
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    model.train()
    for step in range(steps):
        picked = [languages[number].training for number in draw.integers(len(languages), size=documents)]
        loss = _mean_loss(model, objective, [some[draw.integers(len(some))] for some in picked], (seed, step))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()


def _mean_loss(model: nn.Module, objective: Objective, documents: Sequence[np.ndarray], key: tuple[int, ...]) -> Tensor:
    """The weighted sum of the objective's terms, each in nats per target."""
    segments = [(ids, None) for ids in documents]
    batch = objective.prepare(segments, [(*key, number) for number in range(len(segments))])
    sums, counts = objective.loss_sums(model, batch), objective.counts(batch)
    return torch.stack([weight * sums[name] / max(counts[name], 1) for name, weight in objective.weights.items()]).sum()

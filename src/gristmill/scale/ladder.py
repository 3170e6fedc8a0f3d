"""A ladder of small models: train them alike, fit the law through their losses, foretell the next size, then train it.

What is foretold is written down before the next size is trained. Every rung is a run directory of the training loop, so
an interrupted ladder goes on where it stood, and a rung that is done is not trained again.

Source: Hestness et al. 2017, section 5; OpenAI 2023 (GPT-4), section 3.1 (a prediction from smaller runs).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from gristmill.corpus.loader import PackedLoader
from gristmill.corpus.shards import TokenDataset, TokenSource
from gristmill.errors import CheckpointError, DataError, GristmillError
from gristmill.files import write_json
from gristmill.model.accounting import matrix_parameters
from gristmill.model.attention.packed import PackedAttention
from gristmill.model.config import ModelConfig
from gristmill.model.transformer import Transformer
from gristmill.objectives.causal import CausalLM
from gristmill.scale.fit import bootstrap, fit_power_law, fit_power_law_with_floor
from gristmill.scale.laws import PowerLaw
from gristmill.scale.memory import TrainingSettings, training_flops
from gristmill.scale.shapes import shape_for
from gristmill.tokens.batch import IGNORED
from gristmill.train.config import TrainConfig
from gristmill.train.loop import train

HELD_OUT_EVERY = 20
"""Without held-out shards every so many-th document is held out."""
COPIES = 32
"""Sequences of the copying task."""

Task = Callable[[Transformer], tuple[int, int]]
"""Successes and trials of a model."""


@dataclass(frozen=True, kw_only=True)
class LadderConfig:
    """How the ladder is climbed. Raises GristmillError naming a value out of range."""

    data: str = ""
    """Directory of token shards to train on."""
    held_out: str = ""
    """Directory of token shards to measure the loss on; empty holds out every twentieth document of the data."""
    out: str = "runs/ladder"
    """Directory of the ladder; the same command goes on there."""
    sizes: tuple[int, ...] = (100_000, 200_000, 400_000, 800_000)
    """Parameters (in matrix products) of the models that the law is fitted to; the nearest shapes are taken."""
    next: int = 1_600_000
    """Size whose loss is foretold, and then measured."""
    tokens_per_parameter: float = 20.0
    """How long each is trained."""
    most_epochs: float = 4.0
    """Refuse to see the same data more often than this."""
    seeds: int = 1
    """Runs of each size with other initial weights and another order of the data."""
    seed: int = 0
    """The first of these seeds."""
    row_length: int = 256
    """Tokens of a row, and context of the models."""
    rows_per_batch: int = 8
    """Rows of a step."""
    learning_rate: float = 1e-2
    """Of a model 64 wide; falls as the root of the width."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 computes products in 16 bits."""
    device: str = "cpu"
    """Where to train: cpu, cuda or cuda:N."""
    law: Literal["power", "floor"] = "power"
    """power: a line in logarithms; floor adds an irreducible loss and needs at least four sizes."""
    confidence: float = 0.9
    """Share of refits within the band."""

    def __post_init__(self) -> None:
        least = 4 if self.law == "floor" else 3
        if len(set(self.sizes)) < least or min(self.sizes) < 1:
            raise GristmillError(
                f"sizes must be at least {least} different ones for the law {self.law}, got {self.sizes}"
            )
        if not self.next > max(self.sizes):
            raise GristmillError(f"next ({self.next}) must be above all sizes ({max(self.sizes)})")
        for name in ("tokens_per_parameter", "most_epochs", "seeds", "rows_per_batch", "learning_rate"):
            if not getattr(self, name) > 0:
                raise GristmillError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.row_length < 8:
            raise GristmillError(f"row_length must be at least 8, got {self.row_length}")
        if not 0 < self.confidence < 1:
            raise GristmillError(f"confidence must be in (0, 1), got {self.confidence}")

    @property
    def directory(self) -> Path:
        """Where the ladder lives."""
        return Path(self.out)


@dataclass(frozen=True)
class Rung:
    """One trained model. `tasks` holds successes and trials by name; loss in nats per token, with standard error."""

    name: str
    seed: int
    layers: int
    hidden_size: int
    parameters: int
    tokens: int
    epochs: float
    flops: float
    seconds: float
    loss: float
    standard_error: float
    tasks: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Forecast:
    """What the law says of the next size before it is trained: loss at its FLOP, and bounds at `confidence`."""

    flops: float
    loss: float
    low: float
    high: float
    confidence: float
    law: PowerLaw


@dataclass(frozen=True)
class Ladder:
    """The fitted rungs, the forecast, and the rungs that check it; `band` is of the law at `band_flops`."""

    rungs: tuple[Rung, ...]
    forecast: Forecast
    checks: tuple[Rung, ...]
    band_flops: np.ndarray
    band: tuple[np.ndarray, np.ndarray]
    data: dict[str, str]

    @property
    def measured(self) -> float:
        """Mean loss of the size that was foretold."""
        return float(np.mean([rung.loss for rung in self.checks]))

    @property
    def held(self) -> bool:
        """Whether the measured loss is within the bounds foretold."""
        return self.forecast.low <= self.measured <= self.forecast.high

    def facts(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return {
            "rungs": [asdict(rung) for rung in self.rungs],
            "forecast": asdict(self.forecast),
            "checks": [asdict(rung) for rung in self.checks],
            "measured": self.measured,
            "held": self.held,
            "data": self.data,
        }


def climb(config: LadderConfig, tasks: Mapping[str, Task] | None = None) -> Ladder:
    """Train the sizes, fit, write `forecast.json`, train the next size, and compare.

    `tasks` are measured beside the loss; without any, copying a random sequence is. Ctrl-C ends the step, keeps a
    checkpoint and raises KeyboardInterrupt. Raises DataError when the data are missing or too few for the tokens
    wanted, CheckpointError when the directory holds rungs of other settings.
    """
    source, held_out, data = _open(config)
    shapes = [shape_for(size, source.vocab_size, config.row_length) for size in (*config.sizes, config.next)]
    names = [matrix_parameters(shape) for shape in shapes]
    if len(set(names)) < len(names):
        raise GristmillError(f"sizes {(*config.sizes, config.next)} come to the same shapes ({names}); set them apart")
    work = [(shape, config.seed + turn) for shape in shapes for turn in range(config.seeds)]
    for shape in shapes:
        _check_supply(shape, config, source)
    measured = {"copying": partial(copying, length=config.row_length // 2)} if tasks is None else tasks
    climbed = len(config.sizes) * config.seeds
    rungs = [_rung(shape, seed, config, source, held_out, measured, data) for shape, seed in work[:climbed]]
    forecast, band_flops, band = foretell(rungs, _flops(shapes[-1], config), config)
    write_json(config.directory / "forecast.json", asdict(forecast))
    checks = [_rung(shape, seed, config, source, held_out, measured, data) for shape, seed in work[climbed:]]
    return Ladder(tuple(rungs), forecast, tuple(checks), band_flops, band, data)


def foretell(
    rungs: Sequence[Rung], flops: float, config: LadderConfig
) -> tuple[Forecast, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Fit loss over compute and read it at `flops`. Returns the forecast, whose bounds count the scatter of single runs
    too, and the band of the law alone from the smallest rung to there."""
    xs, ys = [rung.flops for rung in rungs], [rung.loss for rung in rungs]
    law = fit_power_law(xs, ys) if config.law == "power" else fit_power_law_with_floor(xs, ys)
    refit = fit_power_law if config.law == "power" else partial(fit_power_law_with_floor, start=law)
    grid = np.geomspace(min(xs), flops, 60)
    constants = 2 if config.law == "power" else 3
    options: dict[str, Any] = {"law": law, "constants": constants, "level": config.confidence, "seed": config.seed}
    band = bootstrap(refit, (xs, ys), (grid,), **options)
    low, high = bootstrap(refit, (xs, ys), ([flops],), scatter=True, samples=500, **options)
    return Forecast(flops, law(flops), float(low[0]), float(high[0]), config.confidence, law), grid, band


@torch.no_grad()
def held_out_loss(model: Transformer, loader: PackedLoader) -> tuple[float, float, tuple[int, int]]:
    """Mean loss in nats per token over one epoch, its standard error over batches, and how many tokens were guessed
    right of how many."""
    sums, counts, right = [], [], 0
    device = model.embed_tokens.weight.device
    for number in range(loader.batches_per_epoch):
        batch: Any = loader.batch(number).to(device)
        cache = PackedAttention(batch.segment_lengths, device)
        logits = model.logits(model.hidden_states(batch.input_ids, batch.position_ids, cache)).float()
        sums.append(float(F.cross_entropy(logits, batch.target_ids, reduction="sum", ignore_index=IGNORED)))
        counts.append(batch.target_count)
        right += int((logits.argmax(-1) == batch.target_ids).sum())
    total = sum(counts)
    if total == 0:
        raise DataError("the held-out data have no token to predict")
    mean = sum(sums) / total
    # a ratio of sums: its error comes from how far each batch is from the mean
    errors = np.array(sums) - mean * np.array(counts)
    spread = math.sqrt(float(errors @ errors) * len(errors) / max(1, len(errors) - 1)) / total
    return mean, spread, (right, total)


@torch.no_grad()
def copying(model: Transformer, *, length: int, seed: int = 0) -> tuple[int, int]:
    """A random sequence given twice: how many tokens of the second turn, but its first, are the most probable ones.

    Source: Olsson et al. 2022 (induction heads).
    """
    generator = torch.Generator().manual_seed(seed)
    once = torch.randint(model.config.vocab_size, (COPIES, length), generator=generator)
    rows = torch.cat((once, once), dim=1).to(model.embed_tokens.weight.device)
    guesses = model(rows).argmax(-1)[:, length:-1]
    return int((guesses == rows[:, length + 1 :]).sum()), guesses.numel()


class _Part:
    """Some documents of a source."""

    def __init__(self, source: TokenSource, documents: np.ndarray) -> None:
        self._source, self._documents = source, documents
        self.lengths, self.vocab_size = source.lengths[documents], source.vocab_size

    def read(self, pieces: np.ndarray) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """See `TokenSource`."""
        return self._source.read(np.column_stack((self._documents[pieces[:, 0]], pieces[:, 1:])))


def _open(config: LadderConfig) -> tuple[TokenSource, TokenSource, dict[str, str]]:
    if not config.data:
        raise DataError(
            "no data: give --ladder.data, a directory of token shards (docs/corpus.md tells how to write one)"
        )
    data = TokenDataset.open(Path(config.data))
    facts = {"data": config.data, "data hash": data.fingerprint[:12]}
    if config.held_out:
        other = TokenDataset.open(Path(config.held_out), tokenizer_hash=data.tokenizer_hash)
        return data, other, {**facts, "held out": config.held_out, "held-out hash": other.fingerprint[:12]}
    numbers = np.arange(len(data))
    chosen = numbers % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    if not chosen.any():
        raise DataError(f"{config.data}: {len(data)} documents are too few to hold some out; give --ladder.held_out")
    facts["held out"] = facts["held-out hash"] = f"every {HELD_OUT_EVERY}th document of the data"
    return _Part(data, numbers[~chosen]), _Part(data, numbers[chosen]), facts


def _check_supply(shape: ModelConfig, config: LadderConfig, source: TokenSource) -> None:
    wanted, there = config.tokens_per_parameter * matrix_parameters(shape), int(source.lengths.sum())
    if wanted > config.most_epochs * there:
        raise DataError(
            f"{matrix_parameters(shape):,} parameters want {wanted:,.0f} tokens, {wanted / there:.1f} times "
            f"the {there:,} there are (most_epochs is {config.most_epochs}): take smaller sizes or more data"
        )


def _flops(shape: ModelConfig, config: LadderConfig) -> float:
    tokens = config.tokens_per_parameter * matrix_parameters(shape)
    return training_flops(shape, TrainingSettings(sequence=config.row_length, tokens=config.row_length), tokens)


def _rung(
    shape: ModelConfig,
    seed: int,
    config: LadderConfig,
    source: TokenSource,
    held_out: TokenSource,
    tasks: Mapping[str, Task],
    data: dict[str, str],
) -> Rung:
    """Train and measure one model, unless that was done before."""
    size = matrix_parameters(shape)
    directory = config.directory / f"{size:010d}-seed-{seed}"
    settings = _training(shape, seed, config)
    options = {
        "shape": dataclasses.asdict(shape),
        "training": dataclasses.asdict(settings),
        "rows": [config.row_length, config.rows_per_batch],
        "data": [data["data hash"], data["held-out hash"]],
    }
    identity = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()
    record = directory / "rung.json"
    done = _read(record, identity)
    if done is not None:
        print(f"{directory.name}: done before", file=sys.stderr)
        return done
    objective = CausalLM()
    rows: dict[str, Any] = {"row_length": config.row_length, "prepare": objective.prepare}
    loader = PackedLoader(source, rows_per_batch=config.rows_per_batch, seed=seed, **rows)
    checking = PackedLoader(held_out, rows_per_batch=1, seed=0, shuffle=False, **rows)
    model = Transformer(shape)
    model.initialise(seed)
    model.to(config.device)
    position = train(model, objective, loader, settings, directory, identity=identity, description=f"{size:,}")
    loss, error, right = held_out_loss(model, checking)
    rung = Rung(
        name=f"{size:,}",
        seed=seed,
        layers=shape.num_hidden_layers,
        hidden_size=shape.hidden_size,
        parameters=size,
        tokens=position.tokens,
        epochs=position.tokens / float(source.lengths.sum()),
        flops=_flops(shape, config),
        seconds=position.seconds,
        loss=loss,
        standard_error=error,
        tasks={"next token": right, **{name: task(model) for name, task in tasks.items()}},
    )
    write_json(record, {"identity": identity, **asdict(rung)})
    return rung


def _training(shape: ModelConfig, seed: int, config: LadderConfig) -> TrainConfig:
    tokens = math.ceil(config.tokens_per_parameter * matrix_parameters(shape))
    steps = max(1, tokens // (config.row_length * config.rows_per_batch))
    return TrainConfig(
        tokens=tokens,
        learning_rate=config.learning_rate * math.sqrt(64 / shape.hidden_size),
        final_learning_rate=0.1,
        warmup=0.1,
        precision=config.precision,
        seed=seed,
        checkpoint_every=max(1, min(200, steps // 4)),
    )


def _read(record: Path, identity: str) -> Rung | None:
    if not record.exists():
        return None
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        other = found.pop("identity") != identity
        tasks = {name: (right, trials) for name, (right, trials) in found.pop("tasks").items()}
        rung = Rung(**found, tasks=tasks)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{record}: not a readable record ({error}). Delete it to measure again.") from error
    if other:
        raise CheckpointError(
            f"{record} belongs to a ladder with other settings or data. Give another --ladder.out, or delete it."
        )
    return rung

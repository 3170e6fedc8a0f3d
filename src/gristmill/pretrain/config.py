"""The options of a pretraining run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from gristmill.errors import GristmillError, closest
from gristmill.train.config import TrainConfig
from gristmill.train.parallel.layout import Parallel

ObjectiveName = Literal[
    "causal",
    "prefix",
    "fill_in_middle",
    "multi_token",
    "masked",
    "whole_word",
    "spans",
    "permuted",
    "electra",
    "span_corruption",
    "denoising",
    "mass",
    "ul2",
]
Device = Literal["cpu", "cuda"]
TOKENS = 2_000_000
DECODER: tuple[ObjectiveName, ...] = ("causal", "prefix", "fill_in_middle", "multi_token")
ENCODER: tuple[ObjectiveName, ...] = ("masked", "whole_word", "spans", "permuted", "electra")
ENCODER_DECODER: tuple[ObjectiveName, ...] = ("span_corruption", "denoising", "mass", "ul2")


PROBED: tuple[ObjectiveName, ...] = ("causal", "prefix", "fill_in_middle")


@dataclass(frozen=True, kw_only=True)
class Training(TrainConfig):
    """TrainConfig with a length of its own, which gives way to `steps`."""

    tokens: int | None = TOKENS
    """Tokens to train on; the step that reaches them is the last. The default gives way to `steps`."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.tokens == TOKENS:
            object.__setattr__(self, "tokens", None)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """What is measured besides loss, learning rate, gradient norm and speed."""

    every: int = 0
    """Steps between measurements of gradients, updates, activations and attention entropy, by layer; 0 for none."""
    mfu: bool = False
    """Record the share of the device's peak speed that the model's own operations reach."""
    tensorboard: bool = False
    """Write TensorBoard events into DIRECTORY/tensorboard."""
    probes: bool = False
    """Arithmetic, fact recall and code completion at each checkpoint (decoders)."""
    patience: int = 0
    """Validations without a new best after which the run stops, with the best weights; 0 never stops."""
    live: bool = False
    """A live panel in the place of the progress bar."""

    def __post_init__(self) -> None:
        for name in ("every", "patience"):
            if getattr(self, name) < 0:
                raise GristmillError(f"watch.{name} must be 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class PretrainConfig:
    """gristmill pretrain DIRECTORY --data TEXT: from text to a model that other programs can load.

    A value out of range is named; the same command goes on after an interruption.
    """

    directory: Path
    """Directory of the run; the same command goes on there after an interruption."""
    data: str | tuple[str, ...] = ()
    """Text (paragraphs between blank lines), JSON lines (.jsonl), a directory of .txt and .jsonl files, token shards
    (with or without folders train and held-out), or an asset by name; several as [a,b]."""
    text_field: str = "text"
    """Field of JSON lines that holds the text."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do about a broken line of JSON lines: stop, or warn and go on."""
    weights: tuple[float, ...] = ()
    """Share of the tokens to take from each of `data`; empty takes all of them as they are."""
    tokenizer: str = ""
    """Directory with tokenizer.json; empty trains one on the data."""
    vocab_size: int = 8192
    """Size of a tokenizer trained here."""
    model: str = "tiny"
    """Preset (nano, tiny, small) that gives depth and width, or a published decoder's name for a decoder."""
    objective: ObjectiveName = "causal"
    """What is learned; it decides between decoder, encoder and encoder-decoder."""
    row_length: int = 512
    """Tokens of a row, at most the context of the model; longer documents are cut."""
    rows_per_batch: int = 8
    """Rows of a loader batch. A step has train.micro_batches of them."""
    held_out: float = 0.05
    """Share of the documents that are held out to measure the loss."""
    seed: int = 0
    """Of the weights, the order of the data and all noise."""
    device: Device = "cpu"
    """cpu or cuda."""
    workers: int = 0
    """Processes that prepare batches ahead; 0 prepares them in the training process."""
    train: Training = field(default_factory=Training)
    """Options of the training loop."""
    parallel: Parallel = field(default_factory=Parallel)
    """How the run is split over the processes of torchrun (docs/scale-out.md)."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """What is measured on the way."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", (self.data,) if isinstance(self.data, str) and self.data else self.data)
        for name, kinds in (("objective", ObjectiveName), ("device", Device)):
            known, value = get_args(kinds), getattr(self, name)
            if value not in known:
                raise GristmillError(f"{name} must be one of {', '.join(known)}, got {value!r}.{closest(value, known)}")
        if not self.data:
            raise GristmillError("data is missing: give text files, JSON lines, shard directories or assets")
        if self.weights and len(self.weights) != len(self.data):
            raise GristmillError(f"{len(self.weights)} weights for {len(self.data)} entries of data")
        for name in ("row_length", "rows_per_batch", "vocab_size"):
            if getattr(self, name) < 1:
                raise GristmillError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 < self.held_out < 1.0:
            raise GristmillError(f"held_out must be in (0, 1), got {self.held_out}")
        for name in ("workers", "seed"):
            if getattr(self, name) < 0:
                raise GristmillError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.watch.probes and self.objective not in PROBED:
            raise GristmillError(f"watch.probes asks a decoder to go on with a text: objective {', '.join(PROBED)}")

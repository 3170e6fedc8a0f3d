"""Options of the quickstart, and what its one dial sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gristmill.errors import GristmillError
from gristmill.model.presets import Preset
from gristmill.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Train a small chat model from raw text: corpus, tokenizer, pretraining, fine-tuning, evaluation, export, report.

    The same command goes on where an interrupted run stood.
    """

    preset: Preset = "tiny"
    """Size of everything: nano (a minute), tiny (ten minutes on two cores) or small (hours; better on a GPU)."""
    out: str = ""
    """Run directory; empty means runs/quickstart-PRESET."""
    corpus: str = ""
    """Your own articles instead of the Wikipedia summaries: a JSON object of articles by title, or JSONL, each with
    title, extract, description and topic."""
    seed: int = 0
    """Seed of the initial weights and the order of the data."""
    device: str = "cpu"
    """Where to train: cpu or cuda."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto takes bfloat16 where the processor computes in it, else float32."""

    def __post_init__(self) -> None:
        if self.device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
            raise GristmillError("device cuda: no CUDA device is available here. Use --device cpu.")

    @property
    def directory(self) -> Path:
        """Where the run lives."""
        return Path(self.out or f"runs/quickstart-{self.preset}")


@dataclass(frozen=True)
class Budget:
    """What a preset spends."""

    pretrain_epochs: float
    pretrain_learning_rate: float
    finetune_epochs: float
    finetune_learning_rate: float
    rows_per_batch: int
    documents: int | None
    """Use only so many articles; None uses all."""
    questions: int
    """Topic questions asked in the evaluation."""


BUDGETS: dict[Preset, Budget] = {
    "nano": Budget(1.0, 4e-3, 1.0, 2e-3, 8, 3000, 150),
    "tiny": Budget(1.6, 2e-3, 1.0, 1e-3, 8, None, 450),
    "small": Budget(6.0, 1e-3, 2.0, 5e-4, 16, None, 450),
}
HELD_OUT_SHARE = 0.06
ROW_LENGTH = 512


def choose_precision(config: QuickstartConfig) -> Literal["float32", "bfloat16"]:
    """The precision to train in. On a processor without bfloat16 units, emulating it is slower than float32."""
    if config.precision != "auto":
        return config.precision
    if config.device != "cpu":
        return "bfloat16"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return "float32"
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def train_config(
    epochs: float, learning_rate: float, batches_per_epoch: int, precision: Literal["float32", "bfloat16"]
) -> TrainConfig:
    """The loop's options for so many epochs over a loader."""
    steps = max(1, round(epochs * batches_per_epoch))
    return TrainConfig(
        steps=steps,
        learning_rate=learning_rate,
        precision=precision,
        validate_every=max(1, steps // 8),
        checkpoint_every=max(1, min(50, steps // 4)),
    )

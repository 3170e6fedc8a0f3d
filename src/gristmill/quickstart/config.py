"""Options of the quickstart, and what its one dial sets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gristmill.errors import GristmillError
from gristmill.model.presets import Preset
from gristmill.train.config import TrainConfig
from gristmill.train.precision import PrecisionName


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
    """Your own articles instead of the Wikipedia summaries: a JSON object of articles by title, or a .jsonl file
    of one article a line, each with title, extract, description and topic."""
    seed: int = 0
    """Seed of the initial weights and the order of the data."""
    device: str = "cpu"
    """Where to train: cpu, cuda or cuda:N."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto takes bfloat16 where the processor computes in it, else float32."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise GristmillError(f"seed must be in [0, 2**63), got {self.seed}")
        match = re.fullmatch(r"cpu|cuda(?::(\d+))?", self.device)
        if match is None:
            raise GristmillError(f"device must be cpu, cuda or cuda:N, got {self.device!r}")
        if self.device != "cpu" and int(match[1] or 0) >= torch.cuda.device_count():
            raise GristmillError(f"device {self.device}: no such CUDA device is available here. Use --device cpu.")

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
    "tiny": Budget(1.0, 2e-3, 0.6, 1e-3, 8, None, 300),
    "small": Budget(4.0, 1e-3, 2.0, 5e-4, 16, None, 450),
}
HELD_OUT_SHARE = 0.06
ROW_LENGTH = 512


def choose_precision(config: QuickstartConfig) -> PrecisionName:
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


def train_config(epochs: float, learning_rate: float, batches_per_epoch: int, precision: PrecisionName) -> TrainConfig:
    """The loop's options for so many epochs over a loader."""
    steps = max(1, round(epochs * batches_per_epoch))
    return TrainConfig(
        steps=steps,
        learning_rate=learning_rate,
        precision=precision,
        validate_every=max(1, steps // 8),
        checkpoint_every=max(1, min(50, steps // 4)),
    )

"""Random adapters of the tiny model, as large as its own weights: without one, or with another, its tokens differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gristmill.files import write_json
from gristmill.model.config import ModelConfig
from gristmill.model.lora.low_rank import Lora, LowRank
from gristmill.model.lora.peft import read_lora, save_lora
from model import tiny

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def settings(**changes: Any) -> dict[str, Any]:
    """What an adapter_config.json says, with the rank and alpha of `write`."""
    return {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": list(NAMES), "bias": "none", **changes}


def matrices(config: ModelConfig = tiny.CONFIG) -> dict[str, tuple[str, int, int, int]]:
    """By Hugging Face name: our module, first row, rows, inputs."""
    hidden, inner, query, key = (
        config.hidden_size,
        config.intermediate_size,
        config.query_size,
        config.key_value_size,
    )
    found: dict[str, tuple[str, int, int, int]] = {}
    for layer in range(config.num_hidden_layers):
        here, theirs = f"layers.{layer}", f"model.layers.{layer}"
        found |= {
            f"{theirs}.self_attn.q_proj": (f"{here}.self_attn.qkv_proj", 0, query, hidden),
            f"{theirs}.self_attn.k_proj": (f"{here}.self_attn.qkv_proj", query, key, hidden),
            f"{theirs}.self_attn.v_proj": (f"{here}.self_attn.qkv_proj", query + key, key, hidden),
            f"{theirs}.self_attn.o_proj": (f"{here}.self_attn.o_proj", 0, hidden, query),
            f"{theirs}.mlp.gate_proj": (f"{here}.mlp.gate_up_proj", 0, inner, hidden),
            f"{theirs}.mlp.up_proj": (f"{here}.mlp.gate_up_proj", inner, inner, hidden),
            f"{theirs}.mlp.down_proj": (f"{here}.mlp.down_proj", 0, hidden, inner),
        }
    return found


def lora(
    seed: int,
    config: ModelConfig = tiny.CONFIG,
    *,
    ranks: Sequence[int] = (3,),
    names: Sequence[str] = NAMES,
    size: float = 0.15,
) -> Lora:
    """A random adapter of the matrices of these names, whose ranks go round."""
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, tuple[LowRank, ...]] = {}
    chosen = [name for name in matrices(config) if name.endswith(tuple(names))]
    for number, name in enumerate(chosen):
        module, begin, rows, inputs = matrices(config)[name]
        rank = ranks[number % len(ranks)]
        down = torch.randn(rank, inputs, generator=generator) * size
        up = torch.randn(rows, rank, generator=generator) * size
        parts[module] = (*parts.get(module, ()), LowRank(name, begin, down, up, 0.5 + number % 3))
    return Lora(config, parts)


def write(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """A directory of the matrices that end with NAMES, all of rank 3; `changes` are of its configuration."""
    save_lora(lora(seed), directory)
    write_json(directory / "adapter_config.json", settings(**changes))
    return directory


def read(directory: Path) -> Lora:
    """The adapter of a directory, for the tiny model."""
    return read_lora(directory, tiny.CONFIG)

"""Models and runs for tests of many processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from gristmill.model.config import AttentionConfig, FeedForwardConfig, ModelConfig, NormConfig, PositionConfig
from gristmill.model.transformer import Transformer
from gristmill.objectives.causal import CausalLM
from gristmill.train.config import TrainConfig
from gristmill.train.loop import train
from gristmill.train.metrics import read_metrics
from gristmill.train.parallel.mesh import Mesh
from gristmill.train.parallel.world import DistributedWorld
from train.toy import toy_loader

_SIZES: dict[str, Any] = {
    "vocab_size": 27,  # no multiple of 2 or 4
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
LLAMA = ModelConfig(**_SIZES)
"""Tied embedding, grouped queries, rotary positions."""
EVERYTHING = ModelConfig(
    **{**_SIZES, "num_key_value_heads": 4},
    norm=NormConfig(kind="layer", bias=True),
    attention=AttentionConfig(qkv_bias=True, output_bias=True, qk_norm="head", sinks=True),
    feed_forward=FeedForwardConfig(activation="gelu", gated=False, bias=True),
    positions=PositionConfig(absolute="learned"),
    tie_word_embeddings=False,
    head_bias=True,
    logit_softcap=5.0,
)
"""Biases, norms and sinks everywhere, untied."""


def small_model(config: ModelConfig) -> Transformer:
    """The same weights on every process."""
    model = Transformer(config)
    model.initialise(0)
    return model


def small_config(**changes: Any) -> TrainConfig:
    """Three steps of four loader batches."""
    options: dict[str, Any] = {"steps": 3, "micro_batches": 4, "learning_rate": 1e-2, "warmup": 0.0, "clip_norm": 0.5}
    return TrainConfig(**options | changes)


def small_run(config: ModelConfig, directory: Path, mesh: Mesh | None = None, **changes: Any) -> dict[str, Tensor]:
    """Train on the mesh, or alone; the finished weights in full."""
    model = small_model(config)
    world = None if mesh is None else DistributedWorld(mesh)
    # three batches: no multiple of the shares
    held_out = toy_loader(14, seed=1)
    train(model, CausalLM(), toy_loader(), small_config(**changes), directory, validation=held_out, world=world)
    if world is not None:
        return {name: tensor.clone() for name, tensor in world.whole(model).items()}
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def curve(directory: Path) -> list[tuple[float, float, float]]:
    """Loss, gradient norm and held-out loss of every step."""
    records = read_metrics(directory / "metrics.jsonl")
    return [(r["loss"], r["gradient_norm"], r.get("validation_loss", 0.0)) for r in records]

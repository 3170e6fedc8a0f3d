"""Hugging Face directories: config.json and safetensors, in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gristmill.errors import CheckpointError
from gristmill.files import write_json
from gristmill.model.config import ModelConfig
from gristmill.model.formats.llama_names import fuse, split
from gristmill.model.formats.state import load_state, meta_model
from gristmill.model.transformer import Transformer

# flags of a Llama configuration that would change the computation: only these values are built
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "pretraining_tp": (1, None),
}


def load_huggingface(directory: Path, dtype: torch.dtype) -> Transformer:
    """Build the model of a directory. Raises CheckpointError for an unknown architecture, flag or tensor."""
    config = read_config(directory / "config.json")
    tensors: dict[str, torch.Tensor] = {}
    for file in _weight_files(directory):
        try:
            tensors.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error
    model = meta_model(config)
    load_state(model, fuse(tensors, config, str(directory)), dtype, str(directory))
    return model


def save_huggingface(model: Transformer, directory: Path, *, stop_token_ids: tuple[int, ...] = ()) -> None:
    """Write config.json and model.safetensors as `LlamaForCausalLM` reads them. Not atomic: the caller's
    `atomic_directory` is."""
    directory.mkdir(parents=True, exist_ok=True)
    config = model.config
    dtype = model.embed_tokens.weight.dtype
    write_json(
        directory / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "intermediate_size": config.intermediate_size,
            "max_position_embeddings": config.max_position_embeddings,
            "rope_theta": config.rope_theta,
            "rms_norm_eps": config.rms_norm_eps,
            "tie_word_embeddings": config.tie_word_embeddings,
            "initializer_range": config.initializer_range,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "eos_token_id": list(stop_token_ids) or None,
            "torch_dtype": str(dtype).removeprefix("torch."),
        },
    )
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    save_file(split(state, config), directory / "model.safetensors", metadata={"format": "pt"})


def read_config(path: Path) -> ModelConfig:
    """Parse config.json. Raises CheckpointError naming the key that is missing or not supported."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    kind = raw.get("model_type")
    if kind != "llama":
        raise CheckpointError(f"{path}: model_type {kind!r} is not supported (supported: 'llama')")
    rope = raw.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise CheckpointError(f"{path}: rope_parameters.rope_type {rope['rope_type']!r} is not supported")
    for key, allowed in _ONLY.items():
        if key in raw and raw[key] not in allowed:
            raise CheckpointError(f"{path}: {key} = {raw[key]!r} is not supported")

    def need(key: str, default: Any = None) -> Any:
        value = raw.get(key, default)
        if value is None:
            raise CheckpointError(f"{path}: {key!r} is missing")
        return value

    heads = need("num_attention_heads")
    return ModelConfig(
        vocab_size=need("vocab_size"),
        hidden_size=need("hidden_size"),
        num_hidden_layers=need("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=need("num_key_value_heads", heads),
        head_dim=raw.get("head_dim") or need("hidden_size") // heads,
        intermediate_size=need("intermediate_size"),
        max_position_embeddings=need("max_position_embeddings", 2048),
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
        rms_norm_eps=need("rms_norm_eps", 1e-6),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        initializer_range=float(raw.get("initializer_range", 0.02)),
    )


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [directory / shard for shard in shards]
    else:
        files = [directory / "model.safetensors"]
    for file in files:
        if file.parent.resolve() != directory.resolve():
            raise CheckpointError(f"{index}: shard {file.name} lies outside the directory")
        if not file.is_file():
            hint = ""
            if any(directory.glob("*.bin")):
                hint = " Pickled .bin weights are not loaded: convert them to safetensors first."
            raise CheckpointError(f"{file}: missing.{hint}")
    return files

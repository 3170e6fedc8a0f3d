"""Hugging Face directories: config.json and safetensors, in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gristmill.errors import CheckpointError
from gristmill.files import write_json
from gristmill.model.config import ModelConfig
from gristmill.model.formats.llama_names import fuse, split
from gristmill.model.formats.state import load_state, meta_model, save_tensors
from gristmill.model.transformer import Transformer

_T = TypeVar("_T")

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
            part = load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error
        if twice := sorted(tensors.keys() & part.keys()):
            raise CheckpointError(f"{file}: tensor {twice[0]} is in another shard too")
        tensors |= part
    state = fuse(tensors, config, str(directory))
    model = meta_model(config)
    load_state(model, state, dtype, str(directory))
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
    save_tensors(split(state, config), directory / "model.safetensors")


def read_config(path: Path) -> ModelConfig:
    """Parse config.json. Raises CheckpointError naming the key that is missing or not supported."""
    raw = _read_object(path)
    kind = raw.get("model_type")
    if kind != "llama":
        raise CheckpointError(f"{path}: model_type {kind!r} is not supported (supported: 'llama')")
    for key, allowed in _ONLY.items():
        if key in raw and raw[key] not in allowed:
            raise CheckpointError(f"{path}: {key} = {raw[key]!r} is not supported")

    def need(key: str, kind: type[_T], default: _T | None = None) -> _T:
        value: Any = default if raw.get(key) is None else raw[key]
        if value is None:
            raise CheckpointError(f"{path}: {key!r} is missing")
        if not isinstance(value, kind) and not (kind is float and isinstance(value, int)):
            raise CheckpointError(f"{path}: {key} = {value!r} is not of type {kind.__name__}")
        return cast(_T, value)

    hidden, heads = need("hidden_size", int), need("num_attention_heads", int)
    try:
        return ModelConfig(
            vocab_size=need("vocab_size", int),
            hidden_size=hidden,
            num_hidden_layers=need("num_hidden_layers", int),
            num_attention_heads=heads,
            num_key_value_heads=need("num_key_value_heads", int, heads),
            head_dim=need("head_dim", int, hidden // max(heads, 1)),
            intermediate_size=need("intermediate_size", int),
            max_position_embeddings=need("max_position_embeddings", int, 2048),
            rope_theta=_rope_theta(raw, path),
            rms_norm_eps=need("rms_norm_eps", float, 1e-6),
            tie_word_embeddings=need("tie_word_embeddings", bool, False),
            initializer_range=need("initializer_range", float, 0.02),
        )
    except CheckpointError as error:
        raise error if str(path) in str(error) else CheckpointError(f"{path}: {error}") from error


def _rope_theta(raw: dict[str, Any], path: Path) -> float:
    """The base of the rotary positions. Raises CheckpointError for any other rotary setting: it would scale them."""
    rope = raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{path}: rope_parameters is not an object")
    for key, value in rope.items():
        if key != "rope_theta" and (key, value) != ("rope_type", "default"):
            raise CheckpointError(f"{path}: rope_parameters.{key} {value!r} is not supported")
    theta = rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0
    if not isinstance(theta, (int, float)):
        raise CheckpointError(f"{path}: rope_theta {theta!r} is not a number")
    return float(theta)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        shards = _read_object(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise CheckpointError(f"{index}: weight_map does not give each tensor the name of its file")
        files = [directory / shard for shard in sorted(set(shards.values()))]
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

"""Quantised models on disk: a directory with config.json, the canonical tensors under our names, and the tokenizer.

config.json has a model_type of its own, which programs that do not know this form refuse; it holds the configuration
of the floating model too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gristmill.errors import CheckpointError
from gristmill.files import atomic_directory, write_json
from gristmill.model.config import ModelConfig
from gristmill.model.formats.huggingface import QUANTISED, family_of, read_config, read_object
from gristmill.model.formats.safetensors_file import ShardedTensors, save_sharded
from gristmill.model.formats.state import check_names, on_meta
from gristmill.model.quantised.linear import Int8Embedding, build_linear
from gristmill.model.quantised.quantise import EMBEDDING, HEAD, QuantisationReport
from gristmill.model.quantised.weights import GROUP_SIZES, SCHEMES, Int4Weight, Int8Weight, Scheme, Weight
from gristmill.model.transformer import Transformer
from gristmill.tokens.tokenizer import Tokenizer

VERSION = 1


def save_quantised(
    model: Transformer, tokenizer: Tokenizer, directory: Path, report: QuantisationReport, *, prefer: str | None = None
) -> None:
    """Write a model that `quantise_model` made; the directory appears whole or not at all.

    prefer: the model_type to write, where that family can hold the model. Raises CheckpointError when none can.
    """
    family = family_of(model.config, "causal_lm", None, prefer)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    kept: dict[tuple[int, str], str] = {}
    for name, tensor in list(tensors.items()):  # the embedding comes first: what a head shares with it is written once
        if kept.setdefault((tensor.data_ptr(), str(tensor.dtype)), name) != name and name.startswith(f"{HEAD}."):
            del tensors[name]
    floats = next((tensor.dtype for tensor in model.parameters()), torch.float32)
    values = {
        "model_type": QUANTISED,
        "quantisation": {
            "version": VERSION,
            "scheme": report.scheme,
            "group_size": report.group_size,
            "method": report.method,
        },
        "model": {
            "architectures": [family.architecture("causal_lm")],
            "model_type": family.model_type,
            **family.write(model.config),
            "eos_token_id": list(tokenizer.stop_token_ids) or None,
            "torch_dtype": str(floats).removeprefix("torch."),
        },
    }
    with atomic_directory(directory) as temporary:
        write_json(temporary / "config.json", values)
        save_sharded(tensors, temporary)
        tokenizer.save(temporary)


def stored_scheme(values: Mapping[str, Any], where: str) -> tuple[Scheme, int]:
    """Scheme and group size of a quantised model of ours. Raises CheckpointError for what this version cannot read."""
    section = values.get("quantisation")
    if not isinstance(section, dict) or not isinstance(values.get("model"), dict) or len(values) != 3:
        raise CheckpointError(f"{where}: expected model_type, quantisation and model, found {', '.join(values)}")
    if section.get("version") != VERSION:
        raise CheckpointError(f"{where}: version {section.get('version')!r} of quantised models is not known")
    if unknown := sorted(section.keys() - {"version", "scheme", "group_size", "method"}):
        raise CheckpointError(f"{where}: quantisation.{unknown[0]} is not known")
    scheme, group_size = section.get("scheme"), section.get("group_size")
    if scheme not in SCHEMES or group_size not in GROUP_SIZES:
        raise CheckpointError(f"{where}: scheme {scheme!r} with group_size {group_size!r} is not supported")
    return scheme, group_size


def read_quantised(
    directory: Path, scheme: Scheme | None, dtype: torch.dtype, *, embedding: bool = False
) -> Transformer:
    """The model of a directory that `save_quantised` wrote; scheme None takes what is stored.

    int8 and w8a8 hold the same and stand for each other. dtype: of what is not quantised. embedding: keep one of eight
    bits as it is. Raises CheckpointError naming the scheme or tensor that does not fit.
    """
    where = str(directory)
    at = str(directory / "config.json")
    values = read_object(directory / "config.json")
    stored, group_size = stored_scheme(values, at)
    if scheme is not None and (scheme == "int4") != (stored == "int4"):
        raise CheckpointError(f"{where}: holds {stored}, not {scheme}; quantise the floating model again")
    _, kind, config = read_config(values["model"], at)
    if kind != "causal_lm" or not isinstance(config, ModelConfig):
        raise CheckpointError(f"{where}: a quantised {kind} is not supported")
    model = on_meta(lambda: Transformer(config))
    reader = _Reader(ShardedTensors(directory), group_size, where)
    for name, layer in list(model.named_modules()):
        weight = reader.weight(name, tuple(layer.weight.shape)) if type(layer) is nn.Linear else None
        if weight is not None:
            model.set_submodule(name, build_linear(weight, layer.bias, scheme or stored))
    state: dict[str, Tensor] = {}
    rows = reader.weight(EMBEDDING, (config.vocab_size, model.embed_tokens.embedding_dim))
    if isinstance(rows, Int8Weight):
        if type(model.lm_head) is nn.Linear and config.tie_word_embeddings:
            model.set_submodule(HEAD, build_linear(rows, model.lm_head.bias, scheme or stored))
        if embedding:
            model.set_submodule(EMBEDDING, Int8Embedding(rows, dtype))
        else:
            state[f"{EMBEDDING}.weight"] = rows.dequantised().to(dtype)
    buffers = {name for name, tensor in model.named_buffers() if not name.endswith(".bias")}
    fill(model, state | reader.rest(dtype, buffers), where)
    return model


def fill(model: Transformer, state: dict[str, Tensor], where: str) -> None:
    """Give a model whose layers are quantised, and else on the meta device, its other tensors, each tied one once.

    Raises CheckpointError naming a tensor that is missing, has no place or has another shape.
    """
    head = model.lm_head
    tied = type(head) is nn.Linear and model.config.tie_word_embeddings
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if tensor.is_meta}
    if tied:
        del wanted[f"{HEAD}.weight"]
    check_names(wanted, state, where)
    for name, shape in wanted.items():
        if state[name].shape != shape:
            raise CheckpointError(
                f"{where}: tensor {name} has shape {tuple(state[name].shape)}, expected {tuple(shape)}"
            )
    model.load_state_dict(state, strict=False, assign=True)
    if tied:
        head.weight = model.embed_tokens.weight


class _Reader:
    """The tensors of a quantised checkpoint; those that no layer has asked for are the rest."""

    def __init__(self, tensors: ShardedTensors, group_size: int, where: str) -> None:
        self.tensors, self.group_size, self.where = tensors, group_size, where
        self.left = set(tensors)

    def weight(self, name: str, shape: tuple[int, ...]) -> Weight | None:
        """A quantised matrix of this shape, or None when it is not stored as one."""
        out, inputs = shape
        eight = f"{name}.quantised" in self.tensors
        if not eight and f"{name}.packed" not in self.tensors:
            return None
        if f"{name}.scale" not in self.tensors:
            raise CheckpointError(f"{self.where}: tensor {name}.scale is missing")
        groups = 1 if eight else inputs // self.group_size
        values = self._take(f"{name}.quantised", torch.int8, (out, inputs)) if eight else None
        packed = self._take(f"{name}.packed", torch.uint8, (out, inputs // 2)) if not eight else None
        scale = self._take(f"{name}.scale", self.tensors.dtype(f"{name}.scale"), (out, groups))
        kinds = (torch.float32,) if eight else (torch.float32, torch.bfloat16)
        if scale.dtype not in kinds or not bool(scale.isfinite().all()):
            raise CheckpointError(f"{self.where}: tensor {name}.scale is no list of finite scales ({scale.dtype})")
        if values is not None:
            return Int8Weight(values, scale)
        assert packed is not None
        return Int4Weight(packed, scale)

    def rest(self, dtype: torch.dtype, buffers: set[str]) -> dict[str, Tensor]:
        """All that is left, as `dtype`, buffers in float32."""
        return {name: self._float(name, torch.float32 if name in buffers else dtype) for name in sorted(self.left)}

    def _float(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self.tensors[name]
        if not tensor.is_floating_point():
            raise CheckpointError(f"{self.where}: tensor {name} of type {tensor.dtype} has no place in this model")
        return tensor.to(dtype)

    def _take(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        tensor = self.tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self.where}: tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}"
            )
        self.left.discard(name)
        return tensor

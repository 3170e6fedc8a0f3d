"""Hugging Face directories: config.json and safetensors, in and out."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gristmill.errors import CheckpointError, closest
from gristmill.files import write_json
from gristmill.model.config import EncoderDecoderConfig
from gristmill.model.encoder import Encoder
from gristmill.model.encoder_decoder import EncoderDecoder
from gristmill.model.formats.families import FAMILIES
from gristmill.model.formats.family import Config, Family, Kind, Raw
from gristmill.model.formats.heads import StoredTensors, model_entries, read_head, write_head
from gristmill.model.formats.mapping import to_ours, to_theirs
from gristmill.model.formats.safetensors_file import ShardedTensors, save_sharded
from gristmill.model.formats.state import load_state, on_meta
from gristmill.model.heads import HeadConfig, Headed
from gristmill.model.transformer import Stack, Transformer

Model = Transformer | Encoder | EncoderDecoder | Headed

QUANTISED = "gristmill_quantised"
"""model_type in the config.json of a quantised model of ours, whose own is under "model"; see
gristmill.model.quantised.checkpoint."""


def load_huggingface(directory: Path, dtype: torch.dtype) -> Model:
    """Build the model of a directory. Raises CheckpointError for an unknown architecture, flag or tensor."""
    path = directory / "config.json"
    return build(read_object(path), ShardedTensors(directory), dtype, str(path), str(directory))


def build(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype, config_at: str, tensors_at: str
) -> Model:
    """The model of a parsed config.json and its tensors, which are asked for one by one.

    Raises CheckpointError, naming `config_at` or `tensors_at`, for what is not supported or does not fit.
    """
    family, kind, config, head = read_model(values, tensors.keys(), config_at)
    model = on_meta(lambda: module_for(config, kind, head))
    entries = model_entries(family, model, kind)
    state = to_ours(
        StoredTensors(tensors, family, entries, tensors_at),
        entries,
        model,
        tensors_at,
        dtype=dtype,
        copies=family.copies(config, kind),
        derived=family.derived,
    )
    load_state(model, state, tensors_at)
    return model


def read_model(
    values: Mapping[str, Any], names: Collection[str], where: str
) -> tuple[Family, Kind, Config, HeadConfig | None]:
    """What a parsed config.json and the names of the stored tensors say together. Raises as `read_config` does."""
    family, kind, config = read_config(values, where)
    config = family.settle(config, names)
    _check_extent(config, len(names), where)
    if kind == "pooled_encoder" and not any("pooler" in name for name in names):
        kind = "encoder"
    return family, kind, config, read_head(family, Raw(values, where), config, kind)


def _check_extent(config: Config, tensors: int, where: str) -> None:
    """Refuse more layers and experts than the tensors can fill, before any memory is spent on such a model."""
    stacks = (config.encoder, config.decoder) if isinstance(config, EncoderDecoderConfig) else (config,)
    layers = experts = 0
    for stack in stacks:
        layers += stack.num_hidden_layers
        if stack.feed_forward.moe is not None:
            sparse = sum(stack.layer(index).sparse for index in range(stack.num_hidden_layers))
            experts += sparse * stack.feed_forward.moe.num_experts
    if max(layers, experts) > max(tensors, 1000):
        words = f"{layers:,} layers" if experts <= layers else f"{experts:,} experts in {layers:,} layers"
        raise CheckpointError(f"{where}: {words}, but only {tensors} tensors")


def module_for(config: Config, kind: Kind, head: HeadConfig | None = None) -> Model:
    """An uninitialised module of this kind: an encoder, or a stack with the head it has."""
    if isinstance(config, EncoderDecoderConfig):
        return EncoderDecoder(config)
    if kind == "causal_lm":
        return Transformer(config)
    if head is None:
        return Encoder(config)
    return Headed(Stack(config) if config.causal else Encoder(config), head)


def save_huggingface(
    model: Model,
    directory: Path,
    *,
    stop_token_ids: tuple[int, ...] = (),
    max_shard_bytes: int = 5 << 30,
    prefer: str | None = None,
) -> str:
    """Write config.json and the weights as `to_huggingface` gives them; returns the class that they are of.

    Not atomic: the caller's `atomic_directory` is. Raises CheckpointError when no family can hold the model.
    """
    values, tensors = to_huggingface(model, stop_token_ids=stop_token_ids, prefer=prefer)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", values)
    save_sharded(tensors, directory, max_shard_bytes)
    return str(values["architectures"][0])


def to_huggingface(
    model: Model, *, stop_token_ids: tuple[int, ...] = (), prefer: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors of a model, as the family `prefer` writes them if it can, else the first that can.

    Raises CheckpointError when no family can.
    """
    kind, head = _kind(model), model.head_config if isinstance(model, Headed) else None
    family = family_of(model.config, kind, head, prefer)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    values = {
        "architectures": [family.architecture(kind)],
        "model_type": family.model_type,
        **family.write(model.config),
        **write_head(family, model.config, head),
        "eos_token_id": list(stop_token_ids) or None,
        "torch_dtype": str(next(iter(state.values())).dtype).removeprefix("torch."),
    }
    return values, to_theirs(state, model_entries(family, model, kind))


def family_of(config: Config, kind: Kind, head: HeadConfig | None = None, prefer: str | None = None) -> Family:
    """The first family that reads back exactly this configuration (and head) from what it writes of it; the one whose
    model_type is `prefer` is asked before all others.

    Raises CheckpointError when none does.
    """
    for family in sorted(FAMILIES, key=lambda family: family.model_type != prefer):
        if kind not in family.architectures.values() and (
            kind != "encoder" or "pooled_encoder" not in family.architectures.values()
        ):
            continue
        try:
            raw = Raw(family.write(config), family.model_type)
            back = family.read(raw)
            raw.finish()
            names = {name for entry in family.entries(config, kind) for name in entry.theirs}
            if family.settle(back, names) != config:
                continue
            raw = Raw(family.write(config) | write_head(family, config, head), family.model_type)
            if read_head(family, raw, config, kind) == head:
                return family
        except CheckpointError:
            continue
    raise CheckpointError(f"no known family of checkpoints has this architecture ({kind}): {config}{head or ''}")


def read_config(values: Mapping[str, Any], where: str) -> tuple[Family, Kind, Config]:
    """Family, kind and configuration of a parsed config.json. Raises CheckpointError naming the key that is missing
    or not supported."""
    model_type = values.get("model_type")
    family = next((family for family in FAMILIES if family.model_type == model_type), None)
    if family is None:
        names = [family.model_type for family in FAMILIES]
        raise CheckpointError(
            f"{where}: model_type {model_type!r} is not supported{closest(str(model_type), names)} "
            f"(supported: {', '.join(names)})"
        )
    classes = values.get("architectures") or [next(iter(family.architectures))]
    raw = Raw(values, where)
    if not isinstance(classes, list) or len(classes) != 1 or classes[0] not in tuple(family.architectures):
        raise CheckpointError(f"{raw.refuse('architectures')} (supported: {', '.join(family.architectures)})")
    try:
        config = family.read(raw)
    except CheckpointError as error:
        raise error if where in str(error) else CheckpointError(f"{where}: {error}") from error
    raw.finish()
    return family, family.architectures[classes[0]], config


def is_quantised(values: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json is that of a quantised model of ours."""
    return values.get("model_type") == QUANTISED


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _kind(model: nn.Module) -> Kind:
    if isinstance(model, EncoderDecoder):
        return "seq2seq"
    if isinstance(model, Headed):
        if isinstance(model.body, Transformer):  # its output layer has no place beside another head
            raise CheckpointError(f"no known family of checkpoints puts a head on a {type(model.body).__name__}")
        return model.head_config.kind
    return "causal_lm" if isinstance(model, Transformer) else "encoder"

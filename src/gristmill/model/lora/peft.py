"""PEFT directories of LoRA adapters: adapter_config.json and adapter_model.safetensors, in and out.

The configuration says which matrices are adapted and the file has to hold exactly these. A key that would change what
is computed is applied, or refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gristmill.errors import CheckpointError, closest
from gristmill.files import write_json
from gristmill.model.attention.layer import Attention
from gristmill.model.config import ModelConfig
from gristmill.model.feedforward import FeedForward
from gristmill.model.formats.family import Raw
from gristmill.model.formats.huggingface import family_of, read_object
from gristmill.model.formats.mapping import Rows, part_shapes
from gristmill.model.formats.safetensors_file import SafetensorsFile
from gristmill.model.formats.state import check_names, check_tensor, on_meta
from gristmill.model.lora.low_rank import Lora, LowRank
from gristmill.model.transformer import Transformer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HALVES = ("lora_A", "lora_B")
# about the file, its training, or the values that training began with
_NEUTRAL = (
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "inference_mode", "lora_dropout"),
    *("lora_ga_config", "loftq_config", "megatron_core", "peft_version", "qalora_group_size", "revision"),
    *("runtime_config",),
)
# what none of our adapters has; off means absent, null, false or empty
_REFUSED = (
    *("alora_invocation_tokens", "arrow_config", "corda_config", "fan_in_fan_out", "kasa_config", "layer_replication"),
    *("lora_bias", "megatron_config", "modules_to_save", "monteclora_config", "target_parameters"),
    *("trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "velora_config"),
)
_INITIAL = (None, True, False, "gaussian", "orthogonal", "eva")


class _Place(NamedTuple):
    """Where a foreign matrix (rows, inputs) lies: the rows from `begin` on of a module's weight."""

    module: str
    begin: int
    rows: int
    inputs: int


def read_lora(directory: Path, config: ModelConfig) -> Lora:
    """The adapter of a directory, for a decoder of this configuration.

    Raises CheckpointError, naming key or tensor and the file, for what is not supported, is missing or does not fit.
    """
    raw = Raw(read_object(directory / CONFIG), str(directory / CONFIG))
    _refuse_others(raw)
    places = _places(config)
    names = _targets(raw, places)
    scales = _scales(raw, names)
    raw.finish()
    path = directory / WEIGHTS
    if not path.exists() and (directory / "adapter_model.bin").exists():
        raise CheckpointError(f"{directory}: adapter_model.bin is a pickle, which can run code; save it as {WEIGHTS}")
    file = SafetensorsFile(path)
    check_names([_tensor(name, half) for name in names for half in _HALVES], file.keys(), str(path))
    parts: dict[str, tuple[LowRank, ...]] = {}
    for name in names:
        place, (rank, scale) = places[name], scales[name]
        down = _read(file, _tensor(name, "lora_A"), (rank, place.inputs))
        up = _read(file, _tensor(name, "lora_B"), (place.rows, rank))
        parts[place.module] = (*parts.get(place.module, ()), LowRank(name, place.begin, down, up, scale))
    return Lora(config, parts)


def save_lora(lora: Lora, directory: Path, *, base_model: str | None = None) -> None:
    """Write an adapter so that PEFT and `read_lora` read it. base_model: name of the model it is for."""
    parts = [part for group in lora.parts.values() for part in group]
    first, alphas = parts[0], {part.name: _whole(part.scale * part.rank) for part in parts}
    alpha = alphas[first.name]
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {_tensor(part.name, "lora_A"): part.down.cpu().contiguous() for part in parts}
    tensors |= {_tensor(part.name, "lora_B"): part.up.cpu().contiguous() for part in parts}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    write_json(
        directory / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": first.rank,
            "lora_alpha": alpha,
            "target_modules": [part.name for part in parts],
            "rank_pattern": {re.escape(part.name): part.rank for part in parts if part.rank != first.rank},
            "alpha_pattern": {re.escape(name): own for name, own in alphas.items() if own != alpha},
            "bias": "none",
            "inference_mode": True,
        },
    )


def _places(config: ModelConfig) -> dict[str, _Place]:
    """The foreign matrices that can be adapted. Raises CheckpointError when no family writes this architecture."""
    model, places = on_meta(lambda: Transformer(config)), {}
    for entry in family_of(config, "causal_lm").entries(config, "causal_lm"):
        module, _, leaf = entry.ours.rpartition(".")
        owner = module.rpartition(".")[0]
        if leaf != "weight" or not owner or not isinstance(model.get_submodule(owner), (Attention, FeedForward)):
            continue
        layer, begin = model.get_submodule(module), 0
        if not isinstance(entry.layout, Rows) or not isinstance(layer, nn.Linear):
            continue
        for name, (rows, inputs) in part_shapes(entry, layer.weight.shape):
            places[name.removesuffix(".weight")] = _Place(module, begin, rows, inputs)
            begin += rows
    return places


def _targets(raw: Raw, places: Mapping[str, _Place]) -> list[str]:
    """The matrices that a configuration adapts. Raises CheckpointError naming one that cannot be."""
    for key in ("target_modules", "exclude_modules"):
        raw.neutral(key)
    target, excluded = raw.values.get("target_modules"), raw.values.get("exclude_modules")
    if isinstance(target, list):
        known = sorted({name.rpartition(".")[2] for name in places})
        for name in target:
            if not isinstance(name, str) or not _named([name], places):
                raise CheckpointError(
                    f"{raw.where}: target_modules names {name!r}, which cannot be adapted here (these can: "
                    f"{', '.join(known)}).{closest(str(name), known)}"
                )
        names = _named(target, places)
    elif target == "all-linear":
        names = list(places)
    elif isinstance(target, str):
        names = _matching(raw, "target_modules", target, places)
    else:
        raise raw.refuse("target_modules")
    if isinstance(excluded, str):
        excluded = _matching(raw, "exclude_modules", excluded, places)
    elif not isinstance(excluded, list | None):
        raise raw.refuse("exclude_modules")
    without = set(_named(excluded or (), places))
    names = _of_layers(raw, [name for name in names if name not in without])
    if not names:
        raise CheckpointError(f"{raw.where}: target_modules = {target!r} names no matrix of this model")
    return names


def _named(wanted: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names that are given whole, or by their last parts."""
    return [name for name in names if any(name == one or name.endswith(f".{one}") for one in wanted)]


def _matching(raw: Raw, key: str, pattern: str, names: Iterable[str]) -> list[str]:
    try:
        return [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise CheckpointError(f"{raw.where}: {key} = {pattern!r} is no regular expression ({error})") from error


def _of_layers(raw: Raw, names: list[str]) -> list[str]:
    """Those in the layers that `layers_to_transform` counts, all without it."""
    raw.neutral("layers_to_transform", "layers_pattern")
    layers, pattern = raw.values.get("layers_to_transform"), raw.values.get("layers_pattern")
    if layers is None or layers == []:
        return names
    layers = layers if isinstance(layers, list) else [layers]
    if not all(type(layer) is int for layer in layers) or not isinstance(raw.values["target_modules"], list):
        raise raw.refuse("layers_to_transform")
    patterns = pattern if isinstance(pattern, list) else [pattern] if pattern else []
    numbers = {name: re.search(r"([^.]+)\.(\d+)\.", name) for name in names}
    return [
        name
        for name, found in numbers.items()
        if found is not None and int(found[2]) in layers and (not patterns or found[1] in patterns)
    ]


def _scales(raw: Raw, names: Sequence[str]) -> dict[str, tuple[int, float]]:
    """Rank and scale of each matrix."""
    rank, alpha = raw.need("r", int), raw.default("lora_alpha", 8.0)
    rooted = raw.default("use_rslora", False)
    ranks: dict[str, Any] = raw.default("rank_pattern", {})
    alphas: dict[str, Any] = raw.default("alpha_pattern", {})
    found: dict[str, tuple[int, float]] = {}
    for name in names:
        own, weight = _pattern(raw, ranks, name, rank), _pattern(raw, alphas, name, alpha)
        if type(own) is not int or own < 1:
            raise CheckpointError(f"{raw.where}: the rank of {name} must be a whole number above 0, got {own!r}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise CheckpointError(f"{raw.where}: the alpha of {name} must be a number, got {weight!r}")
        found[name] = own, weight / (math.sqrt(own) if rooted else own)
    return found


def _pattern(raw: Raw, patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """The value of the first pattern that a name ends with."""
    try:
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)
    except re.error as error:
        raise CheckpointError(f"{raw.where}: {list(patterns)} are no regular expressions ({error})") from error


def _refuse_others(raw: Raw) -> None:
    """Raise CheckpointError naming a key that would change what is computed in a way of its own."""
    raw.only("peft_type", "LORA")
    raw.only("task_type", "CAUSAL_LM")
    raw.only("bias", "none")
    raw.only("init_lora_weights", *_INITIAL)  # others change the weights that the adapter is added to
    for key in _REFUSED:
        raw.only(key, False, [], {})
    raw.neutral(*_NEUTRAL)


def _tensor(name: str, half: str) -> str:
    return f"{_PREFIX}{name}.{half}.weight"


def _read(file: SafetensorsFile, name: str, shape: tuple[int, int]) -> Tensor:
    tensor = file.read(name)
    check_tensor(name, tensor, shape, str(file.path))
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(f"{file.path}: tensor {name} has a value that is not a finite number")
    return tensor.to(torch.float32)


def _whole(value: float) -> float:
    """As an integer where it is one up to rounding, for that is what PEFT writes."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value

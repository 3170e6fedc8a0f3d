"""The whole plan of a run: what to train on how much, how long that takes, what it costs, and whether it fits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from gristmill import assets
from gristmill.errors import GristmillError, closest
from gristmill.model.accounting import matrix_parameters
from gristmill.model.config import ModelConfig
from gristmill.model.formats.header import read_header
from gristmill.model.formats.model_card import stacks
from gristmill.model.load import resolve
from gristmill.model.presets import ENCODER_DECODERS, PUBLISHED, Preset, preset, published
from gristmill.scale.budget import USEFUL_EPOCHS, Budget, Choice, Tier, choose, plan_budget
from gristmill.scale.compute import TOKENS_PER_PARAMETER, Allocation, compute_optimal, effective_tokens
from gristmill.scale.devices import MFU, Device, device
from gristmill.scale.laws import CHINCHILLA
from gristmill.scale.memory import (
    MemoryPlan,
    TrainingSettings,
    count_weights,
    serving_memory,
    training_flops,
    training_memory,
)
from gristmill.scale.shapes import shape_for
from gristmill.train.parallel.layout import Parallel


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What is known before a run. Without a model the limits choose its size; with one, they choose its tokens."""

    model: str = ""
    """A preset, a published model, or a checkpoint (its headers are read); empty lets the limits choose."""
    vocab_size: int = 32_768
    """Vocabulary of a model whose size the limits choose."""
    flops: float | None = None
    """Limit: operations of the whole training."""
    hours: float | None = None
    """Limit: hours on all devices of the layout together."""
    dollars: float | None = None
    """Limit: money for compute; needs `price`."""
    tokens: float | None = None
    """Limit: tokens to train on."""
    unique_tokens: float | None = None
    """Limit: different tokens at hand, each seen at most `epochs` times."""
    epochs: float = USEFUL_EPOCHS
    """Most passes over the same data."""
    tokens_per_parameter: float = TOKENS_PER_PARAMETER
    """The best ratio of tokens to parameters."""
    device: str = "h100"
    """h200, h100, a100-80gb, rtx-4090, laptop-cpu and others; how many of them is a matter of the layout."""
    peak_tflops: float | None = None
    """Of another device: its peak, 10^12 operations a second."""
    memory_gb: float | None = None
    """Of another device: its memory, 10^9 bytes."""
    mfu: float = MFU
    """Assumed share of the peak that the training reaches."""
    price: float | None = None
    """Dollars for an hour of one device."""
    tiers: tuple[Tier, ...] = ()
    """Data to buy, as a list of {name, dollars_per_1k, tokens, quality}; needs dollars, price and data_dollars."""
    data_dollars: float = 0.0
    """Money for data."""
    reserve_dollars: float = 0.0
    """Money kept for rehearsals on small sizes and for what goes wrong."""

    def __post_init__(self) -> None:
        optional = ("flops", "hours", "dollars", "tokens", "unique_tokens", "peak_tflops", "memory_gb", "price")
        for name in (*optional, "mfu", "tokens_per_parameter", "vocab_size"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise GristmillError(f"{name} must be a number above 0, got {value}")
        if self.mfu > 1:
            raise GristmillError(f"mfu is a share of the peak, at most 1, got {self.mfu}")
        if self.epochs < 1:
            raise GristmillError(f"epochs must be at least 1, got {self.epochs}")
        if self.dollars is not None and self.price is None:
            raise GristmillError("dollars buy device-hours: give price, in dollars for an hour of one device")
        if self.tiers and (self.dollars is None or self.model):
            why = "leave out the model: its size is chosen with the data" if self.model else "give dollars and price"
            raise GristmillError(f"tiers are planned together with the money for compute: {why}")
        if not self.tiers and (self.data_dollars or self.reserve_dollars):
            raise GristmillError("data_dollars and reserve_dollars belong to a plan with tiers of data to buy")

    @property
    def hardware(self) -> Device:
        """The device, with what was said of it. Raises GristmillError with the closest names."""
        if self.peak_tflops is not None and self.memory_gb is not None:
            return Device(self.device, self.peak_tflops * 1e12, self.memory_gb * 1e9, float("nan"))
        known = device(self.device)
        peak = known.flops if self.peak_tflops is None else self.peak_tflops * 1e12
        return dataclasses.replace(known, flops=peak, memory=(self.memory_gb or known.memory / 1e9) * 1e9)


def model_config(name: str) -> ModelConfig:
    """The architecture of a preset, a published model or a checkpoint. Raises GristmillError with the closest names,
    and for an encoder with a decoder."""
    if name in get_args(Preset):
        return preset(name)  # type: ignore[arg-type]
    if name in PUBLISHED:
        return published(name)
    names = [asset.name for asset in assets.known() if asset.kind == "model"]
    if name in ENCODER_DECODERS or not (Path(name).exists() or name in names):
        found = "is an encoder with a decoder, which is not planned" if name in ENCODER_DECODERS else "is not known"
        near = closest(name, [*get_args(Preset), *PUBLISHED, *names])
        raise GristmillError(f"model {name!r} {found}.{near} Give a preset, a published model or a checkpoint.")
    parts = stacks(read_header(resolve(name)))
    if len(parts) > 1:
        raise GristmillError(f"model {name!r} has {' and '.join(parts)}, which are not planned: give one stack")
    return next(iter(parts.values()))


def make_plan(
    request: PlanRequest, settings: TrainingSettings | None = None, layout: Parallel | None = None
) -> dict[str, Any]:
    """All figures of the plan by name, ready for JSON; sizes in bytes, times in seconds.

    Raises GristmillError for what does not fit together, and when neither a model nor a limit is given.
    """
    settings, layout = settings or TrainingSettings(), layout or Parallel()
    hardware = request.hardware
    config = model_config(request.model) if request.model else None
    speed = layout.processes * hardware.flops * request.mfu
    facts: dict[str, Any] = {}
    if request.tiers:
        choice = _bought(request, hardware, speed, facts)
    else:
        choice = _chosen(request, settings, speed, config, layout)
    if config is None:
        config = shape_for(choice.allocation.parameters, request.vocab_size, settings.sequence)
    allocation = choice.allocation
    memory = training_memory(config, settings, layout)
    flops = training_flops(config, settings, allocation.tokens)
    seconds = flops / speed
    optimal = compute_optimal(allocation.flops)
    step = settings.tokens * settings.micro_batches * layout.shares
    facts = {
        "model": request.model or "the nearest shape of the size chosen",
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "parameters": count_weights(config).total,
        "matrix_parameters": matrix_parameters(config),
        "planned_parameters": allocation.parameters,
        "tokens": allocation.tokens,
        "binding": choice.binding,
        "limits": {name: _pair(limit) for name, limit in choice.limits.items()},
        "steps": allocation.tokens / step,
        "tokens_per_step": step,
        "flops": flops,
        "flops_6nd": allocation.flops,
        "device": hardware.name,
        "devices": layout.processes,
        "mfu": request.mfu,
        "seconds": seconds,
        "device_hours": seconds * layout.processes / 3600,
        "dollars": None if request.price is None else seconds * layout.processes / 3600 * request.price,
        "chinchilla_loss": CHINCHILLA(allocation.parameters, allocation.tokens),
        "chinchilla_optimal": {**_pair(optimal), "loss": optimal.loss},
        "memory": memory.parts(),
        "peak": memory.peak,
        "moment": memory.moment,
        "device_memory": hardware.memory,
        "fits": memory.peak <= hardware.memory,
        "advice": [] if memory.peak <= hardware.memory else advice(config, settings, layout, hardware.memory),
        "serving": serving_memory(config, 1, min(settings.sequence, config.context)) if config.causal else {},
        **facts,
    }
    if request.unique_tokens is not None:
        facts["epochs"] = allocation.tokens / request.unique_tokens
        facts["effective_tokens"] = effective_tokens(request.unique_tokens, allocation.tokens)
    return facts


def advice(config: ModelConfig, settings: TrainingSettings, layout: Parallel, memory: float) -> list[str]:
    """Changes, each alone, with which the step would fit in `memory` bytes; more of them together when none does."""
    half = max(settings.sequence, settings.tokens // 2)
    halved = {"tokens": half, "micro_batches": settings.micro_batches * max(1, settings.tokens // half)}
    single: dict[str, dict[str, Any]] = {
        "--training.precision bfloat16": {"precision": "bfloat16"},
        "--training.checkpoint_activations": {"checkpoint_activations": True},
        f"--training.tokens {half} --training.micro_batches {halved['micro_batches']}": halved,
    }
    single = {
        option: change for option, change in single.items() if dataclasses.replace(settings, **change) != settings
    }
    least = dataclasses.replace(settings, **{key: value for change in single.values() for key, value in change.items()})

    def peak(settings: TrainingSettings, layout: Parallel) -> MemoryPlan:
        return training_memory(config, settings, layout)

    found = [
        option
        for option, change in single.items()
        if peak(dataclasses.replace(settings, **change), layout).peak <= memory
    ]
    if not found and peak(least, layout).peak <= memory:
        found = [" ".join(single)]
    for ways in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        wider = dataclasses.replace(layout, shard=layout.shard * ways)
        for these, options in ((settings, ""), (least, " ".join(["", *single]))):
            if peak(these, wider).peak <= memory:
                return [*found, f"--parallel.shard {wider.shard}{options}"]
    return found


def _bought(request: PlanRequest, hardware: Device, speed: float, facts: dict[str, Any]) -> Choice:
    """The size that the money for compute and data allows; what is bought goes into `facts`."""
    assert request.dollars is not None
    assert request.price is not None
    plan = plan_budget(
        Budget(
            compute_dollars=request.dollars,
            dollars_per_tflop_hour=request.price / (hardware.flops / 1e12 * request.mfu),
            data_dollars=request.data_dollars,
            tiers=request.tiers,
            reserve_dollars=request.reserve_dollars,
            hours=request.hours,
            tflops=None if request.hours is None else speed / 1e12,
            epochs=request.epochs,
            tokens_per_parameter=request.tokens_per_parameter,
        )
    )
    for name in ("flops", "tokens", "unique_tokens"):
        if getattr(request, name) is not None:
            raise GristmillError(
                f"{name} does not apply where data are bought by tiers; their tokens and money limit it"
            )
    facts["verdict"] = plan.verdict
    facts["mixture"] = plan.mixture
    facts["effective_tokens"] = plan.effective_tokens
    facts["stages"] = [{**_pair(stage.allocation), "dollars": stage.dollars} for stage in plan.stages]
    facts["data_dollars"], facts["compute_left"] = plan.data_dollars, plan.compute_left
    facts["reserve_left"] = plan.reserve_left
    return plan.choice


def _chosen(
    request: PlanRequest, settings: TrainingSettings, speed: float, config: ModelConfig | None, layout: Parallel
) -> Choice:
    compute = {}
    if request.flops is not None:
        compute["operations"] = request.flops
    if request.hours is not None:
        compute["time"] = request.hours * 3600 * speed
    if request.dollars is not None and request.price is not None:
        compute["money"] = request.dollars / request.price * 3600 * speed / layout.processes
    data = None if request.unique_tokens is None else request.unique_tokens * request.epochs
    if request.tokens is not None:
        data = request.tokens if data is None else min(data, request.tokens)
    if config is None:
        return choose(compute, data, tokens_per_parameter=request.tokens_per_parameter)
    size = matrix_parameters(config)
    if not compute and data is None:
        rule = Allocation(size, request.tokens_per_parameter * size)
        return Choice(rule, {"tokens per parameter": rule}, "tokens per parameter")
    return choose(compute, data, parameters=size, flops_per_token=training_flops(config, settings, 1))


def _pair(allocation: Allocation) -> dict[str, float]:
    return {"parameters": allocation.parameters, "tokens": allocation.tokens}

"""Into how many parts each thing is split: batches, weights, layers, tokens, experts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gristmill.errors import GristmillError
from gristmill.model.config import ModelConfig
from gristmill.train.config import TrainConfig

DIMENSIONS = ("pipeline", "data", "expert", "shard", "context", "tensor")
"""Dimensions of the mesh, outermost first: processes of neighbouring rank are of one tensor group, which talks most."""


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """A layout of processes; their number is the product of all sizes. Raises GristmillError for a size below 1.

    Processes that differ in data, expert or shard read different batches; those that differ in pipeline, context or
    tensor work on the same ones.
    """

    data: int | None = 1
    """Replicas of the weights, each with its own batches (DDP). None: as many as the processes allow."""
    shard: int = 1
    """Parts of every weight, gradient and optimiser state, gathered layer by layer where they are used (FSDP)."""
    tensor: int = 1
    """Parts of every matrix product: heads, feed-forward width, vocabulary."""
    sequence: bool = False
    """Split also what stands between the products of a tensor group, by tokens: less memory for activations."""
    context: int = 1
    """Parts of the tokens of a batch."""
    pipeline: int = 1
    """Groups of consecutive layers."""
    expert: int = 1
    """Parts of the experts of a mixture. Everything else is replicated over them, as over `data`."""

    def __post_init__(self) -> None:
        for name in DIMENSIONS:
            size = getattr(self, name)
            if not (name == "data" and size is None) and (not isinstance(size, int) or size < 1):
                raise GristmillError(f"parallel.{name} must be a whole number of at least 1, got {size!r}")
        if self.sequence and self.tensor == 1:
            raise GristmillError("parallel.sequence splits the work of a tensor group: set parallel.tensor above 1")
        if self.expert > 1 and max(self.shard, self.tensor) > 1:
            raise GristmillError("parallel.expert does not go together with parallel.shard or parallel.tensor")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes in the order of DIMENSIONS; `data` must be known."""
        assert self.data is not None, "resolve() the layout first"
        return tuple(getattr(self, name) for name in DIMENSIONS)

    @property
    def processes(self) -> int:
        """Processes in all."""
        return math.prod(self.sizes)

    @property
    def shares(self) -> int:
        """Into how many shares the batches of a step are dealt."""
        return math.prod((self.data or 1, self.expert, self.shard))

    @property
    def splits_weights(self) -> bool:
        """Whether a process holds a part of the weights only."""
        return max(self.shard, self.tensor, self.pipeline, self.expert) > 1

    def resolve(self, processes: int) -> Parallel:
        """The layout on so many processes, `data` filled in. Raises GristmillError when they do not fit."""
        others = math.prod(replace(self, data=1).sizes)
        layout = replace(self, data=processes // others) if self.data is None else self
        if processes != others * (layout.data or 0) or processes < 1:
            told = " x ".join(f"{name} {getattr(self, name)}" for name in DIMENSIONS if getattr(self, name) != 1)
            raise GristmillError(
                f"the layout ({told or 'one process'}) does not fit {processes} processes: the product of the sizes "
                "must be their number; leave data empty to let it take the rest"
            )
        return layout

    def check_model(self, config: ModelConfig) -> None:
        """Raise GristmillError, naming the sizes, when a model cannot be split so."""
        if self.tensor > 1:
            _check_tensor(self.tensor, config)
        moe = config.feed_forward.moe
        if self.expert > 1 and moe is None:
            raise GristmillError(f"parallel.expert is {self.expert}, but the model has no mixture of experts")
        if moe is not None:
            _divides("expert", self.expert, "moe.num_experts", moe.num_experts)
        if self.pipeline > config.num_hidden_layers:
            raise GristmillError(
                f"parallel.pipeline ({self.pipeline}) is more than the model's {config.num_hidden_layers} layers"
            )

    def check_run(self, config: TrainConfig) -> None:
        """Raise GristmillError for options of a run that this layout cannot honour."""
        if config.optimiser in ("muon", "adafactor") and self.splits_weights:
            raise GristmillError(
                f"optimiser {config.optimiser} works on whole matrices, and this layout splits them: use adamw, lion "
                "or sgd, or data parallelism alone"
            )
        if config.precision == "float16" and self.splits_weights:
            raise GristmillError(
                "precision float16 skips a step on the process that overflows, and this layout splits the weights: "
                "use bfloat16"
            )


def _check_tensor(parts: int, config: ModelConfig) -> None:
    _divides("tensor", parts, "num_attention_heads", config.num_attention_heads)
    _divides("tensor", parts, "num_key_value_heads", config.num_key_value_heads)
    _divides("tensor", parts, "intermediate_size", config.intermediate_size)
    unfit = {
        "a mixture of experts (use parallel.expert)": config.feed_forward.moe is not None,
        "latent attention": config.attention.latent is not None,
        "norms over the full projection (attention.qk_norm 'full')": config.attention.qk_norm == "full",
        "a learned or fixed bias per head (positions.bias)": config.positions.bias is not None,
        "cross-attention": config.cross_attention,
        "recurrent layers": any(layer.mixer != "attention" for layer in config.layers),
    }
    for what, found in unfit.items():
        if found:
            raise GristmillError(f"parallel.tensor does not split models with {what}; use parallel.shard")


def _divides(dimension: str, parts: int, name: str, size: int) -> None:
    if size % parts:
        raise GristmillError(f"parallel.{dimension} ({parts}) must divide {name} ({size})")

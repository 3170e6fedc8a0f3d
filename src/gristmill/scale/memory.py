"""Peak memory of a training step on one device, by part, before anything is allocated.

A step has three tall moments: the loss (all activations stand, and the gradients of the output head are being made),
the end of the backward pass (all gradients stand), and the optimiser. What stands through all of them is added to the
tallest. The activations are counted as this package's layers keep them for the backward pass.

Source: Korthikanti et al. 2023, section 4 (activations by part); Rajbhandari et al. 2020 (sharded states).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from gristmill.errors import GristmillError, closest
from gristmill.model.accounting import flops_per_token, kv_bytes, state_bytes
from gristmill.model.config import ModelConfig
from gristmill.train.optimisers import OptimiserName
from gristmill.train.parallel.layout import Parallel
from gristmill.train.precision import PrecisionName

_CHUNK_ROWS, _CHUNK_BYTES, _CACHE_BYTES = 1024, 1 << 28, 1 << 24  # those of gristmill.objectives.cross_entropy
ONE_PROCESS = Parallel()
_FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What of a training run decides its memory and compute. Raises GristmillError naming a value out of range."""

    tokens: int = 8192
    """Tokens of one micro-batch, on one data-parallel replica."""
    sequence: int = 1024
    """Tokens of one sequence: as far as attention reaches."""
    micro_batches: int = 1
    """Micro-batches whose gradients make one step."""
    precision: PrecisionName = "float32"
    """bfloat16 and float16 compute products and keep activations in 16 bits while weights and optimiser stay float32;
    pure_bfloat16 has everything in 16 bits."""
    optimiser: OptimiserName = "adamw"
    """adamw keeps two values a weight, muon one for the matrices of the blocks, lion one, adafactor few,
    sgd (without momentum) none."""
    average: bool = False
    """Keep a moving average of the weights."""
    checkpoint_activations: bool = False
    """Keep only the input of each block and compute the rest again."""
    loss: Literal["chunked", "whole"] = "chunked"
    """whole holds the logits of all tokens at once."""
    attention: Literal["tiled", "naive"] = "tiled"
    """naive holds a matrix of tokens by tokens for each head."""
    device: Literal["gpu", "cpu"] = "gpu"
    """On a CPU attention computes in float32 and the norm keeps one copy more."""

    def __post_init__(self) -> None:
        for name in ("tokens", "sequence", "micro_batches"):
            if getattr(self, name) < 1:
                raise GristmillError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sequence > self.tokens:
            raise GristmillError(f"sequence ({self.sequence}) must be at most tokens ({self.tokens}) of a micro-batch")
        for name, kinds in (("precision", PrecisionName), ("optimiser", OptimiserName)):
            value, known = getattr(self, name), get_args(kinds)
            if value not in known:
                raise GristmillError(f"{name} must be one of {', '.join(known)}, got {value!r}.{closest(value, known)}")


@dataclass(frozen=True)
class WeightCounts:
    """Weights by where they live. A tied output head counts in `embedding` alone; `matrices` are those of the blocks,
    experts included; `widest` is the largest matrix and `factored` what adafactor keeps for all."""

    embedding: int
    head: int
    blocks: int
    experts: int
    matrices: int
    widest: int
    factored: int

    @property
    def total(self) -> int:
        """All weights."""
        return self.embedding + self.head + self.blocks


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the fullest device. All parts at once would be more than the `peak`, which is that of one `moment`."""

    weights: int
    gradients: int
    optimiser: int
    average: int
    activations: int
    logits: int
    workspace: int
    moment: Literal["loss", "backward", "optimiser"]
    peak: int

    def parts(self) -> dict[str, int]:
        """Each part by name, at its own largest."""
        names = ("weights", "gradients", "optimiser", "average", "activations", "logits", "workspace")
        return {name: getattr(self, name) for name in names}


def count_weights(config: ModelConfig) -> WeightCounts:
    """Count the weights of a decoder or encoder by building it without memory."""
    import torch

    from gristmill.model.encoder import Encoder
    from gristmill.model.transformer import Transformer

    with torch.device("meta"):
        model = Transformer(config) if config.causal else Encoder(config)
    found = dict.fromkeys(("embedding", "head", "blocks", "experts", "matrices", "widest", "factored"), 0)
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        place = "blocks" if name.startswith("layers.") else "head" if name.startswith("lm_head") else "embedding"
        found[place] += size
        found["experts"] += size * (parameter.ndim == 3)  # all experts of a layer in one
        if parameter.ndim >= 2:
            found["matrices"] += size * (place == "blocks")
            found["widest"] = max(found["widest"], parameter.shape[-1] * parameter.shape[-2])
            found["factored"] += size // parameter.shape[-1] + size // parameter.shape[-2]
        else:
            found["factored"] += size
    return WeightCounts(**found)


def training_memory(
    config: ModelConfig, settings: TrainingSettings = TrainingSettings(), layout: Parallel = ONE_PROCESS
) -> MemoryPlan:
    """Peak memory of one training step of next-token prediction on the fullest device of a layout.

    Raises GristmillError for a layout that does not fit the model, recurrent layers or cross-attention (what those keep
    for the backward pass is not counted here).
    """
    layout.check_model(config)
    counts = count_weights(config)
    stored = _on_device(counts, layout)
    wide = _wide(settings)
    weights = wide * math.ceil(stored / layout.shard)
    optimiser = wide * math.ceil(_optimiser_values(counts, settings.optimiser) * stored / counts.total / layout.shard)
    average = weights * settings.average
    gathered = _gathered(config, counts, settings, layout)
    tokens = math.ceil(settings.tokens / (layout.context * layout.tensor))
    layer_bytes, block_input = _layer_bytes(config, settings), wide * config.hidden_size
    here = math.ceil(config.num_hidden_layers / layout.pipeline)
    in_flight = min(layout.pipeline, settings.micro_batches) * here
    if layout.tensor > 1 and not layout.sequence:  # what stands between the products is whole on each process
        between = 2 * _norm_bytes(config, settings) + 2 * block_input
        layer_bytes += (layout.tensor - 1) * between
        block_input *= layout.tensor
    ends = tokens * (_norm_bytes(config, settings) + 16)  # final norm, token ids and positions
    kept = block_input if settings.checkpoint_activations else layer_bytes
    activations = math.ceil(in_flight * tokens * kept + ends + gathered)
    again = tokens * layer_bytes * settings.checkpoint_activations
    work = math.ceil(again + tokens * _layer_work(config, settings))
    logits, head_gradient = _loss_bytes(config, settings, layout, tokens)
    held = weights if settings.micro_batches > 1 else 0  # gradients of the micro-batches before
    moments: dict[Literal["loss", "backward", "optimiser"], int] = {
        "loss": activations + held + max(logits, head_gradient + work),
        "backward": weights
        + max(_embedding_gradient(config, settings, layout), work + math.ceil(tokens * kept) if here else 0),
        "optimiser": weights + _step_work(counts, settings, layout),
    }
    moment = max(moments, key=lambda name: moments[name])
    return MemoryPlan(
        weights=weights,
        gradients=weights,
        optimiser=optimiser,
        average=average,
        activations=activations,
        logits=logits,
        workspace=max(work, head_gradient),
        moment=moment,
        peak=weights + optimiser + average + moments[moment],
    )


def serving_memory(config: ModelConfig, sequences: int, context: int, *, bytes_per_value: int = 2) -> dict[str, int]:
    """Bytes of weights, of keys and values of so many sequences of `context` tokens, and of recurrent states."""
    return {
        "weights": count_weights(config).total * bytes_per_value,
        "keys and values": sequences * kv_bytes(config, context, bytes_per_value),
        "states": sequences * state_bytes(config, bytes_per_value),
    }


def attention_memory(
    config: ModelConfig, sequences: int, length: int, *, bytes_per_value: int = 2, tiled: bool = True
) -> dict[str, int]:
    """Bytes of one layer's queries, keys and values together, and of all heads' matrices of length by length.

    Tiled attention never holds the matrices. Source: Dao et al. 2022, theorem 1.
    """
    values = sequences * length * (config.query_size + 2 * config.key_value_size)
    matrices = 0 if tiled else sequences * config.num_attention_heads * length**2
    return {"queries, keys and values": values * bytes_per_value, "matrices": matrices * bytes_per_value}


def training_flops(config: ModelConfig, settings: TrainingSettings, tokens: float) -> float:
    """Operations of training on `tokens`: products of the forward and backward pass, as they are computed.

    Naive attention computes all of its matrix; tiled attention leaves out what a causal model masks. Computing
    activations again costs one forward pass more.
    """
    halved = settings.attention == "tiled" and config.causal
    seen = (settings.sequence + 1) / 2 if halved else settings.sequence
    passes = 4 / 3 if settings.checkpoint_activations else 1.0
    return passes * flops_per_token(config, seen, training=True) * tokens


def _value(settings: TrainingSettings) -> int:
    return 4 if settings.precision == "float32" else 2


def _wide(settings: TrainingSettings) -> int:
    """Bytes of what stays wide under autocast: weights, gradients, the residual stream."""
    return 2 if settings.precision == "pure_bfloat16" else _FLOAT


def _own(settings: TrainingSettings) -> int:
    """Bytes of what attention reads: under autocast a CPU computes it in float32."""
    return _wide(settings) if settings.device == "cpu" else _value(settings)


def _on_device(counts: WeightCounts, layout: Parallel) -> int:
    """Weights on the fullest device before sharding. Stages hold the embedding or the head, a tied one both."""
    ends = counts.embedding + counts.head
    if layout.pipeline > 1:
        ends = max(counts.embedding, counts.head)
    blocks = counts.blocks - counts.experts + counts.experts / layout.expert
    return math.ceil((blocks / layout.pipeline + ends) / layout.tensor)


def _optimiser_values(counts: WeightCounts, optimiser: OptimiserName) -> int:
    return {
        "adamw": 2 * counts.total,
        "muon": counts.matrices + 2 * (counts.total - counts.matrices),
        "lion": counts.total,
        "adafactor": counts.factored,
        "sgd": 0,
    }[optimiser]


def _step_work(counts: WeightCounts, settings: TrainingSettings, layout: Parallel) -> int:
    """Copies of the widest matrix that an update makes; the fused AdamW makes none."""
    copies = {"adamw": 0, "muon": 4, "lion": 1, "adafactor": 2, "sgd": 0}[settings.optimiser]
    return math.ceil(copies * _wide(settings) * counts.widest / (layout.tensor * layout.shard))


def _gathered(config: ModelConfig, counts: WeightCounts, settings: TrainingSettings, layout: Parallel) -> float:
    """Weights in the form products read: of the layers at work when they are sharded, else cast ones of all layers."""
    value = _value(settings)
    if layout.shard == 1:
        return 0.0 if value == _wide(settings) else value * counts.matrices / (layout.tensor * layout.pipeline)
    layer = counts.blocks / config.num_hidden_layers
    root = max(counts.embedding, counts.head) if layout.pipeline > 1 else counts.embedding + counts.head
    return value * (3 * layer + root) / layout.tensor  # a layer, the next one fetched ahead, and a layer's gradients


def _norm_bytes(config: ModelConfig, settings: TrainingSettings) -> float:
    """Per token, of one norm: its input, what it normalised (an RMS norm on a CPU), and its output in products."""
    inner = 2 * _FLOAT if config.norm.kind == "rms" and settings.device == "cpu" else _wide(settings)
    return config.hidden_size * (inner + _value(settings)) + 2 * _FLOAT


def _layer_bytes(config: ModelConfig, settings: TrainingSettings) -> float:
    """Per token, what one layer keeps for the backward pass, averaged over layers."""
    layers = [config.layer(index) for index in range(config.num_hidden_layers)]
    odd = {layer.mixer for layer in layers} - {"attention"}
    if odd or config.cross_attention:
        what = "cross-attention" if config.cross_attention else f"{', '.join(sorted(odd))} layers"
        raise GristmillError(f"training memory is not counted for {what}; plan a decoder or encoder of plain attention")
    norms = 4 if config.norm.placement == "sandwich" else 1 if config.parallel == "one_norm" else 2
    sparse = sum(layer.sparse for layer in layers) / len(layers) if config.feed_forward.moe is not None else 0.0
    forward = (1 - sparse) * _feed_forward_bytes(config, settings, config.intermediate_size)
    if config.feed_forward.moe is not None:
        moe = config.feed_forward.moe
        inner = moe.top_k * moe.intermediate_size + moe.shared_intermediate_size
        rows = 2 * moe.top_k * config.hidden_size * _value(settings)  # gathered for the experts, and what they return
        forward += sparse * (_feed_forward_bytes(config, settings, inner) + rows + 2 * _FLOAT * moe.num_experts)
    return norms * _norm_bytes(config, settings) + _attention_bytes(config, settings) + forward


def _attention_bytes(config: ModelConfig, settings: TrainingSettings) -> float:
    """Queries, keys, values and outputs as the kernel reads them; grouped keys and values are laid out per head."""
    value, latent, heads = _value(settings), config.attention.latent, config.num_attention_heads
    own = _own(settings)
    softmax = heads * (settings.sequence * own if settings.attention == "naive" else _FLOAT)
    if latent is not None:
        wide = heads * (2 * (latent.nope_dim + latent.rope_dim) + 2 * latent.value_dim)
        compressed = (latent.kv_rank + latent.rope_dim + (latent.q_rank or 0)) * (_wide(settings) + value)
        return wide * own + compressed + softmax
    query, key = config.query_size, config.key_value_size
    grouped, rotated = query != key, config.positions.rope is not None
    kept = own * (query + (key if settings.device == "cpu" else 0) + 2 * query) if grouped else own * (query + 2 * key)
    if rotated and not grouped:
        kept += own * (query + key)  # values are a part of the projection, which stays whole beside the rotated copy
    if config.attention.qk_norm is not None:
        kept += value * (query + 2 * key) + _wide(settings) * (query + key)
    cast = value * query if own != value else 0  # the output once more, as the last projection reads it
    return kept + own * query + cast + softmax


def _feed_forward_bytes(config: ModelConfig, settings: TrainingSettings, inner: int) -> float:
    copies = 4 if config.feed_forward.gated else 1 if config.feed_forward.activation == "relu" else 2
    return copies * inner * _value(settings)


def _layer_work(config: ModelConfig, settings: TrainingSettings) -> float:
    """Per token, gradients that stand while the feed-forward layer, the first of a block to go, is gone back through;
    or attention's matrices, when those are whole."""
    moe = config.feed_forward.moe
    inner = config.intermediate_size if moe is None else moe.top_k * moe.intermediate_size
    work: float = (2 if config.feed_forward.gated else 1) * inner * _value(settings) + _wide(
        settings
    ) * config.hidden_size
    if settings.attention == "naive":
        matrices = 2 * config.num_attention_heads * settings.sequence * _own(settings)
        work = max(work, matrices - _feed_forward_bytes(config, settings, inner))
    return work


def _loss_bytes(config: ModelConfig, settings: TrainingSettings, layout: Parallel, tokens: int) -> tuple[int, int]:
    """While the loss is computed: logits and the gradients made with them; and afterwards: the head's gradient."""
    if not config.causal:
        return 0, 0  # an encoder's head is no part of its configuration
    value, vocabulary = _value(settings), math.ceil(config.vocab_size / layout.tensor)
    tokens *= layout.tensor  # the head reads all tokens of the tensor-parallel group
    head, states = vocabulary * config.hidden_size, 2 * _wide(settings) * tokens * config.hidden_size
    capped = 2 if config.logit_softcap is not None else 0  # the cap's input and output
    if settings.loss == "whole":
        return (3 + capped) * _FLOAT * tokens * vocabulary, _wide(settings) * head
    rows = min(tokens, _CHUNK_ROWS, max(1, _CHUNK_BYTES // (_FLOAT * config.vocab_size)))
    at_once = min(rows, max(16, _CACHE_BYTES // (_FLOAT * vocabulary) // 16 * 16))
    wide = (value != _FLOAT) + capped  # float32 copies of what is exponentiated at once
    chunk = vocabulary * (rows * value + at_once * wide * _FLOAT)
    cast = 0 if value == _FLOAT else (2 if _wide(settings) == _FLOAT else 1) * value * head
    return chunk + states + _FLOAT * head + cast, _FLOAT * head


def _embedding_gradient(config: ModelConfig, settings: TrainingSettings, layout: Parallel) -> int:
    """A tied embedding's gradient stands beside the head's until the two are added."""
    tied = config.causal and config.tie_word_embeddings
    return _wide(settings) * config.vocab_size * config.hidden_size // layout.tensor * tied

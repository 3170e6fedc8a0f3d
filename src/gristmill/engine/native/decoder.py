"""A `Transformer` as kernels/stack.cpp wants it: sizes, packed weights and norms, read from the model's own modules."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from gristmill.engine.native import build
from gristmill.engine.native.linear import Int8Only, Kind, LinearStruct, NativeLinear, allocate, of_kind, packed_bytes
from gristmill.model.attention.layer import Attention
from gristmill.model.block import Block
from gristmill.model.config import ModelConfig
from gristmill.model.feedforward import FeedForward
from gristmill.model.int8 import Int8Linear
from gristmill.model.norm import RMSNorm
from gristmill.model.quantised.linear import Int4Linear, Int8WeightLinear, QuantisedLinear, weight_of
from gristmill.model.quantised.weights import Weight
from gristmill.model.transformer import Transformer

KV_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
"""In the order of `CacheKind` of kernels/attention.h."""
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
_ROTARY = {"global": 0, "local": 1, "none": -1}
_KNOWN = (nn.Linear, NativeLinear, Int8Linear, Int8WeightLinear, Int4Linear)
_MOST_DIM = 512
_ROOM = 64 << 20
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class LayerStruct(ctypes.Structure):
    """`Layer` of kernels/stack.cpp."""

    _fields_ = (
        *((name, LinearStruct) for name in ("qkv", "output", "gate_up", "down")),
        *((name, _POINTER) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, _INT) for name in ("place", "window", "rotary", "unused")),
    )


class DecoderStruct(ctypes.Structure):
    """`Decoder` of kernels/stack.cpp."""

    _fields_ = (
        *((name, _INT) for name in ("hidden", "heads", "kv_heads", "head_dim", "inner", "vocab", "layer_count")),
        *((name, _INT) for name in ("activation", "block_size", "cache_kind")),
        ("rotary_dim", _INT * 2),
        *((name, _FLOAT) for name in ("eps", "factor", "logit_scale", "logit_softcap")),
        ("slots", _LONG),
        *(
            (name, _POINTER)
            for name in ("layers", "head", "final_norm", "keys", "values", "key_scales", "value_scales")
        ),
    )


def native_refusal(model: Transformer) -> str | None:
    """Why the native runner cannot compute this model here; None when it can."""
    config = model.config
    attention, norm, inner = config.attention, config.norm, config.feed_forward
    entries = [config.layer(index) for index in range(config.num_hidden_layers)]
    ropes = [rope for rope in (config.positions.rope, config.positions.local_rope) if rope is not None]
    checks = (
        (type(model) is not Transformer or not config.causal or config.cross_attention, "it is no decoder of its own"),
        (norm.kind != "rms" or norm.placement != "pre", f"norm.kind {norm.kind!r}, norm.placement {norm.placement!r}"),
        (config.parallel is not None, f"parallel {config.parallel!r}"),
        (attention.latent is not None, "attention.latent"),
        (attention.softcap is not None, "attention.softcap"),
        (attention.sinks, "attention.sinks"),
        (attention.qk_norm == "full", "attention.qk_norm 'full'"),
        (inner.moe is not None, "feed_forward.moe"),
        (not inner.gated, "feed_forward.gated off"),
        (inner.activation not in _ACTIVATIONS, f"feed_forward.activation {inner.activation!r}"),
        (config.positions.bias is not None, f"positions.bias {config.positions.bias!r}"),
        (any(rope.interleaved for rope in ropes), "positions.rope.interleaved"),
        (config.head_dim > _MOST_DIM, f"head_dim {config.head_dim}, over {_MOST_DIM}"),
        (any(entry.mixer != "attention" for entry in entries), "layers.mixer other than 'attention'"),
        (any(entry.pattern is not None for entry in entries), "layers.pattern"),
        (any((entry.keys_from, entry.scores_from) != (None, None) for entry in entries), "layers.keys_from"),
    )
    for refused, what in checks:
        if refused:
            return f"the native runner does not know this architecture: {what}"
    if model.embed_tokens.weight.device.type != "cpu" if isinstance(model.embed_tokens, nn.Embedding) else False:
        return f"the native runner computes on the CPU, and the model is on {model.embed_tokens.weight.device}"
    for name, layer in _linears(model):
        if type(layer) not in _KNOWN:
            return f"the native runner cannot read {name}, a {type(layer).__name__}"
    missing = build.native_refusal()
    return None if missing is None else f"there are no native kernels: {missing}"


def make_stores(config: ModelConfig, slots: int, dtype: torch.dtype) -> list[Tensor]:
    """Keys and values (places, slots, kv_heads, head_dim), and for int8 their scales (places, slots, kv_heads, 1)."""
    shape = (max(config.cache_slots) + 1, slots, config.num_key_value_heads)
    kinds = [(config.head_dim, dtype)] * 2 + [(1, torch.float32)] * (2 if dtype == torch.int8 else 0)
    # not zeroed: memory is touched only when a block is first used. Huge pages: a sequence's blocks lie far apart from
    # layer to layer, and looking up small pages took longer than reading them
    return [allocate(math.prod(shape) * width * of.itemsize).view(of).view(*shape, width) for width, of in kinds]


def plain_embedding(model: Transformer) -> Tensor | None:
    """The embedding's float32 matrix where a token's row is all that the first layer reads."""
    entry, config = model.embed_tokens, model.config
    added = config.positions.absolute is not None or config.embedding.token_types or config.embedding.scale is not None
    if type(entry) is not nn.Embedding or entry.weight.dtype != torch.float32 or added:
        return None
    plain = isinstance(model.embed_norm, nn.Identity) and not hasattr(model, "embed_proj")
    return entry.weight.detach() if plain else None


@dataclass
class NativeDecoder:
    """The structs of a model, and all memory that they point into but the cache."""

    struct: DecoderStruct
    held: list[object] = field(default_factory=list)
    weight_bytes: int = 0
    """Of packed weights, what a step for one token reads."""


def describe(
    model: Transformer, kind: Kind, group_size: int, stores: list[Tensor], block_size: int, release: bool
) -> NativeDecoder:
    """Pack a model's weights, layer by layer. See `NativeRunner` for the arguments."""
    config = model.config
    packing = _Packing(kind, group_size, release)
    blocks = [packing.block(cast(Block, block)) for block in model.layers]
    layers = (LayerStruct * config.num_hidden_layers)()
    for index, (source, place) in enumerate(zip(model.order, config.cache_slots, strict=True)):
        layers[index] = blocks[source]
        entry = config.layer(index)
        rope = {"global": config.positions.rope, "local": config.positions.local_rope, "none": None}[entry.rotary]
        layers[index].place, layers[index].window = place, entry.window or 0
        layers[index].rotary = -1 if rope is None else _ROTARY[entry.rotary]
    head = packing.linear(model, "lm_head", head=True)
    pointers = [store.data_ptr() for store in stores] + [None] * (4 - len(stores))
    struct = DecoderStruct(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        inner=config.intermediate_size,
        vocab=config.vocab_size,
        layer_count=config.num_hidden_layers,
        activation=_ACTIVATIONS.index(config.feed_forward.activation),
        block_size=block_size,
        cache_kind=KV_DTYPES.index(stores[0].dtype),
        eps=config.norm.eps,
        factor=config.attention.scale or config.head_dim**-0.5,
        logit_scale=1.0 if config.logit_scale is None else config.logit_scale,
        logit_softcap=config.logit_softcap or 0.0,
        slots=stores[0].shape[1],
        layers=ctypes.addressof(layers),
        head=ctypes.addressof(head),
        final_norm=packing.norm(model.norm),
        keys=pointers[0],
        values=pointers[1],
        key_scales=pointers[2],
        value_scales=pointers[3],
    )
    for place, rope in enumerate((config.positions.rope, config.positions.local_rope)):
        struct.rotary_dim[place] = 0 if rope is None else rope.dim or config.head_dim
    return NativeDecoder(struct, [layers, head, *packing.held], packing.bytes)


class _Packing:
    def __init__(self, kind: Kind, group_size: int, release: bool) -> None:
        self.kind, self.group_size, self.release = kind, group_size, release
        self.held: list[object] = []
        self.bytes = 0
        self.room = torch.empty(0, dtype=torch.uint8)

    def block(self, block: Block) -> LayerStruct:
        attention, mlp = cast(Attention, block.self_attn), cast(FeedForward, block.mlp)
        return LayerStruct(
            qkv=self.linear(attention, "qkv_proj"),
            output=self.linear(attention, "o_proj"),
            gate_up=self.linear(mlp, "gate_up_proj"),
            down=self.linear(mlp, "down_proj"),
            attention_norm=self.norm(block.attention_norm),
            mlp_norm=self.norm(block.feedforward_norm),
            query_norm=self.norm(attention.q_norm),
            key_norm=self.norm(attention.k_norm),
        )

    def linear(self, owner: nn.Module, name: str, *, head: bool = False) -> LinearStruct:
        """A packed layer; with `release` it takes the place of the model's."""
        layer = getattr(owner, name)
        if isinstance(layer, nn.Linear):
            kind = self.kind
            if kind == "int4" and (head or layer.in_features % self.group_size):
                kind = "int8"
            packed = self.packed(of_kind(layer.weight, kind, self.group_size), layer.bias)
        else:
            packed = layer if isinstance(layer, NativeLinear) else self.packed(self.quantised(layer), layer.bias)
        if self.release:
            setattr(owner, name, packed)
        self.held.append(packed)
        self.bytes += packed.packed.memory.nbytes
        return packed.packed.struct

    def quantised(self, layer: QuantisedLinear) -> Weight:
        """The matrix of a layer, of the type that says whether activations are rounded: with int4 they all are."""
        weight = weight_of(layer)
        if isinstance(layer, Int8WeightLinear) and self.kind != "int4":
            return Int8Only(layer.quantised, layer.scale)
        return weight

    def packed(self, weight: Tensor | Weight, bias: Tensor | None) -> NativeLinear:
        """Side by side in huge pages: memory of a layer's own would be in small ones, which read at half the speed."""
        size = packed_bytes(weight, bias)
        if size > len(self.room):
            self.room = allocate(max(size, _ROOM))
        memory, self.room = self.room[:size], self.room[size:]
        return NativeLinear(weight, bias, memory)

    def norm(self, norm: nn.Module | None) -> int | None:
        """Where the factors of a norm are, in float32; None without a norm."""
        if not isinstance(norm, RMSNorm):
            return None
        weight = norm.weight.detach().float() + (1.0 if norm.unit_offset else 0.0)
        self.held.append(weight)
        return weight.data_ptr()


def _linears(model: Transformer) -> list[tuple[str, nn.Module]]:
    names = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    found = [f"layers.{index}.{name}" for index in range(len(model.layers)) for name in names]
    return [(name, model.get_submodule(name)) for name in (*found, "lm_head")]

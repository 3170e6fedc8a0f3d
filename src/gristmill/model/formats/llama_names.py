"""Where each weight of the Llama family stands in foreign checkpoints.

Our module fuses query, key and value into one matrix and gate and up into another; `fuse` and `split` translate
between that and one matrix per projection, under Hugging Face names.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gristmill.errors import CheckpointError
from gristmill.model.config import ModelConfig
from gristmill.model.formats.state import check_names, check_tensor

# our matrix in a layer: the Hugging Face matrices whose rows it stacks, in order
_LAYER = {
    "input_layernorm": ("input_layernorm",),
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "post_attention_layernorm": ("post_attention_layernorm",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}

# GGUF name of a layer's weight: its Hugging Face name
GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def table(config: ModelConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Our parameter name -> the Hugging Face tensors stacked in it, with their shapes."""
    hidden, ffn, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (vocabulary, hidden),
        "lm_head": (vocabulary, hidden),
        "q_proj": (config.query_size, hidden),
        "k_proj": (config.key_value_size, hidden),
        "v_proj": (config.key_value_size, hidden),
        "o_proj": (hidden, config.query_size),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
    }
    names: dict[str, tuple[str, ...]] = {"embed_tokens": ("model.embed_tokens",), "norm": ("model.norm",)}
    if not config.tie_word_embeddings:
        names["lm_head"] = ("lm_head",)
    for layer in range(config.num_hidden_layers):
        for ours, theirs in _LAYER.items():
            names[f"layers.{layer}.{ours}"] = tuple(f"model.layers.{layer}.{name}" for name in theirs)
    return {
        f"{ours}.weight": {f"{name}.weight": shapes.get(name.rpartition(".")[2], (hidden,)) for name in theirs}
        for ours, theirs in names.items()
    }


def fuse(tensors: Mapping[str, Tensor], config: ModelConfig, where: str) -> dict[str, Tensor]:
    """Hugging Face tensors -> our state, in memory of its own.

    Raises CheckpointError naming missing and surplus tensors, and one of another shape or type.
    """
    if config.num_hidden_layers > len(tensors):  # said before any memory is spent on such a model
        raise CheckpointError(f"{where}: {config.num_hidden_layers} layers, but only {len(tensors)} tensors")
    parts = table(config)
    wanted = {name for shapes in parts.values() for name in shapes}
    found = set(tensors)
    if config.tie_word_embeddings and "lm_head.weight" in found:
        # some writers store the tied head once more; it must then be the same matrix
        found.remove("lm_head.weight")
        if not torch.equal(tensors["lm_head.weight"], tensors.get("model.embed_tokens.weight", torch.empty(0))):
            raise CheckpointError(f"{where}: lm_head.weight differs from the embedding, yet tie_word_embeddings is on")
    check_names(wanted, found, where)

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = tensors[name]
        check_tensor(name, tensor, shape, where)
        return tensor

    return {ours: torch.cat([read(*part) for part in shapes.items()]) for ours, shapes in parts.items()}


def split(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our state -> Hugging Face tensors, contiguous."""
    out: dict[str, Tensor] = {}
    for ours, shapes in table(config).items():
        pieces = state[ours].split([shape[0] for shape in shapes.values()])
        out.update({name: piece.contiguous() for name, piece in zip(shapes, pieces, strict=True)})
    return out

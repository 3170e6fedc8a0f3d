"""Where each weight of the Llama family stands in foreign checkpoints.

Our module fuses query, key and value into one matrix and gate and up into another; `fuse` and `split` translate
between that and one matrix per projection, under Hugging Face names.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gristmill.errors import CheckpointError
from gristmill.model.config import ModelConfig
from gristmill.model.formats.state import check_names

# our fused matrix: the Hugging Face matrices whose rows it stacks, in order
_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
_SAME = ("input_layernorm", "post_attention_layernorm", "self_attn.o_proj", "mlp.down_proj")

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


def table(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Our parameter name -> the Hugging Face names stacked in it."""
    names: dict[str, tuple[str, ...]] = {
        "embed_tokens.weight": ("model.embed_tokens.weight",),
        "norm.weight": ("model.norm.weight",),
    }
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = ("lm_head.weight",)
    for layer in range(config.num_hidden_layers):
        for ours, theirs in [*_FUSED.items(), *((name, (name,)) for name in _SAME)]:
            names[f"layers.{layer}.{ours}.weight"] = tuple(f"model.layers.{layer}.{name}.weight" for name in theirs)
    return names


def fuse(tensors: dict[str, Tensor], config: ModelConfig, where: str) -> dict[str, Tensor]:
    """Hugging Face tensors -> our state. Raises CheckpointError naming missing and surplus tensors."""
    names = table(config)
    wanted = {name for parts in names.values() for name in parts}
    found = dict(tensors)
    if config.tie_word_embeddings:
        # some writers store the tied head once more; it must then be the same matrix
        head = found.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, found.get("model.embed_tokens.weight", head)):
            raise CheckpointError(f"{where}: lm_head.weight differs from the embedding, yet tie_word_embeddings is on")
    check_names(wanted, found, where)
    return {ours: torch.cat([found[name] for name in parts]) for ours, parts in names.items()}


def split(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our state -> Hugging Face tensors, contiguous."""
    query, key_value, ffn = config.query_size, config.key_value_size, config.intermediate_size
    sizes = {3: (query, key_value, key_value), 2: (ffn, ffn)}
    out: dict[str, Tensor] = {}
    for ours, parts in table(config).items():
        pieces = state[ours].split(sizes[len(parts)]) if len(parts) > 1 else (state[ours],)
        out.update({name: piece.contiguous() for name, piece in zip(parts, pieces, strict=True)})
    return out

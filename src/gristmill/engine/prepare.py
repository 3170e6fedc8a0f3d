"""From the name of a model to what an engine runs: loading, quantising, and the choice of the path that computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import torch

from gristmill.engine.encoder_decoder import PairForward, torch_runner
from gristmill.engine.engine import Engine
from gristmill.engine.native import build
from gristmill.engine.native.decoder import KV_DTYPES as NATIVE_KV_DTYPES
from gristmill.engine.native.decoder import native_refusal
from gristmill.engine.native.linear import Kind
from gristmill.engine.native.runner import NativeRunner
from gristmill.engine.onednn import can_pack, pack_linears
from gristmill.engine.runner import Runner, RunnerFactory
from gristmill.engine.scoring import Forward, PackedForward, PagedForward
from gristmill.engine.speculation.draft_model import DraftModelProposer, check_same_tokens
from gristmill.engine.speculation.early_exit import EarlyExitProposer
from gristmill.engine.speculation.ngram import NgramProposer
from gristmill.engine.speculation.proposer import Proposer
from gristmill.errors import RequestError, closest
from gristmill.model.encoder_decoder import EncoderDecoder
from gristmill.model.load import load_generator
from gristmill.model.quantised.load import load_quantised
from gristmill.model.quantised.weights import Scheme
from gristmill.model.transformer import Transformer
from gristmill.tokens.tokenizer import Tokenizer

QUANTIZATIONS = ("int8", "w8a8", "int4")
_PAIR = "PyTorch, for an encoder reads the prompts"
KV_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


@dataclass(frozen=True)
class Prepared:
    """A model with what runs it. `path` says in a sentence what computes its steps, and why not in a faster way."""

    model: Transformer | EncoderDecoder
    tokenizer: Tokenizer
    runner: RunnerFactory
    path: str
    native: bool

    def forward(self, engine: Engine, adapter: str | None = None) -> Forward:
        """What scores whole texts: the trainer's own path, or where the weights are packed for native steps, these.

        Raises RequestError for an adapter that the engine has not loaded.
        """
        loaded = engine.adapters.find(adapter)
        if isinstance(self.model, EncoderDecoder):
            return PairForward(self.model)
        if self.native:
            return PagedForward(engine.runner, engine.pool, None if loaded is None else loaded.form)
        return PackedForward(self.model, None if loaded is None else loaded.lora)


def prepare(
    model: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    quantization: str | None = None,
    kv_cache_dtype: str | None = None,
    fast_kernels: bool = True,
) -> Prepared:
    """Load a model and choose its path; see `LLM` for the options.

    Raises RequestError for an unknown option, CheckpointError and AssetError as loading does.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise RequestError(
            f"quantization {quantization!r} is none of {', '.join(QUANTIZATIONS)}"
            f".{closest(quantization, QUANTIZATIONS)}",
            field="quantization",
        )
    if kv_cache_dtype is not None and kv_cache_dtype not in KV_DTYPES:
        raise RequestError(
            f"kv_cache_dtype {kv_cache_dtype!r} is none of {', '.join(KV_DTYPES)}", field="kv_cache_dtype"
        )
    built: Transformer | EncoderDecoder
    if quantization is None:
        built, tokenizer = load_generator(model, dtype=dtype, device=device)
    else:
        built, tokenizer = load_quantised(model, cast(Scheme, quantization), device=device)
    fewer_bits = quantization is not None or dtype != "float32"
    kv_dtype = KV_DTYPES[kv_cache_dtype or ("bfloat16" if fewer_bits else "float32")]
    if isinstance(built, EncoderDecoder):
        return Prepared(
            built, tokenizer, torch_runner(built, kv_dtype), "PyTorch, for an encoder reads the prompts", False
        )
    kind = {None: dtype, "int8": "int8_weights", "w8a8": "int8", "int4": "int4"}[quantization]
    refusal = _native_refusal(built, kind, kv_dtype) if fast_kernels else "fast_kernels is off"
    if refusal is None:
        return Prepared(built, tokenizer, _native(built, cast(Kind, kind), kv_dtype), f"native {kind}", True)
    if fast_kernels and quantization is None and can_pack(built):
        pack_linears(built)
    return Prepared(built, tokenizer, torch_runner(built, kv_dtype), f"PyTorch, for {refusal}", False)


def proposer_named(name: str, engine: Engine, prepared: Prepared) -> Proposer:
    """The proposer behind `LLM(speculation=...)`: "ngram", "early-exit:LAYERS", or a draft model's name.

    Raises RequestError for a number of layers that is none, or an early exit on a path that has no layers to leave at;
    what loading raises for a draft model, and RequestError when its tokens are not the target's.
    """
    if name == "ngram":
        return NgramProposer()
    kind, _, layers = name.partition(":")
    if isinstance(prepared.model, EncoderDecoder):
        raise RequestError(
            f"speculation {name!r} knows nothing of what the encoder read; take ngram", field="speculation"
        )
    if kind == "early-exit":
        if not layers.isdecimal():
            raise RequestError(
                f"early-exit needs a number of layers, as in early-exit:6, got {name!r}", field="speculation"
            )
        return EarlyExitProposer(engine.runner, layers=int(layers))
    draft = prepare(name, kv_cache_dtype=None)
    if isinstance(draft.model, EncoderDecoder):
        raise RequestError(f"{name} is an encoder-decoder and cannot go on with a text", field="speculation")
    check_same_tokens(prepared.tokenizer, draft.tokenizer)
    pool = engine.pool
    return DraftModelProposer(
        draft.runner(pool.num_blocks, pool.block_size),
        vocab_size=engine.config.vocab_size,
        context=draft.model.config.context,
        block_size=pool.block_size,
    )


def _native(model: Transformer, kind: Kind, kv_dtype: torch.dtype) -> RunnerFactory:
    def make(num_blocks: int, block_size: int) -> Runner:
        # the packed weights take the place of the model's own, so that they are in memory once
        return NativeRunner(model, kind, num_blocks=num_blocks, block_size=block_size, kv_dtype=kv_dtype, release=True)

    return make


def _native_refusal(model: Transformer, kind: str, kv_dtype: torch.dtype) -> str | None:
    """Why the native path cannot be taken; None when it can."""
    if model.embed_tokens.weight.device.type != "cpu":
        return f"the model is on {model.embed_tokens.weight.device}"
    if kind not in get_args(Kind):
        return f"native steps have no {kind} weights"
    if kv_dtype not in NATIVE_KV_DTYPES:
        return f"native steps keep no {kv_dtype} keys and values"
    return build.native_refusal() or native_refusal(model)

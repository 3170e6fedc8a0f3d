"""A tiny model and tokenizer for the engine's tests, and the plain loop that its output must equal."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gristmill.core import Prompt, RequestOutput, SamplingParams
from gristmill.engine.engine import Engine
from gristmill.model.formats.huggingface import save_huggingface
from gristmill.model.transformer import Transformer
from gristmill.tokens.tokenizer import Tokenizer
from gristmill.tokens.train import train_bpe
from model import tiny

CORPUS = [
    "The river runs to the far sea and so it went; two and two make four, once, twice, 1234 times.",
    "naïve 三十七",
]
VOCABULARY = tiny.CONFIG.vocab_size


@functools.cache
def tokenizer() -> Tokenizer:
    """A byte-level tokenizer of exactly the model's vocabulary."""
    built = train_bpe(CORPUS * 3, VOCABULARY)
    assert built.vocab_size == VOCABULARY
    return built


@functools.cache
def model() -> Transformer:
    """The model of most tests. Shared: do not change it."""
    return tiny.model()


@torch.no_grad()
def bigram_model(chances: dict[int, dict[int, float]]) -> Transformer:
    """A model whose next-token probabilities depend on the last token alone; tokens not named have next to none."""
    built = tiny.model(num_hidden_layers=1, tie_word_embeddings=False, hidden_size=VOCABULARY)
    for name, parameter in built.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()
    built.embed_tokens.weight.copy_(torch.eye(VOCABULARY))
    scale = float(built.norm(built.embed_tokens.weight[0])[0])  # what a token's own place holds after the norm
    built.lm_head.weight.fill_(-30 / scale)
    for token, following in chances.items():
        for other, chance in following.items():
            built.lm_head.weight[other, token] = math.log(chance) / scale
    return built


def save(directory: Path, built: Transformer | None = None) -> Path:
    """A directory that `LLM` loads."""
    save_huggingface(built or model(), directory, stop_token_ids=tokenizer().stop_token_ids)
    tokenizer().save(directory)
    return directory


def engine(**options: Any) -> Engine:
    """An engine over the shared model; small unless told otherwise."""
    return Engine(model(), tokenizer(), **{"kv_cache_tokens": 512, **options})


def greedy(**changes: Any) -> SamplingParams:
    """Greedy parameters that do not end early."""
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **changes})


def run(target: Engine, requests: Sequence[tuple[Prompt, SamplingParams]]) -> list[RequestOutput]:
    """Add all requests at once and step until they are done; the engine must be empty and whole afterwards."""
    order = [target.add(prompt, params) for prompt, params in requests]
    finished: dict[str, RequestOutput] = {}
    while target.has_unfinished():
        finished |= {output.request_id: output for output in target.step() if output.finished}
        target.check_integrity()
    assert target.pool.num_free == target.pool.num_blocks
    return [finished[request] for request in order]


def only(target: Engine, prompt: Prompt, params: SamplingParams) -> Any:
    """The first completion of one request."""
    return run(target, [(prompt, params)])[0].outputs[0]


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random ordinary token ids."""
    return (tiny.ids(length, seed, VOCABULARY - 3) + 3).tolist()


def plain_greedy(ids: Sequence[int], count: int) -> list[int]:
    """The model run anew on the whole sequence for each token: no cache, no batch, no engine."""
    sequence = list(ids)
    for _ in range(count):
        sequence.append(_next_token(tuple(sequence)))
    return sequence[len(ids) :]


@functools.lru_cache(100_000)
@torch.inference_mode()
def _next_token(ids: tuple[int, ...]) -> int:
    return int(model()(torch.tensor(ids))[-1].argmax())


@torch.inference_mode()
def plain_logprobs(ids: Sequence[int]) -> torch.Tensor:
    """Log-softmax of a plain forward, (tokens, vocabulary); row i is about token i + 1."""
    return model()(torch.tensor(list(ids))).log_softmax(-1)

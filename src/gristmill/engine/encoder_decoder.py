"""Encoder-decoders in the engine: the encoder runs once per source, the decoder is a sequence like any other.

A prompt is the encoder's; the decoder's own sequence begins with its start token. When a sequence is admitted, the
encoder reads its source with those of all others admitted in the step, and every decoder layer leaves its keys and
values of the source in blocks of a second pool (memory/sources.py). Each later step reads them through block tables.

Source: Vaswani et al. 2017 (the model); Kwon et al. 2023 (the block tables).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gristmill.core import AttentionRule, SamplingParams
from gristmill.engine.memory.block_pool import salt
from gristmill.engine.memory.paged_cache import Chunk, PagedKVCache
from gristmill.engine.memory.sources import Source, SourcePool
from gristmill.engine.runner import Runner, RunnerFactory, TorchRunner
from gristmill.errors import RequestError
from gristmill.model.accounting import flops_per_token, source_matrix_parameters
from gristmill.model.attention.layer import Project
from gristmill.model.attention.packed import PackedAttention, PackedCross, segment_positions
from gristmill.model.config import EncoderDecoderConfig
from gristmill.model.encoder import Encoder
from gristmill.model.encoder_decoder import EncoderDecoder
from gristmill.model.transformer import Transformer


class PagedMemory:
    """What the decoder's layers read in one step: the sources of `chunks`, from the blocks of `store`.

    states: final encoder states (source tokens, hidden) of the sources that `store.plan` was told of, whose keys and
    values each layer puts into their blocks first. None when all have been read before.
    """

    def __init__(self, store: PagedKVCache, chunks: Sequence[Chunk], states: Tensor | None) -> None:
        self._store, self._states = store, states
        sources = [_source(chunk) for chunk in chunks]
        self._slots = torch.cat([store.slots_of(source.block_table)[: len(source.ids)] for source in sources])
        self._plan = PackedCross(
            [chunk.length for chunk in chunks], [len(source.ids) for source in sources], store.device
        )

    def attend(self, layer: int, query: Tensor, project: Project, rule: AttentionRule) -> Tensor:
        """See `Memory.attend`."""
        if self._states is not None:
            self._store.write(layer, *project(self._states))
        key, value = self._store.read(layer, self._slots, query.dtype)
        return self._plan.attend(query, key, value, rule)


class EncoderDecoderRunner(TorchRunner):
    """An encoder-decoder in PyTorch: `num_blocks` blocks for what the decoder wrote, and as many for sources."""

    def __init__(self, model: EncoderDecoder, *, num_blocks: int, block_size: int, kv_dtype: torch.dtype) -> None:
        self.encoder, self.model = model.encoder, model.decoder
        self.device = model.decoder.embed_tokens.weight.device
        written = replace(model.config.decoder, cross_attention=False)
        self.cache = PagedKVCache(written, num_blocks, block_size, kv_dtype, self.device)
        # every layer has keys and values of the source, those too that share keys and values of the decoder's tokens
        self.sources = PagedKVCache(replace(written, layers=()), num_blocks, block_size, kv_dtype, self.device)

    def memory(self, chunks: Sequence[Chunk]) -> PagedMemory:
        """What this step's cross-attention reads; the encoder runs for the sources that are new."""
        new = [source for source in map(_source, chunks) if not source.is_read]
        states = None
        if new:
            self.sources.plan([Chunk(source.block_table, 0, len(source.ids)) for source in new])
            states = encode(self.encoder, [source.ids for source in new])
        return PagedMemory(self.sources, chunks, states)


class PairForward:
    """A `Forward` of gristmill.engine.scoring: prompts are sources and completions targets, on the trainer's own path;
    what is embedded is read as a source."""

    max_tokens = 4096

    def __init__(self, model: EncoderDecoder) -> None:
        self.model, self._device = model, model.decoder.embed_tokens.weight.device

    def hidden(self, segments: Sequence[list[int]]) -> Tensor:
        """See `Forward.hidden`."""
        return encode(self.model.encoder, segments)

    def predicting(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """See `Forward.predicting`."""
        start = self.model.config.decoder_start_token_id
        sources, targets = [source for source, _ in pairs], [[start, *target[:-1]] for _, target in pairs]
        return self.model.packed(*_flat(sources, self._device), *_flat(targets, self._device))

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Forward.logits`."""
        return self.model.decoder.logits(hidden).float()


def encode(encoder: Encoder, segments: Sequence[Sequence[int]]) -> Tensor:
    """Final states (tokens, hidden) of texts that lie one after another."""
    ids, lengths = _flat(segments, encoder.embed_tokens.weight.device)
    return encoder.hidden_states(ids, segment_positions(lengths, ids.device), PackedAttention(lengths, ids.device))


def new_source(
    ids: list[int], params: SamplingParams, cache_salt: str | None, config: EncoderDecoderConfig, pool: SourcePool
) -> Source:
    """What the encoder is to read of a request. Raises RequestError, naming the field, when it is empty, longer than
    the encoder's context or the pool, or when the parameters ask for probabilities that it does not have."""
    if params.prompt_logprobs is not None:
        raise RequestError(
            "prompt_logprobs: an encoder reads the prompt whole and gives its tokens no probabilities; score() gives "
            "those of an answer",
            field="prompt_logprobs",
        )
    most = max_source_tokens(config, pool)
    if len(ids) > most:
        by = "the encoder's context" if most == config.encoder.context else "what kv_cache_tokens leave for a source"
        raise RequestError(
            f"the prompt has {len(ids)} tokens, {by} is {most}", field="prompt", code="context_length_exceeded"
        )
    return Source(ids, salt("source", tuple(ids), cache_salt))


def max_source_tokens(config: EncoderDecoderConfig, pool: SourcePool) -> int:
    """The longest prompt: what the encoder can read and the pool can hold."""
    return min(config.encoder.context, pool.max_tokens)


def generation_flops(config: EncoderDecoderConfig, source_tokens: int) -> Callable[[int], float]:
    """Floating-point operations spent when so many output tokens stand, the encoder's included."""
    encoder, decoder = config.encoder, config.decoder
    once = source_tokens * (
        flops_per_token(encoder, source_tokens, training=False) + 2.0 * source_matrix_parameters(decoder)
    )

    def spent(output_tokens: int) -> float:
        # the start token was read, the last output token was not
        each = flops_per_token(decoder, (output_tokens + 1) / 2, training=False, source=source_tokens)
        return once + output_tokens * each

    return spent


def _flat(segments: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, list[int]]:
    ids = [token for segment in segments for token in segment]
    return torch.tensor(ids, device=device), [len(segment) for segment in segments]


def _source(chunk: Chunk) -> Source:
    if chunk.source is None:
        raise RequestError("this decoder reads an encoder: the sequence has no source", field="source")
    return chunk.source


def torch_runner(model: Transformer | EncoderDecoder, kv_dtype: torch.dtype | None) -> RunnerFactory:
    """Runs a model of either kind in plain PyTorch; kv_dtype None for the type of its weights."""
    dtype = kv_dtype or next(model.parameters()).dtype

    def make(num_blocks: int, block_size: int) -> Runner:
        if isinstance(model, EncoderDecoder):
            return EncoderDecoderRunner(model, num_blocks=num_blocks, block_size=block_size, kv_dtype=dtype)
        return TorchRunner(model, num_blocks=num_blocks, block_size=block_size, kv_dtype=dtype)

    return make

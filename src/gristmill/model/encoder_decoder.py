"""The encoder-decoder: a decoder whose layers also read the final states of an encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gristmill.core import KVCache
from gristmill.errors import RequestError
from gristmill.model.attention.layer import Memory, StatesMemory
from gristmill.model.attention.packed import PackedAttention, PackedCross, segment_positions
from gristmill.model.config import EncoderDecoderConfig
from gristmill.model.encoder import Encoder
from gristmill.model.initialise import initialise
from gristmill.model.memory import SequenceCache
from gristmill.model.transformer import Transformer


class EncoderDecoder(nn.Module):
    """Source sequences in, target sequences out.

    Source: Vaswani et al. 2017; Raffel et al. 2020 (T5).
    """

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config.encoder), Transformer(config.decoder)
        if config.share_embeddings:
            self.decoder.embed_tokens = self.encoder.embed_tokens
            if config.decoder.tie_word_embeddings:
                self.decoder.lm_head.weight = self.encoder.embed_tokens.weight

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (rows, target tokens, vocabulary) for sources (rows, source tokens), `attention_mask` saying which
        source tokens are real, and targets (rows, target tokens) that begin with the start token."""
        memory = self.read(input_ids, [decoder_input_ids.shape[1]] * decoder_input_ids.shape[0], attention_mask)
        logits: Tensor = self.decoder(decoder_input_ids, memory=memory)
        return logits

    def read(self, input_ids: Tensor, target_lengths: Sequence[int], attention_mask: Tensor | None = None) -> Memory:
        """Run the encoder: what a decoder step of `target_lengths` (rows,) tokens reads of sources (rows, tokens)."""
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        states = self.encoder(input_ids, attention_mask)[real]
        return StatesMemory(states, PackedCross(target_lengths, real.sum(dim=1).tolist(), input_ids.device))

    def packed(
        self, source_ids: Tensor, source_lengths: Sequence[int], target_ids: Tensor, target_lengths: Sequence[int]
    ) -> Tensor:
        """Final decoder states (target tokens, hidden) of flat sources and targets, pair by pair, without padding."""
        device = source_ids.device
        cache = PackedAttention(source_lengths, device)
        states = self.encoder.hidden_states(source_ids, segment_positions(source_lengths, device), cache)
        memory = StatesMemory(states, PackedCross(target_lengths, source_lengths, device))
        cache = PackedAttention(target_lengths, device)
        return self.decoder.hidden_states(target_ids, segment_positions(target_lengths, device), cache, memory=memory)

    @torch.inference_mode()
    def generate_greedy(
        self,
        input_ids: Tensor,
        max_tokens: int,
        eos_token_id: int | None = None,
        attention_mask: Tensor | None = None,
    ) -> list[list[int]]:
        """The most probable next token again and again, without the start and end tokens; one list per source row
        (rows, source tokens). The encoder runs once. Raises RequestError when max_tokens is below 1."""
        if max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, got {max_tokens}", field="max_tokens")
        rows = input_ids.shape[0]
        cache = SequenceCache(self.config.decoder, rows)
        memory = self.read(input_ids, [1] * rows, attention_mask)
        tokens = torch.full((rows,), self.config.decoder_start_token_id, device=input_ids.device)
        out: list[list[int]] = [[] for _ in range(rows)]
        going = [True] * rows
        for _ in range(max_tokens):
            hidden = self._step(tokens, cache, memory)
            tokens = self.decoder.logits(hidden).argmax(dim=-1)
            for row, token in enumerate(tokens.tolist()):
                going[row] = going[row] and token != eos_token_id
                if going[row]:
                    out[row].append(token)
            if not any(going):
                break
        return out

    def _step(self, tokens: Tensor, cache: SequenceCache, memory: Memory) -> Tensor:
        positions = cache.extend(1).to(tokens.device)
        step: KVCache = cache
        return self.decoder.hidden_states(tokens, positions, step, memory=memory)

    def count_parameters(self) -> int:
        """Number of weights; a shared matrix counts once. Works on the meta device."""
        return sum(parameter.numel() for parameter in self.parameters())

    def initialise(self, seed: int) -> None:
        """Draw all weights; see gristmill.model.initialise."""
        initialise(self.encoder, self.config.encoder, seed)
        embedding = self.encoder.embed_tokens.weight.detach().clone()
        initialise(self.decoder, self.config.decoder, seed + 1)
        if self.config.share_embeddings:
            with torch.no_grad():
                self.encoder.embed_tokens.weight.copy_(embedding)

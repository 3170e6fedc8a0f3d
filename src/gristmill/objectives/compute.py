"""What a training step of an objective costs: operations of all parts of its model on one batch.

So that objectives can be compared at the same compute: a masked LM computes its head for some tokens only, an
encoder-decoder reads with one half and predicts with the other, ELECTRA trains two models.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gristmill.errors import GristmillError
from gristmill.model.accounting import flops_per_token, source_matrix_parameters
from gristmill.model.config import ModelConfig
from gristmill.model.encoder_decoder import EncoderDecoder
from gristmill.model.heads import Headed
from gristmill.model.transformer import Transformer
from gristmill.objectives.replaced_token import Electra
from gristmill.objectives.sequence_pair import PairBatch
from gristmill.tokens.batch import PackedBatch


def step_flops(model: nn.Module, batch: PackedBatch | PairBatch) -> float:
    """Floating-point operations of forward and backward pass: of a decoder on a `PackedBatch`, an encoder with a masked
    LM head or an `Electra` on their batches, or an `EncoderDecoder` on a `PairBatch`.

    Counted as in `flops_per_token`, the output head of a decoder for every token. Raises GristmillError for another
    pair.
    """
    if isinstance(model, EncoderDecoder) and isinstance(batch, PairBatch):
        encoder, decoder = model.config.encoder, model.config.decoder
        reading = 6.0 * source_matrix_parameters(decoder) * batch.source.tokens
        target = _stack(decoder, batch.target, batch.source.segment_lengths)
        return _stack(encoder, batch.source) + reading + target
    if isinstance(model, Transformer) and isinstance(batch, PackedBatch):
        return _stack(model.config, batch)
    if isinstance(model, Electra) and isinstance(batch, PackedBatch):
        judging = 6.0 * batch.tokens * model.config.hidden_size * (model.config.hidden_size + 1)
        stacks = _stack(model.generator.config, batch) + _stack(model.discriminator.config, batch)
        # the generator's head runs forward once more, to draw tokens
        return stacks + judging + (6 + 2) * batch.target_count * _masked_head(model.generator)
    if isinstance(model, Headed) and model.head_config.kind == "masked_lm" and isinstance(batch, PackedBatch):
        return _stack(model.config, batch) + 6.0 * batch.target_count * _masked_head(model)
    raise GristmillError(f"the operations of a {type(model).__name__} on a {type(batch).__name__} are not known")


def _stack(config: ModelConfig, batch: PackedBatch, sources: Sequence[int] | None = None) -> float:
    """Segment by segment; a causal token attends to half of its segment on average."""
    total = 0.0
    for length, source in zip(batch.segment_lengths, sources or [0] * len(batch.segment_lengths), strict=True):
        seen = (length + 1) / 2 if config.causal else length
        total += length * flops_per_token(config, seen, source=source)
    return total


def _masked_head(model: Headed) -> int:
    """Weights that a predicted token meets: the dense layer and the vocabulary."""
    width = model.body.embed_tokens.embedding_dim
    return width * (model.config.hidden_size + model.config.vocab_size)

"""Replaced-token detection: a small masked LM fills in hidden tokens, and the encoder tells which were replaced.

Every token teaches the encoder, not only the hidden ones. The two are trained together; what the generator draws is
not differentiated, so it learns as a masked LM alone. It is left behind when training is over.

Source: Clark et al. 2020 (ELECTRA), section 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.errors import CheckpointError
from gristmill.model.config import ModelConfig
from gristmill.model.heads import Headed, MaskedLMHead
from gristmill.objectives.encoder_batch import EncoderBatch, encoder_states, headed, masked_loss_sum
from gristmill.objectives.masked import MaskedLM, Masking
from gristmill.objectives.single import example_generator
from gristmill.objectives.vocabulary import EncoderVocabulary
from gristmill.tokens.batch import IGNORED

GENERATOR, DISCRIMINATOR = "generator", "discriminator"
"""Names of the two terms."""

_CHUNK_BYTES = 1 << 26


@dataclass(frozen=True, eq=False)
class ReplacedTokenBatch(EncoderBatch):
    """A masked batch. uniforms: (tokens,) float32 in [0, 1), from which the generator's token at each place follows."""

    uniforms: Tensor | None = None


class Electra(nn.Module):
    """A generator with a masked LM head and a discriminator with one logit per token.

    share_embeddings: both read one matrix of token embeddings, the discriminator's. Raises CheckpointError for other
    heads, or for vocabularies or widths that differ where they are shared.
    """

    def __init__(self, generator: Headed, discriminator: Headed, *, share_embeddings: bool = True) -> None:
        super().__init__()
        self.generator, self.discriminator = headed(generator, "masked_lm"), headed(discriminator, "replaced_token")
        theirs, ours = generator.body.embed_tokens.weight, discriminator.body.embed_tokens.weight
        if len(theirs) != len(ours):
            raise CheckpointError(f"the generator has {len(theirs)} tokens, the discriminator {len(ours)}")
        if share_embeddings:
            if theirs.shape != ours.shape:
                raise CheckpointError(
                    f"shared embeddings need one width, got {theirs.shape[1]} and {ours.shape[1]}: set embedding.size "
                    "of the generator, or share_embeddings=False"
                )
            generator.body.embed_tokens.weight = ours
            if generator.config.tie_word_embeddings:
                assert isinstance(generator.head, MaskedLMHead)
                generator.head.decoder.weight = ours

    @property
    def config(self) -> ModelConfig:
        """That of the discriminator, the model that is kept: `discriminator` is saved like any other model."""
        return self.discriminator.config

    def count_parameters(self) -> int:
        """Number of weights of both; a shared matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def initialise(self, seed: int) -> None:
        """Draw all weights; those that are shared are the discriminator's."""
        self.generator.initialise(seed + 1)
        self.discriminator.initialise(seed)


def replaced_labels(original: Tensor, shown: Tensor) -> Tensor:
    """1 where a token differs from the original, 0 where it is the same, drawn again by chance or never hidden."""
    return (original != shown).long()


@torch.no_grad()
def draw_tokens(head: MaskedLMHead, states: Tensor, uniforms: Tensor) -> Tensor:
    """(rows,): one token per state (rows, hidden), drawn from the head's distribution.

    It is the first whose cumulated probability exceeds the row's uniform number, so it depends on nothing else. The
    logits of a few rows stand at a time.
    """
    rows = max(1, _CHUNK_BYTES // (4 * head.decoder.out_features))
    drawn = [states.new_zeros(0, dtype=torch.long)]
    for part, uniform in zip(states.split(rows), uniforms.split(rows), strict=True):
        cumulated = head.decoder(head.transform(part)).float().softmax(dim=-1).cumsum(dim=-1)
        # the sum of all may miss 1 by a rounding
        found = torch.searchsorted(cumulated, uniform[:, None] * cumulated[:, -1:], right=True)
        drawn.append(found.squeeze(1).clamp(max=cumulated.shape[1] - 1))
    return torch.cat(drawn)


def fill_in(head: MaskedLMHead, hidden: Tensor, batch: ReplacedTokenBatch) -> Tensor:
    """(tokens,): the batch with a token of the generator at each masked place, drawn from states (tokens, hidden)."""
    assert batch.uniforms is not None
    masked = (batch.target_ids != IGNORED).nonzero().squeeze(1)
    return batch.input_ids.index_copy(0, masked, draw_tokens(head, hidden[masked], batch.uniforms[masked]))


class ReplacedToken:
    """The `Objective` of ELECTRA, for an `Electra` model: the generator's masked loss plus `weight` times the
    discriminator's mean over all tokens. Examples are segments (ids, None).

    masking: which tokens the generator fills in, 15% by default, all of them [MASK].
    """

    def __init__(
        self,
        vocabulary: EncoderVocabulary,
        masking: Masking | None = None,
        *,
        weight: float = 50.0,
        frame: bool = True,
    ) -> None:
        self.masked = MaskedLM(vocabulary, masking or Masking(mask_share=1.0, random_share=0.0), frame=frame)
        self.weights: Mapping[str, float] = {GENERATOR: 1.0, DISCRIMINATOR: weight}

    @property
    def extra_tokens(self) -> int:
        """Most tokens added to one segment."""
        return self.masked.extra_tokens

    def prepare(self, examples: Sequence[Any], keys: Sequence[tuple[int, ...]]) -> ReplacedTokenBatch:
        """Mask, and draw the numbers of which the generator's tokens follow. Raises DataError as `MaskedLM` does."""
        rows = self.masked.rows(examples, keys)
        drawn = [
            torch.from_numpy(example_generator((*key, 1)).random(len(row.ids), dtype="float32"))
            for row, key in zip(rows, keys, strict=True)
        ]
        return ReplacedTokenBatch.from_rows(rows, uniforms=torch.cat(drawn) if drawn else None)

    def counts(self, batch: ReplacedTokenBatch) -> Mapping[str, int]:
        """Masked tokens, and all tokens."""
        return {GENERATOR: batch.target_count, DISCRIMINATOR: batch.tokens}

    def loss_sums(self, model: nn.Module, batch: ReplacedTokenBatch) -> Mapping[str, Tensor]:
        """See `Objective`. Raises CheckpointError for a model that is no `Electra`."""
        if not isinstance(model, Electra):
            raise CheckpointError(f"replaced-token detection trains an Electra, got {type(model).__name__}")
        hidden = encoder_states(model.generator.body, batch)
        generator_loss, _ = masked_loss_sum(model.generator, hidden, batch.target_ids)
        assert isinstance(model.generator.head, MaskedLMHead)
        shown = fill_in(model.generator.head, hidden, batch)
        original = batch.input_ids.where(batch.target_ids == IGNORED, batch.target_ids)
        logits = model.discriminator.head(encoder_states(model.discriminator.body, batch, shown))
        labels = replaced_labels(original, shown).float()
        found = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum")
        return {GENERATOR: generator_loss, DISCRIMINATOR: found}

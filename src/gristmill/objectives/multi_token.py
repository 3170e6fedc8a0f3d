"""Multi-token prediction: from each position, further heads predict the tokens after the next one.

Source: Gloeckle et al. 2024, section 2: one trunk, one layer per head, one shared output matrix, losses added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from gristmill.errors import DataError
from gristmill.model.attention.packed import PackedAttention
from gristmill.model.block import Block
from gristmill.model.initialise import initialise
from gristmill.model.norm import build_norm
from gristmill.model.transformer import Transformer
from gristmill.objectives.causal import next_token_loss_sum
from gristmill.tokens.batch import IGNORED, PackedBatch, Segment


class MultiTokenModel(nn.Module):
    """A Transformer, and `extra_heads` layers on its final states, of which the i-th predicts i + 1 tokens ahead.

    `trunk` alone is the model, unchanged: it predicts the next token and is what one exports.
    """

    def __init__(self, trunk: Transformer, extra_heads: int) -> None:
        super().__init__()
        if extra_heads < 0:
            raise DataError(f"extra_heads must be 0 or more, got {extra_heads}")
        config = replace(trunk.config, num_hidden_layers=1, layers=trunk.config.layers[:1])
        self.config, self.trunk = trunk.config, trunk
        self.heads = nn.ModuleList(Block(config, 0) for _ in range(extra_heads))
        self.norms = nn.ModuleList(build_norm(config.norm, config.hidden_size) for _ in range(extra_heads))

    def states(self, batch: PackedBatch) -> list[Tensor]:
        """Final states (tokens, hidden) of the trunk and of each head."""
        cache = PackedAttention(batch.segment_lengths, batch.input_ids.device)
        hidden = self.trunk.hidden_states(batch.input_ids, batch.position_ids, cache)
        step = self.trunk.step(batch.position_ids, cache, hidden.dtype)
        pairs = zip(self.heads, self.norms, strict=True)
        return [hidden, *(norm(head(hidden, step, 0)) for head, norm in pairs)]

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (heads, tokens, vocabulary) of one sequence (tokens,), the next token's first."""
        batch = PackedBatch.from_segments([(input_ids.tolist(), None)]).to(input_ids.device)
        return torch.stack([self.trunk.logits(states) for states in self.states(batch)])

    def initialise(self, seed: int) -> None:
        """Draw all weights; see gristmill.model.initialise."""
        self.trunk.initialise(seed)
        for number, part in enumerate((self.heads, self.norms), start=1):
            initialise(part, self.config, seed + number)


def targets_ahead(batch: PackedBatch, ahead: int) -> Tensor:
    """(tokens,): the token `ahead` places after each one, IGNORED where its segment has none or it is not learned."""
    shift = ahead - 1
    lengths = torch.tensor(batch.segment_lengths)
    ends = lengths.repeat_interleave(lengths).to(batch.position_ids.device)
    return batch.target_ids.roll(-shift).masked_fill(batch.position_ids + shift >= ends, IGNORED)


class MultiToken:
    """The `Objective` of a `MultiTokenModel`: one term per head, "next", "ahead_2", ... of equal weight."""

    def __init__(self, extra_heads: int) -> None:
        self.extra_heads = extra_heads
        names = ["next", *(f"ahead_{number + 2}" for number in range(extra_heads))]
        self.weights: Mapping[str, float] = dict.fromkeys(names, 1.0)

    def prepare(self, examples: Sequence[Segment], keys: Sequence[tuple[int, ...]]) -> PackedBatch:
        """See `Objective`; masks say what is learned, by every head."""
        return PackedBatch.from_segments(examples)

    def counts(self, batch: PackedBatch) -> Mapping[str, int]:
        """See `Objective`."""
        targets = (targets_ahead(batch, ahead) for ahead in range(1, self.extra_heads + 2))
        return {name: int((found != IGNORED).sum()) for name, found in zip(self.weights, targets, strict=True)}

    def loss_sums(self, model: nn.Module, batch: PackedBatch) -> Mapping[str, Tensor]:
        """See `Objective`. Raises DataError when the model has another number of heads."""
        assert isinstance(model, MultiTokenModel)
        if len(model.heads) != self.extra_heads:
            raise DataError(f"the objective has {self.extra_heads} extra heads, the model {len(model.heads)}")
        sums = {}
        for ahead, (name, states) in enumerate(zip(self.weights, model.states(batch), strict=True), start=1):
            targets = targets_ahead(batch, ahead)
            learned = (targets != IGNORED).nonzero().squeeze(1)
            sums[name] = next_token_loss_sum(model.trunk, states[learned], targets[learned])
        return sums

"""Causal language modelling: predict each token from those before it in its document.

Supervised fine-tuning is the same objective with fewer targets: the batch says which tokens are learned.

Source: Radford et al. 2018, eq. 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gristmill.model.attention.packed import PackedAttention
from gristmill.model.transformer import Transformer
from gristmill.objectives.cross_entropy import linear_cross_entropy_sum
from gristmill.objectives.single import SingleTerm
from gristmill.tokens.batch import IGNORED, PackedBatch

_SHAPE_STEP = 256
"""Tokens and predicted rows are rounded up to a multiple of this, so that kernels meet few different shapes."""


class CausalLM(SingleTerm):
    """The `Objective` of next-token prediction over packed batches."""

    def loss_sum(self, model: torch.nn.Module, batch: PackedBatch) -> tuple[Tensor, int]:
        """Summed loss in nats over the targets of the batch, and their number."""
        assert isinstance(model, Transformer)
        batch = batch.rounded_up(_SHAPE_STEP, model.config.context)
        cache = PackedAttention(batch.segment_lengths, batch.input_ids.device)
        hidden = model.hidden_states(batch.input_ids, batch.position_ids, cache)
        learned = (batch.target_ids != IGNORED).nonzero().squeeze(1)
        # the rows that round up repeat the last one, which has no target
        rows = torch.cat((learned, learned.new_full((-len(learned) % _SHAPE_STEP,), len(hidden) - 1)))
        total = next_token_loss_sum(model, hidden[rows], batch.target_ids[rows])
        return total, len(learned)


def next_token_loss_sum(model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy in nats of final states (rows, hidden) against `targets` (rows,), IGNORED ones aside."""
    config = model.config
    if config.logit_scale is not None:
        hidden = hidden * config.logit_scale
    head = model.lm_head
    return linear_cross_entropy_sum(hidden, head.weight, targets, head.bias, softcap=config.logit_softcap)

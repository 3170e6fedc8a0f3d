"""Next-token prediction for models that read a fixed number of tokens.

Source: Bengio et al. 2003, section 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.model.feedforward_lm import FeedForwardLM
from gristmill.objectives.single import SingleTerm
from gristmill.tokens.batch import IGNORED, PackedBatch


class FixedWindowLM(SingleTerm):
    """The `Objective` of a `FeedForwardLM`: each target of a packed batch from the tokens before it in its document."""

    def loss_sum(self, model: torch.nn.Module, batch: PackedBatch) -> tuple[Tensor, int]:
        """Summed loss in nats over the targets of the batch, and their number."""
        assert isinstance(model, FeedForwardLM)
        learned = (batch.target_ids != IGNORED).nonzero().squeeze(1)
        logits = model(model.contexts(batch.input_ids, batch.position_ids)[learned])
        return F.cross_entropy(logits.float(), batch.target_ids[learned], reduction="sum"), len(learned)

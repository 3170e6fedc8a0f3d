"""The first neural language model: a feed-forward network over the vectors of the last few tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gristmill.errors import RequestError


class FeedForwardLM(nn.Module):
    """Logits of the next token from the `order` - 1 tokens before it: b + W x + U tanh(d + H x), where x joins their
    embeddings. `direct` False leaves W out.

    The embedding's last row, number `vocab_size`, stands for the places before the beginning of a document.
    Raises RequestError for an order below 2.

    Source: Bengio et al. 2003, eq. 1.
    """

    def __init__(
        self, vocab_size: int, *, order: int = 5, size: int = 60, hidden: int = 100, direct: bool = True
    ) -> None:
        super().__init__()
        if order < 2:
            raise RequestError(f"order must be 2 or more (order - 1 tokens are read), got {order}", field="order")
        self.vocab_size, self.order = vocab_size, order
        width = (order - 1) * size
        self.embed_tokens = nn.Embedding(vocab_size + 1, size)
        self.hidden = nn.Linear(width, hidden)
        self.output = nn.Linear(hidden, vocab_size)
        self.direct = nn.Linear(width, vocab_size, bias=False) if direct else None

    def forward(self, contexts: Tensor) -> Tensor:
        """(rows, vocabulary) of `contexts` (rows, order - 1), oldest token first."""
        x = self.embed_tokens(contexts).flatten(1)
        logits: Tensor = self.output(torch.tanh(self.hidden(x)))
        return logits if self.direct is None else logits + self.direct(x)

    def contexts(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """What `forward` reads to predict the token after each of flat `input_ids` (tokens,): it and the order - 2
        before it, (tokens, order - 1). `position_ids` (tokens,) count from 0 in each document, and nothing before a
        document's beginning is read."""
        back = torch.arange(self.order - 2, -1, -1, device=input_ids.device)
        places = torch.arange(len(input_ids), device=input_ids.device)[:, None] - back
        before = position_ids[:, None] < back
        return input_ids[places.clamp(min=0)].masked_fill(before, self.vocab_size)

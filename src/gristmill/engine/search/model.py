"""What a search may know of a model: hypotheses that grow token by token and share what they have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor


class Hypothesis(Protocol):
    """An output so far. Never changes once made; alive until it is freed."""

    @property
    def token_ids(self) -> Sequence[int]:
        """The output, without the prompt."""

    @property
    def logprobs(self) -> Tensor:
        """Log-probability of each possible next token in nats, float32 (vocab,)."""

    @property
    def hidden(self) -> Tensor | None:
        """Final states of the tokens it added to its parent, (tokens, hidden): the whole prompt's for a root, else one
        row. None where the model gives none; contrastive search alone asks for it."""


class NextTokenModel(Protocol):
    """Gives next-token distributions of hypotheses. Whoever makes a hypothesis frees it, once."""

    @property
    def vocab_size(self) -> int:
        """Tokens a distribution is over."""

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that complete an output."""

    def start(self, prompt_ids: Sequence[int]) -> Hypothesis:
        """The empty output after a prompt. Raises RequestError for one the model cannot take."""

    def extend(self, choices: Sequence[tuple[Hypothesis, int]]) -> list[Hypothesis]:
        """One new hypothesis per (parent, token), in order, with one forward for all.

        A parent may appear several times and stays alive. Raises RequestError when memory runs out; nothing is made
        then.
        """

    def free(self, hypotheses: Iterable[Hypothesis]) -> None:
        """Give back what these alone hold. What they share with living ones stays."""

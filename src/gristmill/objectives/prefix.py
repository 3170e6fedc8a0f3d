"""Prefix language modelling: the first part of a text is read at once, the rest is predicted token by token.

In a decoder the prefix's tokens see each other and the others see what is before them; in an encoder-decoder the
encoder reads the prefix.

Source: Liu et al. 2018; Raffel et al. 2020, sections 3.2.1 and 3.2.3; Dong et al. 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gristmill.errors import DataError
from gristmill.model.attention.packed import PackedAttention
from gristmill.model.transformer import Transformer
from gristmill.objectives.causal import next_token_loss_sum
from gristmill.objectives.sequence_pair import Framing, Pair, PairObjective, unmasked
from gristmill.objectives.single import SingleTerm, example_generator
from gristmill.tokens.batch import IGNORED, PackedBatch, Segment


def draw_prefix(generator: np.random.Generator, length: int) -> int:
    """Tokens of the prefix, uniform over the cuts that leave both parts some; a text of one token is all prefix."""
    return int(generator.integers(1, length)) if length > 1 else 1


@dataclass(frozen=True, eq=False)
class PrefixBatch(PackedBatch):
    """Segments whose first `prefix_lengths` (segments,) tokens see each other; those after the prefix are targets."""

    prefix_lengths: tuple[int, ...]

    def to(self, device: torch.device | str) -> PrefixBatch:
        """The same batch on another device."""
        return PrefixBatch(**vars(super().to(device)), prefix_lengths=self.prefix_lengths)

    @classmethod
    def from_prefixes(cls, segments: Sequence[Segment], prefix_lengths: Sequence[int]) -> PrefixBatch:
        """Lay segments end to end. Raises DataError as `from_segments`, and for a prefix longer than its segment."""
        if len(segments) != len(prefix_lengths):
            raise DataError(f"{len(prefix_lengths)} prefix_lengths for {len(segments)} segments")
        packed = PackedBatch.from_segments(segments)
        for number, (prefix, length) in enumerate(zip(prefix_lengths, packed.segment_lengths, strict=True)):
            if not 0 <= prefix <= length:
                raise DataError(f"segment {number} has {length} tokens, but a prefix of {prefix}")
        lengths = torch.tensor(packed.segment_lengths)
        prefixes = torch.tensor(list(prefix_lengths)).repeat_interleave(lengths)
        # position p predicts token p + 1, which must lie after the prefix
        targets = packed.target_ids.masked_fill(packed.position_ids + 1 < prefixes, IGNORED)
        return cls(packed.input_ids, targets, packed.position_ids, packed.segment_lengths, tuple(prefix_lengths))


class PrefixLM(SingleTerm):
    """The `Objective` of a decoder with a visible prefix of random length, or of always `prefix_length` tokens.

    A prefix of 0 or 1 is causal language modelling. Raises DataError for a fixed prefix longer than a segment.
    """

    def __init__(self, prefix_length: int | None = None) -> None:
        self.prefix_length = prefix_length

    def prepare(self, examples: Sequence[Segment], keys: Sequence[tuple[int, ...]]) -> PrefixBatch:
        """See `Objective`; examples are segments (ids, None)."""
        texts: list[Segment] = [(unmasked(example, "prefix language modelling"), None) for example in examples]
        if self.prefix_length is not None:
            return PrefixBatch.from_prefixes(texts, [self.prefix_length] * len(texts))
        drawn = [draw_prefix(example_generator(key), len(ids)) for (ids, _), key in zip(texts, keys, strict=True)]
        return PrefixBatch.from_prefixes(texts, drawn)

    def loss_sum(self, model: torch.nn.Module, batch: PrefixBatch) -> tuple[Tensor, int]:
        """Summed loss in nats over the tokens after the prefixes, and their number."""
        assert isinstance(model, Transformer)
        cache = PackedAttention(batch.segment_lengths, batch.input_ids.device, prefix_lengths=batch.prefix_lengths)
        hidden = model.hidden_states(batch.input_ids, batch.position_ids, cache)
        learned = (batch.target_ids != IGNORED).nonzero().squeeze(1)
        return next_token_loss_sum(model, hidden[learned], batch.target_ids[learned]), len(learned)


class PrefixPair(PairObjective):
    """The same for an encoder-decoder. `prefix_length` 0 is causal language modelling: the source is just its frame.

    A text of one token has nothing after its prefix: the decoder learns only the frame, and without one it is refused.
    """

    def __init__(self, framing: Framing, prefix_length: int | None = None) -> None:
        super().__init__(framing)
        self.prefix_length = prefix_length

    def pair(self, example: object, generator: np.random.Generator) -> Pair:
        """See `PairObjective`; the example is a segment (ids, None)."""
        ids = unmasked(example, "prefix language modelling")
        cut = draw_prefix(generator, len(ids)) if self.prefix_length is None else self.prefix_length
        if not 0 <= cut <= len(ids):
            raise DataError(f"a text of {len(ids)} tokens has no prefix of {cut}")
        return Pair(ids[:cut], ids[cut:], kind="prefix")

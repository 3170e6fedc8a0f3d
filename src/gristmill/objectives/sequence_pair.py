"""Encoder-decoder training: read a source, predict a target token by token with the true ones before it.

Objectives differ only in the pair that they make of an example; framing, batch and loss are here.

Source: Sutskever et al. 2014; Raffel et al. 2020, section 2.1; Lewis et al. 2020.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gristmill.errors import DataError, RequestError
from gristmill.model.encoder_decoder import EncoderDecoder
from gristmill.objectives.causal import next_token_loss_sum
from gristmill.objectives.single import SingleTerm, example_generator
from gristmill.tokens.batch import IGNORED, PackedBatch

Ids = Sequence[int] | np.ndarray


@dataclass(frozen=True, kw_only=True)
class Framing:
    """The tokens that an encoder-decoder expects around its two sequences, and the size of its vocabulary.

    `decoder_start` is what the decoder reads first and never predicts; the others are tuples of ids that stand
    before and after the source and the target.
    """

    vocab_size: int
    decoder_start: int
    source_before: tuple[int, ...] = ()
    source_after: tuple[int, ...] = ()
    target_before: tuple[int, ...] = ()
    target_after: tuple[int, ...] = ()

    @classmethod
    def t5(cls, vocab_size: int, *, pad: int = 0, end: int = 1) -> Framing:
        """Both sequences end with `end`; the decoder starts from the padding token. Source: Raffel et al. 2020."""
        return cls(vocab_size=vocab_size, decoder_start=pad, source_after=(end,), target_after=(end,))

    @classmethod
    def bart(cls, vocab_size: int, *, begin: int = 0, end: int = 2) -> Framing:
        """Both sequences stand between `begin` and `end`; the decoder starts from `end`. Source: Lewis et al. 2020."""
        around = {"source_before": (begin,), "source_after": (end,), "target_before": (begin,), "target_after": (end,)}
        return cls(vocab_size=vocab_size, decoder_start=end, **around)

    @property
    def extra_tokens(self) -> int:
        """Most tokens that it adds to one sequence."""
        source, target = self.source_before + self.source_after, self.target_before + self.target_after
        return max(len(source), len(target))


@dataclass(frozen=True, eq=False)
class Pair:
    """What an example became, without framing.

    `learned` (target,) is true where the target is to be predicted, None for everywhere. `shown` (target,) is what
    the decoder reads in place of the target where an objective hides part of it. `kind` says how the pair was made.
    """

    source: Ids
    target: Ids
    learned: np.ndarray | None = None
    shown: Ids | None = None
    kind: str = ""


@dataclass(frozen=True, eq=False)
class PairBatch:
    """Sources and targets laid end to end, pair by pair. `target.input_ids[i]` is what the decoder reads at i and
    `target.target_ids[i]` what it is to predict there; `source` has no targets. `kinds` (pairs,) is `Pair.kind`."""

    source: PackedBatch
    target: PackedBatch
    kinds: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all sources and targets."""
        return self.source.tokens + self.target.tokens

    @property
    def target_count(self) -> int:
        """Positions that predict a token."""
        return self.target.target_count

    def to(self, device: torch.device | str) -> PairBatch:
        """The same batch on another device."""
        return PairBatch(self.source.to(device), self.target.to(device), self.kinds)

    @classmethod
    def from_pairs(cls, pairs: Sequence[Pair], framing: Framing) -> PairBatch:
        """Frame the pairs and lay them end to end. Raises DataError for no pair, a side without tokens even when
        framed, a token outside the vocabulary, or a `learned` or `shown` of another length than the target."""
        if not pairs:
            raise DataError("a batch needs at least one pair")
        sources, inputs, labels = [], [], []
        for number, pair in enumerate(pairs):
            source = np.array([*framing.source_before, *pair.source, *framing.source_after], np.int64)
            sources.append(_checked(source, framing.vocab_size, f"pair {number}, source"))
            shown, target = _framed_target(pair, framing, f"pair {number}, target")
            inputs.append(_checked(shown, framing.vocab_size, f"pair {number}, target"))
            labels.append(target)
        return cls(_laid(sources, None), _laid(inputs, labels), tuple(pair.kind for pair in pairs))


class PairObjective(SingleTerm):
    """The `Objective` of an encoder-decoder; a subclass says which pair it makes of an example."""

    def __init__(self, framing: Framing) -> None:
        self.framing = framing

    @property
    def extra_tokens(self) -> int:
        """Most tokens that are added to one side of an example."""
        return self.framing.extra_tokens

    @abstractmethod
    def pair(self, example: Any, generator: np.random.Generator) -> Pair:
        """The pair made of one example, with what is random drawn from `generator`."""

    def prepare(self, examples: Sequence[Any], keys: Sequence[tuple[int, ...]]) -> PairBatch:
        """See `Objective`. Raises DataError as `PairBatch.from_pairs` does."""
        made = zip(examples, keys, strict=True)
        pairs = [self.pair(example, example_generator(key)) for example, key in made]
        return PairBatch.from_pairs(pairs, self.framing)

    def loss_sum(self, model: torch.nn.Module, batch: PairBatch) -> tuple[Tensor, int]:
        """Summed loss in nats over the targets of the batch, and their number.

        Raises RequestError for a sequence longer than the model's context.
        """
        assert isinstance(model, EncoderDecoder)
        sides = (("source", model.config.encoder, batch.source), ("target", model.config.decoder, batch.target))
        for name, config, side in sides:
            if max(side.segment_lengths) > config.context:
                raise RequestError(
                    f"a {name} of {max(side.segment_lengths)} tokens does not fit the model's context of "
                    f"{config.context}: choose a row_length at least {self.extra_tokens} below it, or drop the example",
                    field="row_length",
                )
        hidden = model.packed(
            batch.source.input_ids, batch.source.segment_lengths, batch.target.input_ids, batch.target.segment_lengths
        )
        targets = batch.target.target_ids
        learned = (targets != IGNORED).nonzero().squeeze(1)
        return next_token_loss_sum(model.decoder, hidden[learned], targets[learned]), len(learned)


class SequenceToSequence(PairObjective):
    """Given pairs of token ids (source, target): translation and other supervised tasks."""

    def pair(self, example: tuple[Ids, Ids], generator: np.random.Generator) -> Pair:
        """The pair as it is."""
        source, target = example
        return Pair(source, target)


def unmasked(example: Any, name: str) -> np.ndarray:
    """The ids of a segment (ids, mask) as int64. Raises DataError when it is empty or has a loss mask, which `name`
    has no use for."""
    ids, mask = example
    if mask is not None:
        raise DataError(f"{name} chooses itself what is learned: a loss mask has no meaning here, drop it")
    if len(ids) == 0:
        raise DataError(f"{name}: a segment has no tokens")
    return np.asarray(ids, np.int64)


def require_absent(ids: np.ndarray, reserved: Sequence[int], what: str) -> None:
    """Raise DataError when a token kept for marks of the objective stands in the text: nothing could be told apart."""
    found = np.isin(ids, reserved)
    if found.any():
        place = int(found.argmax())
        raise DataError(f"token {int(ids[place])} at {place} is kept for {what}, but stands in the text; remove it")


def _framed_target(pair: Pair, framing: Framing, where: str) -> tuple[np.ndarray, np.ndarray]:
    """What the decoder reads, and its labels."""
    before, after = framing.target_before, framing.target_after
    shown, learned = pair.target if pair.shown is None else pair.shown, pair.learned
    for name, side in (("shown", shown), ("learned", pair.target if learned is None else learned)):
        if len(side) != len(pair.target):
            raise DataError(f"{where}: {name} has length {len(side)}, the target {len(pair.target)}")
    target = np.array([*before, *pair.target, *after], np.int64)
    reads = np.array([framing.decoder_start, *before, *shown, *after][: len(target)], np.int64)
    _checked(target, framing.vocab_size, where)
    if learned is not None:  # an objective with its own choice does not teach the frame
        frame = [np.zeros(len(before), bool), np.asarray(learned, bool), np.zeros(len(after), bool)]
        target[~np.concatenate(frame)] = IGNORED
    return reads, target


def _laid(inputs: list[np.ndarray], labels: list[np.ndarray] | None) -> PackedBatch:
    lengths = [len(ids) for ids in inputs]
    ids = np.concatenate(inputs)
    targets = np.full_like(ids, IGNORED) if labels is None else np.concatenate(labels)
    positions = np.concatenate([np.arange(length) for length in lengths])
    return PackedBatch(torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(positions), tuple(lengths))


def _checked(ids: np.ndarray, vocab_size: int, where: str) -> np.ndarray:
    if len(ids) == 0:
        raise DataError(f"{where}: no tokens")
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise DataError(f"{where}: token {wrong} is outside the vocabulary of {vocab_size}")
    return ids

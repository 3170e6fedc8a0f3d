"""Masked language modelling: some tokens are hidden, and each is predicted from all the others, on both sides.

Which tokens are chosen and what stands in their place are pure functions of a generator. BERT chooses single tokens,
its later form whole words, SpanBERT spans of words, MASS one stretch.

Source: Devlin et al. 2018, section 3.1; Joshi et al. 2020 (SpanBERT), section 3.1; Song et al. 2019 (MASS).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from gristmill.errors import DataError, closest
from gristmill.model.heads import MaskedLMHead
from gristmill.objectives.encoder_batch import EncoderBatch, Row, encoder_states, headed, masked_loss_sum
from gristmill.objectives.pairs import pack_single
from gristmill.objectives.single import SingleTerm, example_generator
from gristmill.objectives.vocabulary import EncoderVocabulary, Ids
from gristmill.tokens.batch import IGNORED

MaskingUnit = Literal["token", "word", "span", "fragment"]
_TRIES = 100


class Corrupted(NamedTuple):
    """What the model reads, and what each position predicts, IGNORED where it was not chosen; both (tokens,) int64."""

    input_ids: np.ndarray
    target_ids: np.ndarray

    def restored(self) -> np.ndarray:
        """The tokens before corruption."""
        return np.where(self.target_ids == IGNORED, self.input_ids, self.target_ids)


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Which tokens are predicted, and what stands in their place.

    rate: the share of the tokens that are not special; at least one is chosen where there is one. unit: single tokens,
    whole words, spans of words of up to `longest_span`, their lengths drawn with probability falling by
    1 - `span_stop` from each to the next, or one fragment without a gap. Of what is chosen, `mask_share` becomes
    [MASK], `random_share` a random token, the rest stays as it is; a span or fragment is treated as one.
    Raises DataError for a value out of range.
    """

    rate: float = 0.15
    unit: MaskingUnit = "token"
    mask_share: float = 0.8
    random_share: float = 0.1
    longest_span: int = 10
    span_stop: float = 0.2

    def __post_init__(self) -> None:
        if self.unit not in get_args(MaskingUnit):
            known = get_args(MaskingUnit)
            raise DataError(f"unit must be one of {', '.join(known)}, got {self.unit!r}{closest(self.unit, known)}")
        for name, low in (("rate", False), ("mask_share", True), ("random_share", True), ("span_stop", False)):
            value = getattr(self, name)
            if not (0.0 < value <= 1.0 or (low and value == 0.0)):
                raise DataError(f"{name} must be {'in [0, 1]' if low else 'above 0 and at most 1'}, got {value}")
        if self.mask_share + self.random_share > 1.0 + 1e-9:
            raise DataError(
                f"mask_share {self.mask_share} and random_share {self.random_share} are more than 1 together"
            )
        if self.longest_span < 1:
            raise DataError(f"longest_span must be at least 1, got {self.longest_span}")

    def corrupt(self, ids: np.ndarray, vocabulary: EncoderVocabulary, generator: np.random.Generator) -> Corrupted:
        """Choose and replace. Raises DataError when words are asked for and the vocabulary does not know them."""
        units = choose_units(self, ids, vocabulary, generator)
        shares = (self.mask_share, self.random_share)
        return replace_units(ids, units, vocabulary, generator, *shares, alike=self.unit in ("span", "fragment"))


PLAIN = Masking(mask_share=1.0, random_share=0.0)
"""Every chosen token becomes [MASK]."""


def choose_units(
    masking: Masking, ids: np.ndarray, vocabulary: EncoderVocabulary, generator: np.random.Generator
) -> np.ndarray:
    """(tokens,): the number of the chosen unit that a token belongs to, -1 where it is not chosen."""
    open_ = ~vocabulary.is_special[ids]
    count = int(open_.sum())
    budget = min(max(int(masking.rate * count + generator.random()), 1), count)
    if masking.unit in ("word", "span") and vocabulary.continues is None:
        raise DataError(f"unit {masking.unit!r} needs words: give the vocabulary `continues`")
    if budget == 0:
        return np.full(len(ids), -1)
    if masking.unit == "token":
        return choose_tokens(open_, budget, generator)
    if masking.unit == "fragment":
        return choose_fragment(open_, budget, generator)
    assert vocabulary.continues is not None
    words = word_numbers(open_, vocabulary.continues[ids])
    if masking.unit == "word":
        return choose_words(words, budget, generator)
    return choose_spans(words, budget, generator, masking.longest_span, masking.span_stop)


def choose_tokens(open_: np.ndarray, budget: int, generator: np.random.Generator) -> np.ndarray:
    """`budget` single tokens of those where `open_` (tokens,) is True, uniformly."""
    units = np.full(len(open_), -1)
    units[generator.choice(np.flatnonzero(open_), budget, replace=False)] = np.arange(budget)
    return units


def word_numbers(open_: np.ndarray, continues: np.ndarray) -> np.ndarray:
    """(tokens,): the number of the word that a token belongs to, counted from 0; -1 for a special token, which also
    ends a word."""
    after_open = np.concatenate(([False], open_[:-1]))
    begins = open_ & ~(continues & after_open)
    return np.where(open_, np.cumsum(begins) - 1, -1)


def choose_words(words: np.ndarray, budget: int, generator: np.random.Generator) -> np.ndarray:
    """Whole words in random order, of at most `budget` tokens together; one word in any case."""
    sizes = np.bincount(words[words >= 0])
    chosen, left = [], budget
    for word in generator.permutation(len(sizes)):
        if sizes[word] <= left:
            chosen.append(word)
            left -= int(sizes[word])
        if left == 0:
            break
    if not chosen:
        chosen = [int(sizes.argmin())]
    numbers = np.full(len(sizes) + 1, -1)  # the last entry serves -1, no word
    numbers[chosen] = np.arange(len(chosen))
    found: np.ndarray = numbers[words]
    return found


def choose_spans(
    words: np.ndarray, budget: int, generator: np.random.Generator, longest: int, stop: float
) -> np.ndarray:
    """Spans of whole words, of at most `budget` tokens together unless the first word has more.

    A length in words is drawn with weights (1 - stop)^length up to `longest`, then a place. A span that meets an
    earlier one or a special token is drawn anew; one that is too long for what is left loses its last words.
    """
    first = np.flatnonzero(np.diff(words, prepend=-1) * (words >= 0))
    sizes = np.bincount(words[words >= 0])
    weights = (1.0 - stop) ** np.arange(longest) if stop < 1.0 else np.eye(1, longest)[0]
    units, left, number = np.full(len(words), -1), budget, 0
    for _ in range(_TRIES * budget):
        length = min(1 + int(generator.choice(longest, p=weights / weights.sum())), len(sizes))
        word = int(generator.integers(len(sizes) - length + 1))
        fitting = int((np.cumsum(sizes[word : word + length]) <= left).sum())
        length = fitting or (1 if number == 0 else 0)
        if length == 0:
            continue
        last = word + length - 1
        place = slice(int(first[word]), int(first[last] + sizes[last]))
        if (units[place] >= 0).any() or (words[place] < 0).any():
            continue
        units[place] = number
        number, left = number + 1, left - int(sizes[word : last + 1].sum())
        if left <= 0:
            break
    return units


def choose_fragment(open_: np.ndarray, budget: int, generator: np.random.Generator) -> np.ndarray:
    """One stretch of `budget` tokens without a special one, uniformly; the longest there is where none is so long."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], open_, [False])).astype(np.int8)))
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    size = min(budget, int(lengths.max()))
    places = np.concatenate([np.arange(s, s + n - size + 1) for s, n in zip(starts, lengths, strict=True) if n >= size])
    start = int(generator.choice(places))
    units = np.full(len(open_), -1)
    units[start : start + size] = 0
    return units


def replace_units(
    ids: np.ndarray,
    units: np.ndarray,
    vocabulary: EncoderVocabulary,
    generator: np.random.Generator,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    *,
    alike: bool = False,
) -> Corrupted:
    """Put [MASK], a random token or the token itself in the place of each chosen one; all are predicted.

    units: as `choose_units` gives them. alike: all tokens of a unit are treated the same, each by itself otherwise.
    A random token is no special one; it may by chance be the true one.
    """
    chosen = np.flatnonzero(units >= 0)
    fate = generator.random(int(units.max(initial=-1)) + 1)[units[chosen]] if alike else generator.random(len(chosen))
    inputs, targets = ids.copy(), np.full_like(ids, IGNORED)
    targets[chosen] = ids[chosen]
    inputs[chosen[fate < mask_share]] = vocabulary.mask_id
    redrawn = chosen[(fate >= mask_share) & (fate < mask_share + random_share)]
    inputs[redrawn] = generator.choice(vocabulary.ordinary_ids, len(redrawn))
    return Corrupted(inputs, targets)


class MaskedLM(SingleTerm):
    """The `Objective` of masked tokens, for an encoder with a masked LM head. Examples are segments (ids, None).

    frame: each segment is put between [CLS] and [SEP]. Raises DataError when the vocabulary lacks these.
    """

    def __init__(self, vocabulary: EncoderVocabulary, masking: Masking | None = None, *, frame: bool = True) -> None:
        self.vocabulary, self.masking, self.frame = vocabulary, masking or Masking(), frame
        if frame:
            vocabulary.require_frame()

    @property
    def extra_tokens(self) -> int:
        """Most tokens added to one segment."""
        return 2 if self.frame else 0

    def prepare(self, examples: Sequence[Any], keys: Sequence[tuple[int, ...]]) -> EncoderBatch:
        """Frame and corrupt. Raises DataError for an empty segment, one with a loss mask or with unknown tokens."""
        return EncoderBatch.from_rows(self.rows(examples, keys))

    def rows(self, examples: Sequence[Any], keys: Sequence[tuple[int, ...]]) -> list[Row]:
        """The corrupted segments one by one."""
        rows = []
        for number, (example, key) in enumerate(zip(examples, keys, strict=True)):
            ids = self.vocabulary.segment(example, number)
            if self.frame:
                ids = pack_single(ids, self.vocabulary).ids
            rows.append(Row(*self.masking.corrupt(ids, self.vocabulary, example_generator(key))))
        return rows

    def loss_sum(self, model: nn.Module, batch: EncoderBatch) -> tuple[Tensor, int]:
        """Summed loss in nats over the chosen tokens, and their number. The pair decision of a pretraining head is not
        trained."""
        found = headed(model, "masked_lm", "pretraining")
        return masked_loss_sum(found, encoder_states(found.body, batch), batch.target_ids)


@torch.no_grad()
def masked_log_probs(model: nn.Module, ids: Ids, positions: Sequence[int], vocabulary: EncoderVocabulary) -> Tensor:
    """(positions,): natural log-probability of the token at each of `positions` once all of these are [MASK].

    A masked model predicts hidden tokens independently of each other, so their joint log-probability, as far as it
    knows one, is the sum. Raises DataError for a position outside the sequence or named twice.
    """
    original = vocabulary.checked(ids, "the sequence")
    if len(set(positions)) != len(positions) or not all(0 <= place < len(original) for place in positions):
        raise DataError(f"positions must be different and within {len(original)} tokens, got {list(positions)}")
    hidden_ids = original.copy()
    hidden_ids[list(positions)] = vocabulary.mask_id
    stack = headed(model, "masked_lm", "pretraining")
    batch = EncoderBatch.from_rows([Row(hidden_ids, original)]).to(stack.body.embed_tokens.weight.device)
    states = encoder_states(stack.body, batch)[list(positions)]
    head = stack.head
    assert isinstance(head, MaskedLMHead)
    logprobs = head.decoder(head.transform(states)).float().log_softmax(dim=-1)
    chosen: Tensor = logprobs.gather(1, batch.target_ids[list(positions), None]).squeeze(1)
    return chosen

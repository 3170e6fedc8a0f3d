"""Noises of a denoising autoencoder: each changes a text and says what it did, so that it can be undone.

Token masking, token deletion, text infilling, sentence permutation and document rotation are BART's five; masking
whole runs, reordering and altering tokens are relatives.

Source: Lewis et al. 2020 (BART), section 2.2; Joshi et al. 2020 (runs); Lample et al. 2018 (reordering).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from gristmill.errors import DataError, closest
from gristmill.objectives.spans import Span, choose_places, choose_spans, place_spans, replace_spans, share

Noise = Literal[
    "identity",
    "token_masking",
    "run_masking",
    "token_deletion",
    "text_infilling",
    "token_alteration",
    "token_reordering",
    "sentence_permutation",
    "document_rotation",
]


@dataclass(frozen=True, eq=False)
class Noised:
    """A noisy text and what was done to it.

    `spans` are the stretches of the clean text that no longer stand there, and `left[i]` is how many tokens stand in
    place of the i-th. `order`, where tokens moved: noisy token i is clean token order[i].
    """

    ids: np.ndarray
    spans: tuple[Span, ...] = ()
    left: tuple[int, ...] = ()
    order: np.ndarray | None = None

    def restored(self, hidden: Sequence[Sequence[int]]) -> np.ndarray:
        """The clean text, given what stood in the spans."""
        if self.order is not None:
            clean = np.empty_like(self.ids)
            clean[self.order] = self.ids
            return clean
        parts, at, clean_at = [], 0, 0
        for (start, end), left, tokens in zip(self.spans, self.left, hidden, strict=True):
            parts += [self.ids[at : at + start - clean_at], np.asarray(tokens, np.int64)]
            at, clean_at = at + start - clean_at + left, end
        return np.concatenate([*parts, self.ids[at:]])


def mask_tokens(ids: np.ndarray, spans: Sequence[Span], mask_id: int) -> Noised:
    """Every token of the spans becomes a mask, so the length stays."""
    sizes = tuple(end - start for start, end in spans)
    noisy = ids.copy()
    for start, end in spans:
        noisy[start:end] = mask_id
    return Noised(noisy, tuple(spans), sizes)


def delete_tokens(ids: np.ndarray, places: np.ndarray) -> Noised:
    """The tokens at `places` vanish without a trace."""
    return Noised(np.delete(ids, places), _singles(places), (0,) * len(places))


def infill(ids: np.ndarray, spans: Sequence[Span], mask_id: int) -> Noised:
    """Each span, however long, becomes one mask; an empty span inserts one."""
    return Noised(replace_spans(ids, spans, [[mask_id]] * len(spans)), tuple(spans), (1,) * len(spans))


def alter_tokens(ids: np.ndarray, places: np.ndarray, replacements: np.ndarray) -> Noised:
    """The tokens at `places` become others."""
    noisy = ids.copy()
    noisy[places] = replacements
    return Noised(noisy, _singles(places), (1,) * len(places))


def reorder_tokens(ids: np.ndarray, order: np.ndarray) -> Noised:
    """Noisy token i is clean token order[i]."""
    return Noised(ids[order], order=order)


def permute_sentences(ids: np.ndarray, order: Sequence[int], sentence_ends: frozenset[int]) -> Noised:
    """The sentences of the text, in another order: the i-th is the clean one order[i]."""
    sentences = split_sentences(ids, sentence_ends)
    return reorder_tokens(ids, np.concatenate([np.arange(*sentences[number]) for number in order]))


def rotate(ids: np.ndarray, start: int) -> Noised:
    """The text from token `start` on, followed by what stood before it."""
    return reorder_tokens(ids, np.roll(np.arange(len(ids)), -start))


def split_sentences(ids: np.ndarray, sentence_ends: frozenset[int]) -> list[Span]:
    """Sentences: each up to and with a token of `sentence_ends`, or the end of the text."""
    cuts = (np.flatnonzero(np.isin(ids, list(sentence_ends))) + 1).tolist()
    ends = [*cuts, *([] if cuts and cuts[-1] == len(ids) else [len(ids)])]
    return list(zip([0, *ends[:-1]], ends, strict=True))


@dataclass(frozen=True, kw_only=True)
class NoiseOptions:
    """What noises need to know. Published shares: 0.3 for infilling with a mean of 3.

    rate: share of the tokens that is masked, deleted, altered or infilled. mean_span: of runs, and of the Poisson
    lengths of infilled spans. max_inserted: most empty spans that infilling adds to one text; 0 for none.
    sentence_ends: tokens that end a sentence. replacements: tokens that altered ones may become.
    """

    mask_id: int
    rate: float = 0.3
    mean_span: float = 3.0
    max_inserted: int = 16
    sentence_ends: frozenset[int] = frozenset()
    replacements: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 < self.rate <= 1.0:
            raise DataError(f"rate must be in (0, 1], got {self.rate}")
        if not self.mean_span >= 1.0:
            raise DataError(f"mean_span must be at least 1, got {self.mean_span}")
        if self.max_inserted < 0:
            raise DataError(f"max_inserted must be 0 or more, got {self.max_inserted}")

    def require(self, noise: str) -> None:
        """Raise DataError for an unknown noise, or one whose option is missing."""
        if noise not in get_args(Noise):
            raise DataError(f"unknown noise {noise!r}.{closest(noise, get_args(Noise))}")
        if noise == "sentence_permutation" and not self.sentence_ends:
            raise DataError("sentence_permutation needs sentence_ends, the tokens that end a sentence")
        if noise == "token_alteration" and len(set(self.replacements)) < 2:
            raise DataError("token_alteration needs replacements, at least two tokens that altered ones may become")


def add_noise(noise: Noise, ids: np.ndarray, options: NoiseOptions, generator: np.random.Generator) -> Noised:
    """One noise with its random choices drawn. Raises DataError as `NoiseOptions.require` does."""
    options.require(noise)
    length = len(ids)
    match noise:
        case "identity":
            return Noised(ids)
        case "token_masking":
            return mask_tokens(ids, _singles(choose_places(generator, length, options.rate)), options.mask_id)
        case "run_masking":
            return mask_tokens(ids, choose_spans(generator, length, options.rate, options.mean_span), options.mask_id)
        case "token_deletion":
            return delete_tokens(ids, choose_places(generator, length, options.rate))
        case "text_infilling":
            return infill(
                ids, place_spans(generator, length, infill_lengths(generator, length, options)), options.mask_id
            )
        case "token_alteration":
            places = choose_places(generator, length, options.rate)
            return alter_tokens(ids, places, _others(generator, ids[places], options.replacements))
        case "token_reordering":
            return reorder_tokens(ids, generator.permutation(length))
        case "sentence_permutation":
            count = len(split_sentences(ids, options.sentence_ends))
            return permute_sentences(ids, generator.permutation(count).tolist(), options.sentence_ends)
    return rotate(ids, int(generator.integers(length)))


def infill_lengths(generator: np.random.Generator, length: int, options: NoiseOptions) -> list[int]:
    """Poisson lengths of infilled spans, drawn until they hide `share(rate, length)` of `length` tokens.

    The last one is cut to fit; empty ones beyond `max_inserted`, or beyond what the text can keep apart, are drawn
    again.
    """
    lengths: list[int] = []
    hidden, empty = share(options.rate, length), 0
    while hidden:
        size = min(int(generator.poisson(options.mean_span)), hidden)
        room = length - sum(lengths) - hidden - len(lengths)  # visible tokens that no pair of spans needs yet
        if size == 0 and (empty == options.max_inserted or room < 1):
            continue
        if room < 1:
            size = hidden  # no further span could stand apart
        lengths.append(size)
        hidden, empty = hidden - size, empty + (size == 0)
    return lengths


def _singles(places: np.ndarray) -> tuple[Span, ...]:
    return tuple((place, place + 1) for place in places.tolist())


def _others(generator: np.random.Generator, ids: np.ndarray, choices: Sequence[int]) -> np.ndarray:
    """For each token another one of `choices`."""
    known = np.unique(choices)
    at = np.searchsorted(known, ids)
    inside = (at < len(known)) & (known[np.minimum(at, len(known) - 1)] == ids)
    drawn = generator.integers(len(known) - inside)  # one choice less where the token itself is one
    others: np.ndarray = known[drawn + (inside & (drawn >= at))]
    return others

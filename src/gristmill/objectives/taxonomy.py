"""Self-supervised objectives in one table: five families, fifteen rows, and which kind of model each can train.

Source: Xiao and Zhu 2025, section 1.2.4 and table 1.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from gristmill.core import Objective
from gristmill.errors import DataError, closest
from gristmill.objectives.bert import BertPretraining
from gristmill.objectives.causal import CausalLM
from gristmill.objectives.denoising import Denoising
from gristmill.objectives.masked import PLAIN, MaskedLM, Masking
from gristmill.objectives.masked_pair import MaskedPair
from gristmill.objectives.mass import Mass
from gristmill.objectives.noising import Noise, NoiseOptions
from gristmill.objectives.permuted import PermutedLM
from gristmill.objectives.prefix import PrefixLM, PrefixPair
from gristmill.objectives.sentence_comparison import SentenceComparison
from gristmill.objectives.sequence_pair import Framing
from gristmill.objectives.span_corruption import SpanCorruption
from gristmill.objectives.token_classification import TokenClassification
from gristmill.objectives.vocabulary import EncoderVocabulary

Architecture = Literal["encoder", "decoder", "encoder_decoder"]
Family = Literal[
    "language modelling", "masked language modelling", "permuted language modelling", "discriminative", "denoising"
]


@dataclass(frozen=True, kw_only=True)
class Symbols:
    """Ids of the tokens that objectives put into texts: all that they know of a vocabulary of `size` tokens.

    sentence_ends: tokens that end a sentence. Raises DataError as `EncoderVocabulary` does.
    """

    size: int
    cls: int
    sep: int
    mask: int
    start: int
    sentinels: tuple[int, ...]
    sentence_ends: frozenset[int]

    @property
    def vocabulary(self) -> EncoderVocabulary:
        """What masking needs."""
        special = frozenset({self.start, *self.sentinels})
        return EncoderVocabulary(
            size=self.size, mask_id=self.mask, cls_id=self.cls, sep_id=self.sep, special_ids=special
        )

    @property
    def framing(self) -> Framing:
        """[CLS] before the source; the target follows the start token and ends with [SEP]."""
        return Framing(
            vocab_size=self.size, decoder_start=self.start, source_before=(self.cls,), target_after=(self.sep,)
        )


Build = Callable[..., Objective]
"""(symbols, **options of the objective) -> the objective."""


@dataclass(frozen=True)
class Entry:
    """A row of the table: `builds` has the architectures that it goes with."""

    name: str
    family: Family
    builds: Mapping[Architecture, Build]


def _masked(base: Masking) -> dict[Architecture, Build]:
    def masking(options: Mapping[str, Any]) -> Masking:
        return Masking(**{**vars(base), **options})

    return {
        "encoder": lambda symbols, **options: MaskedLM(symbols.vocabulary, masking(options)),
        "encoder_decoder": lambda symbols, **options: MaskedPair(symbols.framing, symbols.vocabulary, masking(options)),
    }


def _mass() -> dict[Architecture, Build]:
    def encoder(symbols: Symbols, rate: float = 0.5) -> Objective:
        masking = Masking(rate=rate, unit="fragment", mask_share=1.0, random_share=0.0)
        return MaskedLM(symbols.vocabulary, masking)

    return {
        "encoder": encoder,
        "encoder_decoder": lambda symbols, **options: Mass(symbols.framing, symbols.vocabulary, **options),
    }


def _denoising(noise: Noise) -> dict[Architecture, Build]:
    def build(symbols: Symbols, **options: Any) -> Objective:
        noises = NoiseOptions(mask_id=symbols.mask, sentence_ends=symbols.sentence_ends, **options)
        return Denoising(symbols.framing, {noise: 1.0}, noises)

    return {"encoder_decoder": build}


def _classes(symbols: Symbols, classes: int = 2) -> Objective:
    return TokenClassification(symbols.vocabulary, classes)


TAXONOMY: tuple[Entry, ...] = (
    Entry(
        "causal LM",
        "language modelling",
        {
            "decoder": lambda symbols: CausalLM(),
            "encoder_decoder": lambda symbols: PrefixPair(symbols.framing, 0),
        },
    ),
    Entry(
        "prefix LM",
        "language modelling",
        {
            "decoder": lambda symbols, **options: PrefixLM(**options),
            "encoder_decoder": lambda symbols, **options: PrefixPair(symbols.framing, **options),
        },
    ),
    Entry("masked LM", "masked language modelling", _masked(PLAIN)),
    Entry("MASS-style", "masked language modelling", _mass()),
    Entry("BERT-style", "masked language modelling", _masked(Masking())),
    Entry(
        "permuted LM",
        "permuted language modelling",
        {"encoder": lambda symbols, **options: PermutedLM(symbols.vocabulary, **options)},
    ),
    Entry(
        "next sentence prediction",
        "discriminative",
        {"encoder": lambda symbols, **options: BertPretraining(symbols.vocabulary, Masking(**options))},
    ),
    Entry(
        "sentence comparison",
        "discriminative",
        {"encoder": lambda symbols, **options: SentenceComparison(symbols.vocabulary, **options)},
    ),
    Entry("token classification", "discriminative", {"encoder": _classes}),
    Entry("token reordering", "denoising", _denoising("token_reordering")),
    Entry("token deletion", "denoising", _denoising("token_deletion")),
    Entry("span masking", "denoising", _denoising("text_infilling")),
    Entry(
        "sentinel masking",
        "denoising",
        {"encoder_decoder": lambda symbols, **options: SpanCorruption(symbols.framing, symbols.sentinels, **options)},
    ),
    Entry("sentence reordering", "denoising", _denoising("sentence_permutation")),
    Entry("document rotation", "denoising", _denoising("document_rotation")),
)


def pairs() -> list[tuple[Entry, Architecture]]:
    """Every row with each architecture that it goes with, in the order of the table."""
    return [(entry, architecture) for entry in TAXONOMY for architecture in entry.builds]


def build_objective(name: str, architecture: Architecture, symbols: Symbols, **options: Any) -> Objective:
    """The objective of a row for a kind of model. `options` are those of the objective's own class, or of its noise or
    masking. Raises DataError for an unknown row, or one that does not go with the architecture."""
    entry = next((entry for entry in TAXONOMY if entry.name == name), None)
    if entry is None:
        raise DataError(f"unknown objective {name!r}.{closest(name, [entry.name for entry in TAXONOMY])}")
    build = entry.builds.get(architecture)
    if build is None:
        known = ", ".join(get_args(Architecture))
        raise DataError(f"{name} goes with {', '.join(entry.builds)}, not with {architecture!r} (of {known})")
    return build(symbols, **options)

"""Encoder-decoder objectives, and those of decoders beside the causal one, as cases of the conformance suite."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from conformance.objective import ObjectiveCase, numbers
from gristmill.core import Objective
from gristmill.model.config import EncoderDecoderConfig
from gristmill.model.encoder_decoder import EncoderDecoder
from gristmill.model.transformer import Transformer
from gristmill.objectives.denoising import BART, Denoising
from gristmill.objectives.fill_in_middle import FillInMiddle, MiddleTokens
from gristmill.objectives.masked import Masking
from gristmill.objectives.masked_pair import MaskedPair
from gristmill.objectives.mass import Mass
from gristmill.objectives.multi_token import MultiToken, MultiTokenModel
from gristmill.objectives.noising import NoiseOptions
from gristmill.objectives.prefix import PrefixLM, PrefixPair
from gristmill.objectives.sequence_pair import Framing, SequenceToSequence
from gristmill.objectives.span_corruption import SpanCorruption
from gristmill.objectives.text_to_text import TextPair, TextToText
from gristmill.objectives.ul2 import UL2
from gristmill.objectives.vocabulary import EncoderVocabulary
from gristmill.tokens.tokenizer import Tokenizer
from model import tiny

SIZE = 64
FRAMING = Framing.t5(SIZE)
MASK, FIRST = 2, 3
SENTINELS = tuple(range(50, 60))
MODES: Any = {"R": 60, "S": 61, "X": 62}
VOCABULARY = EncoderVocabulary(size=SIZE, mask_id=MASK, special_ids=frozenset({0, 1, *range(50, 64)}))
NOISE = NoiseOptions(mask_id=MASK, sentence_ends=frozenset({9}), replacements=tuple(range(FIRST, 50)))
SMALL = {"vocab_size": SIZE, "hidden_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 64}
SIDE: Any = replace(tiny.CONFIG, **SMALL, initializer_range=0.1)


def encoder_decoder() -> EncoderDecoder:
    """One layer a side."""
    sides = {"encoder": replace(SIDE, causal=False), "decoder": replace(SIDE, cross_attention=True)}
    model = EncoderDecoder(EncoderDecoderConfig(**sides, decoder_start_token_id=0))
    model.initialise(0)
    return model


def decoder() -> Transformer:
    """Two layers."""
    model = Transformer(replace(SIDE, num_hidden_layers=2))
    model.initialise(0)
    return model


def multi_token() -> MultiTokenModel:
    """Two heads beside the next token's."""
    model = MultiTokenModel(Transformer(SIDE), 2)
    model.initialise(0)
    return model


def segment(number: int) -> tuple[list[int], None]:
    """A text of 4 to 12 tokens, none of them special."""
    return numbers(number, (4, 12), 50, above=FIRST), None


def masked_segment(number: int) -> tuple[list[int], list[int]]:
    """The same, of which the first token of two is learned."""
    ids, _ = segment(number)
    return ids, [1, 0] * (len(ids) // 2) + [1] * (len(ids) % 2)


def words(number: int) -> TextPair:
    """A task in words."""
    source, target = (" ".join(f"w{i}" for i in numbers(number + 100 * side, (2, 6), 40)) for side in range(2))
    return TextPair(source, target)


def tokenizer() -> Tokenizer:
    """One token per word, and a special one."""
    backend = Backend(WordLevel({f"w{i}": i + FIRST for i in range(40)} | {"<s>": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend)


def cases() -> list[ObjectiveCase]:
    """One case per objective, and per kind of model where it has two."""
    bad = {"empty": ([], None), "mask": ([5, 6, 7], [1, 1, 1])}
    in_vocabulary = {**bad, "outside": ([5, SIZE], None), "negative": ([-1, 5], None)}
    marked = {**in_vocabulary, "reserved": ([5, MASK, 6], None)}
    every = ("token_masking", "run_masking", "token_deletion", "token_alteration", "token_reordering")
    mixture: Any = dict.fromkeys((*every, "text_infilling", "sentence_permutation", "document_rotation"), 1.0)
    pairs: dict[str, tuple[Objective, dict[str, Any]]] = {
        "span corruption": (SpanCorruption(FRAMING, SENTINELS), {**in_vocabulary, "sentinel": ([5, 50], None)}),
        "denoising, a mixture": (Denoising(FRAMING, mixture, NOISE), marked),
        "denoising, BART's": (Denoising(Framing.bart(SIZE, begin=0, end=1), BART, NOISE), marked),
        "masked pair": (MaskedPair(FRAMING, VOCABULARY), marked),
        "masked pair, 80/10/10": (MaskedPair(FRAMING, VOCABULARY, Masking(rate=0.4)), marked),
        "MASS": (Mass(FRAMING, VOCABULARY), marked),
        "prefix pair": (PrefixPair(FRAMING), in_vocabulary),
        "UL2": (UL2(FRAMING, SENTINELS, MODES), in_vocabulary),
    }
    uniform = {"loss": math.log(SIZE)}
    found = [
        ObjectiveCase(name, objective, encoder_decoder, segment, refused, uniform)
        for name, (objective, refused) in pairs.items()
    ]
    marks = MiddleTokens(60, 61, 62, 63)
    terms = {name: math.log(SIZE) for name in ("next", "ahead_2", "ahead_3")}
    wrong_mask = {"empty": ([], None), "mask": ([5, 6], [1])}
    empty = {"no source": ([], [5]), "outside": ([5], [SIZE])}
    example = {"source": words(1).source, "target": words(1).target}
    texts = {"special": TextPair(example["source"] + " <s>", "w1"), "no target": TextPair("w1", "")}
    pair = SequenceToSequence(Framing(vocab_size=SIZE, decoder_start=0))
    return [
        *found,
        ObjectiveCase(
            "sequence to sequence",
            pair,
            encoder_decoder,
            lambda n: (segment(n)[0], segment(n + 50)[0]),
            empty,
            uniform,
            random=False,
        ),
        ObjectiveCase(
            "text to text", TextToText(FRAMING, tokenizer()), encoder_decoder, words, texts, uniform, random=False
        ),
        ObjectiveCase("prefix LM", PrefixLM(), decoder, segment, bad, uniform),
        ObjectiveCase(
            "fill in the middle", FillInMiddle(marks), decoder, segment, {**bad, "mark": ([5, 60], None)}, uniform
        ),
        ObjectiveCase("multi-token", MultiToken(2), multi_token, segment, wrong_mask, terms, random=False),
        ObjectiveCase(
            "multi-token, masks", MultiToken(2), multi_token, masked_segment, wrong_mask, terms, random=False
        ),
    ]

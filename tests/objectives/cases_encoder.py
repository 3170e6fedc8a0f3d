"""Cases of the conformance suite for encoders, and the small models and vocabularies that their tests share."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from conformance.objective import ObjectiveCase, numbers
from gristmill.model.config import ModelConfig
from gristmill.model.encoder import Encoder
from gristmill.model.formats.families.bert import post_norm
from gristmill.model.heads import HeadConfig, Headed
from gristmill.objectives.bert import BertPretraining
from gristmill.objectives.masked import PLAIN, MaskedLM, Masking
from gristmill.objectives.pairs import SentencePair
from gristmill.objectives.permuted import PermutedLM
from gristmill.objectives.replaced_token import Electra, ReplacedToken
from gristmill.objectives.sentence_comparison import ScoredPair, SentenceComparison
from gristmill.objectives.token_classification import LabelledTokens, TokenClassification
from gristmill.objectives.translation import Tagged, TranslationLM
from gristmill.objectives.vocabulary import EncoderVocabulary

SIZE, CLS, SEP, MASK, FIRST = 64, 1, 2, 3, 5
"""Vocabulary, special ids, and the first of those that are not special; 0 is padding, 4 unknown."""

VOCABULARY = EncoderVocabulary(
    size=SIZE,
    mask_id=MASK,
    cls_id=CLS,
    sep_id=SEP,
    special_ids=frozenset({0, 4}),
    continues=np.arange(SIZE) >= 44,  # the last twenty go on with a word
)
UNFRAMED = EncoderVocabulary(size=SIZE, mask_id=MASK, special_ids=frozenset({0, 1, 2, 4}))

CONFIG = post_norm(
    hidden_size=32,
    heads=4,
    eps=1e-12,
    activation="gelu",
    token_types=2,
    vocab_size=SIZE,
    num_hidden_layers=2,
    intermediate_size=48,
    max_position_embeddings=64,
    initializer_range=0.15,
)
MASKED_HEAD = HeadConfig(kind="masked_lm", dense="gelu", norm=True)
PRETRAINING_HEAD = HeadConfig(kind="pretraining", dense="gelu", norm=True)
LABELS = ("O", "B", "I")


def headed(head: HeadConfig = MASKED_HEAD, config: ModelConfig = CONFIG, seed: int = 0) -> Headed:
    """A small random encoder with a head."""
    model = Headed(Encoder(config), head)
    model.initialise(seed)
    return model


def encoder() -> Encoder:
    model = Encoder(CONFIG)
    model.initialise(0)
    return model


def electra(*, share_embeddings: bool = True) -> Electra:
    """A discriminator and a generator of half its layers."""
    small = replace(CONFIG, num_hidden_layers=1)
    discriminator = headed(HeadConfig(kind="replaced_token", dense="gelu"))
    return Electra(headed(config=small, seed=1), discriminator, share_embeddings=share_embeddings)


class Words:
    """A vocabulary of the words of some texts, after the special ones."""

    def __init__(self, *texts: str) -> None:
        self.words = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *dict.fromkeys(" ".join(texts).split())]
        self.words = list(dict.fromkeys(self.words))
        self.vocabulary = EncoderVocabulary(
            size=len(self.words), mask_id=MASK, cls_id=CLS, sep_id=SEP, special_ids=frozenset({0, 4})
        )

    def ids(self, text: str) -> np.ndarray:
        return np.array([self.words.index(word) for word in text.split()])

    def text(self, ids: Any) -> str:
        """The words again; _ where nothing is predicted."""
        return " ".join("_" if index < 0 else self.words[index] for index in np.asarray(ids).tolist())

    def model(self, head: HeadConfig = MASKED_HEAD, **changes: Any) -> Headed:
        """A small model over these words."""
        return headed(head, replace(CONFIG, vocab_size=len(self.words), **changes)).eval()


def words(seed: int, least: int = 6, most: int = 20) -> list[int]:
    """Random ordinary tokens."""
    return numbers(seed, (least, most), SIZE, above=FIRST)


def segment(number: int) -> tuple[list[int], None]:
    return words(number), None


def pair(number: int) -> SentencePair:
    return SentencePair(words(number), words(100 + number), number % 2)


def translation(number: int) -> list[Tagged]:
    both = [Tagged(words(number), 0), Tagged(words(100 + number), 1)]
    return both[: 1 + number % 2]


def scored(number: int) -> ScoredPair:
    return ScoredPair(words(number), words(100 + number), (0.9, 0.1, 0.5)[number % 3])


def labelled(number: int) -> LabelledTokens:
    ids = words(number)
    return LabelledTokens(ids, [-100 if token % 7 == 0 else token % 3 for token in ids])


BAD_SEGMENTS: dict[str, Any] = {
    "empty": ([], None),
    "mask": ([5, 6], [1, 1]),
    "above": ([5, SIZE], None),
    "below": ([5, -1], None),
    "not whole": ([5.5, 6.0], None),
}


def cases() -> list[ObjectiveCase]:
    """One or more of every encoder objective."""
    vocabulary, choices = {"loss": math.log(SIZE)}, VOCABULARY
    maskings = {
        "masked": Masking(),
        "masked plainly": PLAIN,
        "masked words": Masking(unit="word"),
        "masked spans": Masking(unit="span", rate=0.3),
        "masked fragment": Masking(unit="fragment", rate=0.5, mask_share=1.0, random_share=0.0),
    }
    found = [
        ObjectiveCase(name, MaskedLM(choices, masking), headed, segment, BAD_SEGMENTS, vocabulary)
        for name, masking in maskings.items()
    ]
    bad_pairs = {
        "empty": SentencePair([], [5], 0),
        "empty second": SentencePair([5], [], 0),
        "unknown": SentencePair([5], [SIZE], 0),
    }
    bad_label = {"label": SentencePair([5], [6], 2), "no label": SentencePair([5], [6])}
    bad_texts = {
        "three": [Tagged([5]), Tagged([6]), Tagged([7])],
        "none": [],
        "empty": [Tagged([5]), Tagged([])],
        "unknown": [Tagged([SIZE])],
    }
    bad_scores = {
        "score": ScoredPair([5], [6], 1.5),
        "not a number": ScoredPair([5], [6], math.nan),
        "empty": ScoredPair([5], [], 0.5),
        "unknown": ScoredPair([-5], [5], 0.5),
    }
    bad_labels = {
        "length": LabelledTokens([5, 6], [0]),
        "class": LabelledTokens([5, 6], [0, 3]),
        "empty": LabelledTokens([], []),
        "unknown": LabelledTokens([SIZE], [0]),
    }
    token_head = HeadConfig(kind="token_classifier", labels=LABELS)
    uniform_pair = {"masked_lm": math.log(SIZE), "pair": math.log(2)}
    uniform_electra = {"generator": math.log(SIZE), "discriminator": math.log(2)}
    return [
        *found,
        ObjectiveCase("masked unframed", MaskedLM(UNFRAMED, frame=False), headed, segment, BAD_SEGMENTS, vocabulary),
        ObjectiveCase(
            "bert",
            BertPretraining(choices),
            lambda: headed(PRETRAINING_HEAD),
            pair,
            bad_pairs | bad_label,
            uniform_pair,
        ),
        ObjectiveCase("bert alone", BertPretraining(choices, pair=False), headed, pair, bad_pairs, uniform_pair),
        ObjectiveCase("permuted", PermutedLM(choices), headed, segment, BAD_SEGMENTS, vocabulary),
        ObjectiveCase("permuted end", PermutedLM(choices, share=0.3), headed, segment, BAD_SEGMENTS, vocabulary),
        ObjectiveCase("replaced tokens", ReplacedToken(choices), electra, segment, BAD_SEGMENTS, uniform_electra),
        ObjectiveCase("translation", TranslationLM(choices), headed, translation, bad_texts, vocabulary),
        ObjectiveCase(
            "translation tagged",
            TranslationLM(choices, languages=2),
            headed,
            translation,
            bad_texts | {"language": [Tagged([5], 2)]},
            vocabulary,
        ),
        ObjectiveCase("comparison", SentenceComparison(choices), encoder, scored, bad_scores, random=False),
        ObjectiveCase(
            "comparison logistic",
            SentenceComparison(choices, loss="logistic", how="dot", pooling="cls", scale=0.1),
            encoder,
            scored,
            bad_scores | {"negative": ScoredPair([5], [6], -0.5)},
            {"loss": math.log(2)},
            random=False,
        ),
        ObjectiveCase(
            "token classification",
            TokenClassification(choices, len(LABELS)),
            lambda: headed(token_head),
            labelled,
            bad_labels,
            {"loss": math.log(3)},
            random=False,
        ),
    ]

"""Sentences as token ids, one per word, so that a test can be read."""

from __future__ import annotations

import numpy as np

from gristmill.objectives.sequence_pair import Framing, Pair, PairBatch
from gristmill.tokens.batch import IGNORED

SPECIAL = ("[CLS]", "<s>", "[MASK]", "[SEP]", "[X]", "[Y]", "[Z]")
PUPPIES = "The puppies are frolicking outside the house ."
KITTEN = "The kitten is chasing the ball ."
SWIFTLY = f"{KITTEN} The ball rolls away swiftly ."
WORK = "Hard work leads to success . Success brings happiness ."
VOCABULARY = [*SPECIAL, *dict.fromkeys(f"{PUPPIES} {SWIFTLY} {WORK} playing Birds eat worms".split())]
CLS, START, MASK, SEP, *SENTINELS = range(len(SPECIAL))
STOP = frozenset({VOCABULARY.index(".")})
FRAMING = Framing(vocab_size=len(VOCABULARY), decoder_start=START, source_before=(CLS,))


def ids(text: str) -> np.ndarray:
    """One id per word."""
    return np.array([VOCABULARY.index(word) for word in text.split()], np.int64)


def text(tokens: object) -> str:
    """The words again; a place without target is _."""
    return " ".join("_" if token == IGNORED else VOCABULARY[token] for token in np.asarray(tokens).tolist())


def show(pair: Pair) -> tuple[str, str, str]:
    """What the encoder reads, what the decoder reads, and what it is to predict."""
    batch = PairBatch.from_pairs([pair], FRAMING)
    return text(batch.source.input_ids), text(batch.target.input_ids), text(batch.target.target_ids)

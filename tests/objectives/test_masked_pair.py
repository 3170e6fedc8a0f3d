"""Masked training of an encoder-decoder: which places are learned, and what the decoder may see."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gristmill.errors import DataError
from gristmill.objectives.masked import PLAIN, Corrupted, Masking
from gristmill.objectives.masked_pair import MaskedPair, masked_pair
from gristmill.objectives.mass import Mass
from gristmill.objectives.sequence_pair import Framing, PairBatch
from gristmill.tokens.batch import IGNORED
from objectives import cases_seq2seq
from objectives.cases_seq2seq import encoder_decoder
from objectives.words import KITTEN, MASK, PUPPIES, ids, show

FRAME, VOCABULARY = cases_seq2seq.FRAMING, cases_seq2seq.VOCABULARY


def pair(clean: str, noisy: str, learned: list[int]) -> tuple[str, str, str]:
    target = np.where(np.isin(np.arange(len(ids(clean))), learned), ids(clean), IGNORED)
    return show(masked_pair(Corrupted(ids(noisy), target), MASK))


def test_the_worked_sentence_learns_two_tokens() -> None:
    noisy = "The puppies are [MASK] outside [MASK] house ."
    source, reads, target = pair(PUPPIES, noisy, [3, 5])
    assert source == f"[CLS] {noisy}"
    assert reads == "<s> [MASK] [MASK] [MASK] frolicking [MASK] the [MASK]"
    assert target == "_ _ _ frolicking _ the _ _"


def test_the_rows_of_the_taxonomy() -> None:
    assert pair(KITTEN, "The kitten [MASK] chasing the [MASK] .", [2, 5])[2] == "_ _ is _ _ ball _"
    bert = pair(KITTEN, "The kitten [MASK] playing the [MASK] .", [1, 2, 3, 5])
    assert bert[0] == "[CLS] The kitten [MASK] playing the [MASK] ."
    assert bert[2] == "_ kitten is chasing _ ball _"
    filled = [a if b == "_" else b for a, b in zip(bert[0].split()[1:], bert[2].split(), strict=True)]
    assert " ".join(filled) == KITTEN
    mass = pair(KITTEN, "The kitten [MASK] [MASK] [MASK] ball .", [2, 3, 4])
    assert mass[0] == "[CLS] The kitten [MASK] [MASK] [MASK] ball ."
    assert mass[1] == "<s> [MASK] [MASK] is chasing the [MASK]"
    assert mass[2] == "_ _ is chasing the _ _"


def made(objective: MaskedPair | Mass, text: list[int], key: int = 0) -> tuple[list[int], list[int], list[int]]:
    batch = objective.prepare([(text, None)], [(key,)])
    ends = len(FRAME.source_after)
    return (
        batch.source.input_ids[:-ends].tolist(),
        batch.target.input_ids.tolist(),
        batch.target.target_ids.tolist(),
    )


@given(st.lists(st.integers(3, 49), min_size=1, max_size=40), st.floats(0.01, 1.0), st.integers(0, 1000))
def test_targets_fill_the_source_up_to_the_text(text: list[int], rate: float, key: int) -> None:
    for objective in (
        MaskedPair(FRAME, VOCABULARY, replace(PLAIN, rate=rate)),
        MaskedPair(FRAME, VOCABULARY, Masking(rate=rate, mask_share=0.4, random_share=0.3)),
        Mass(FRAME, VOCABULARY, rate=rate),
    ):
        source, reads, target = made(objective, text, key)
        learned = [place for place, token in enumerate(target) if token != IGNORED]
        assert max(1, int(rate * len(text))) <= len(learned) <= math.ceil(rate * len(text))
        assert [target[i] if i in learned else source[i] for i in range(len(text))] == text
        # the decoder reads no token that it is not to learn
        assert reads[0] == 0
        assert all(token == (text[i] if i in learned else 2) for i, token in enumerate(reads[1 : len(text)]))
        if isinstance(objective, Mass):
            assert learned == list(range(learned[0], learned[-1] + 1))  # one run
            assert [place for place, token in enumerate(source) if token == 2] == learned


def test_shares_of_what_becomes_of_selected_tokens() -> None:
    text = list(range(3, 50)) * 40
    objective = MaskedPair(FRAME, VOCABULARY, Masking(rate=0.5))
    source, _, target = made(objective, text)
    learned = [place for place, token in enumerate(target[:-1]) if token != IGNORED]
    fates = ["mask" if source[i] == 2 else "kept" if source[i] == text[i] else "random" for i in learned]
    for fate, share in (("mask", 0.8), ("kept", 0.1), ("random", 0.1)):
        assert fates.count(fate) / len(fates) == pytest.approx(share, abs=0.04)


def test_a_source_of_masks_says_only_how_long_the_text_is() -> None:
    noisy = " ".join(["[MASK]"] * 8)
    assert pair(PUPPIES, noisy, list(range(8))) == (
        f"[CLS] {noisy}",
        "<s> " + PUPPIES.removesuffix(" ."),
        PUPPIES,
    )
    model, objective = encoder_decoder(), MaskedPair(FRAME, VOCABULARY, replace(PLAIN, rate=1.0))
    batches = [objective.prepare([(text, None)], [(0,)]) for text in ([5, 6, 7, 8], [15, 16, 17, 18])]
    assert batches[0].source.input_ids.tolist() == batches[1].source.input_ids.tolist() == [2, 2, 2, 2, 1]
    swapped = PairBatch(batches[1].source, batches[0].target, batches[0].kinds)
    with torch.no_grad():
        loss = objective.loss_sum(model, batches[0])
        assert objective.loss_sum(model, swapped) == loss
    assert loss[1] == 4


def test_a_fragment_of_one_token_and_of_the_whole_text() -> None:
    text = list(range(5, 15))
    alone = Mass(FRAME, VOCABULARY, rate=0.01).prepare([(text, None)], [(0,)])
    assert (alone.source.input_ids == 2).sum() == alone.target_count == 1

    whole = Mass(FRAME, VOCABULARY, rate=1.0).prepare([(text, None)], [(0,)])
    assert whole.source.input_ids.tolist() == [2] * 10 + [1]
    assert whole.target.input_ids.tolist() == [0, *text]
    assert whole.target.target_ids[:-1].tolist() == text


def test_the_frame_is_not_learned() -> None:
    framing = Framing.bart(cases_seq2seq.SIZE, begin=0, end=1)
    batch = Mass(framing, VOCABULARY, rate=1.0).prepare([([5, 6], None)], [(0,)])
    assert batch.target.input_ids.tolist() == [1, 0, 5, 6]
    assert batch.target.target_ids.tolist() == [IGNORED, 5, 6, IGNORED]


def test_options_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="rate"):
        Mass(FRAME, VOCABULARY, rate=0.0)
    with pytest.raises(DataError, match="the vocabulary has 64 tokens, the framing 31"):
        MaskedPair(replace(FRAME, vocab_size=31), VOCABULARY)

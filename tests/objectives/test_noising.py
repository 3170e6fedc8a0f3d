"""Noises: the worked sentences word for word, what each keeps, and that what it did can be undone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.errors import DataError
from gristmill.objectives.denoising import BART, Denoising
from gristmill.objectives.noising import (
    Noise,
    NoiseOptions,
    add_noise,
    delete_tokens,
    infill,
    mask_tokens,
    permute_sentences,
    reorder_tokens,
    rotate,
    split_sentences,
)
from gristmill.objectives.sequence_pair import Framing, Pair, PairBatch
from objectives.words import FRAMING, KITTEN, MASK, PUPPIES, STOP, SWIFTLY, WORK, ids, show, text

OPTIONS = NoiseOptions(mask_id=2, sentence_ends=frozenset({9}), replacements=tuple(range(5, 60)))
CHOSEN = [(3, 4), (5, 6)]  # frolicking, the


def noised(result: Any, clean: str) -> tuple[str, str]:
    """What the encoder reads and the decoder is to predict."""
    source, _, target = show(Pair(result.ids, ids(clean)))
    return source, target


def test_the_worked_sentences_of_each_noise() -> None:
    clean = ids(PUPPIES)
    masked = mask_tokens(clean, CHOSEN, MASK)
    assert noised(masked, PUPPIES) == ("[CLS] The puppies are [MASK] outside [MASK] house .", PUPPIES)
    run = mask_tokens(clean, [(3, 4), (5, 7)], MASK)
    assert noised(run, PUPPIES)[0] == "[CLS] The puppies are [MASK] outside [MASK] [MASK] ."
    assert text(delete_tokens(clean, np.array([3, 5])).ids) == "The puppies are outside house ."
    filled = infill(clean, [(1, 1), (3, 6)], MASK)
    assert text(filled.ids) == "The [MASK] puppies are [MASK] house ."
    work = ids(WORK)
    assert text(permute_sentences(work, [1, 0], STOP).ids) == (
        "Success brings happiness . Hard work leads to success ."
    )
    assert text(rotate(work, 2).ids) == "leads to success . Success brings happiness . Hard work"


def test_reconstruction_has_a_term_for_every_token() -> None:
    batch = PairBatch.from_pairs([Pair(mask_tokens(ids(PUPPIES), CHOSEN, MASK).ids, ids(PUPPIES))], FRAMING)
    assert batch.target_count == 8
    assert text(batch.target.input_ids) == "<s> The puppies are frolicking outside the house"


def test_the_sentences_of_the_taxonomy() -> None:
    kitten, both = ids(KITTEN), ids(SWIFTLY)
    moved = reorder_tokens(kitten, np.array([6, 1, 4, 3, 0, 2, 5]))
    assert text(moved.ids) == ". kitten the chasing The is ball"
    assert text(infill(kitten, [(2, 2), (3, 6)], MASK).ids) == "The kitten [MASK] is [MASK] ."
    swapped = permute_sentences(both, [1, 0], STOP)
    assert text(swapped.ids) == f"The ball rolls away swiftly . {KITTEN}"
    assert text(rotate(both, 3).ids) == "chasing the ball . The ball rolls away swiftly . The kitten is"


def draw(noise: Any, seed: int, length: int, options: NoiseOptions = OPTIONS) -> tuple[np.ndarray, Any]:
    generator = np.random.default_rng(seed)
    clean = generator.integers(5, 100, size=length)  # some tokens are replacements, some end sentences
    return clean, add_noise(noise, clean, options, generator)


@given(st.sampled_from(get_args(Noise)), st.integers(0, 2**32), st.integers(1, 90), st.floats(0.05, 1.0))
def test_every_noise_can_be_undone(noise: Noise, seed: int, length: int, rate: float) -> None:
    clean, found = draw(noise, seed, length, replace(OPTIONS, rate=rate))
    hidden = [clean[start:end].tolist() for start, end in found.spans]
    assert found.restored(hidden).tolist() == clean.tolist()
    taken = sum(end - start for start, end in found.spans)
    assert len(found.ids) == length - taken + sum(found.left)
    if found.order is None and noise != "identity":
        assert taken == min(max(1, round(rate * length)), length)


@given(st.integers(0, 2**32), st.integers(1, 90))
def test_masking_and_alteration_keep_the_length_and_change_just_the_places_recorded(seed: int, length: int) -> None:
    for noise in ("token_masking", "run_masking", "token_alteration"):
        clean, found = draw(noise, seed, length)
        changed = np.flatnonzero(found.ids != clean)
        places = [place for start, end in found.spans for place in range(start, end)]
        assert changed.tolist() == places
        assert len(found.ids) == length
        new = found.ids[places].tolist()
        assert set(new) <= ({2} if noise != "token_alteration" else set(OPTIONS.replacements))
        assert noise == "token_alteration" or new.count(2) == len(places)


@given(st.integers(0, 2**32), st.integers(1, 90))
def test_deletion_leaves_a_subsequence_without_marks(seed: int, length: int) -> None:
    clean, found = draw("token_deletion", seed, length)
    rest = iter(clean.tolist())
    assert all(token in rest for token in found.ids.tolist())  # in the same order
    assert len(found.ids) == length - len(found.spans)
    assert 2 not in found.ids


@given(st.integers(0, 2**32), st.integers(1, 200), st.integers(0, 5))
def test_infilling_puts_one_mask_for_each_span(seed: int, length: int, inserted: int) -> None:
    _, found = draw("text_infilling", seed, length, replace(OPTIONS, max_inserted=inserted, rate=0.5))
    assert (found.ids == 2).sum() == len(found.spans)
    empty = sum(start == end for start, end in found.spans)
    assert empty <= inserted
    assert all(end < start for (_, end), (start, _) in zip(found.spans, found.spans[1:], strict=False))
    assert len(found.ids) <= length + inserted


def test_lengths_of_infilled_spans_are_poisson_and_empty_ones_occur_when_allowed() -> None:
    sizes = Counter[int]()
    for seed in range(300):
        _, found = draw("text_infilling", seed, 200)
        sizes.update(end - start for start, end in found.spans[:-1])
    total = sum(sizes.values())
    expected = {0: 0.0498, 1: 0.1494, 2: 0.2240, 3: 0.2240, 4: 0.1680, 5: 0.1008}  # e^-3 3^k / k!
    for size, share in expected.items():
        assert sizes[size] / total == pytest.approx(share, abs=0.02)
    _, found = draw("text_infilling", 0, 200, replace(OPTIONS, max_inserted=0))
    assert all(start < end for start, end in found.spans)


@given(st.integers(0, 2**32), st.integers(1, 90))
def test_permuting_sentences_keeps_each_of_them_whole(seed: int, length: int) -> None:
    clean, found = draw("sentence_permutation", seed, length)
    # the last sentence may lack its end, so the noisy text is cut by the order, not at its ends
    sentences = [tuple(clean[start:end].tolist()) for start, end in split_sentences(clean, OPTIONS.sentence_ends)]
    breaks = np.flatnonzero(np.diff(found.order) != 1) + 1
    pieces = [tuple(piece.tolist()) for piece in np.split(found.ids, breaks)]
    assert sum(map(len, pieces)) == length
    flat = [token for sentence in sorted(sentences) for token in sentence]
    assert sorted(flat) == sorted(token for piece in pieces for token in piece)
    starts = {int(found.order[at]) for at in [0, *breaks.tolist()]}
    assert starts <= {start for start, _ in split_sentences(clean, OPTIONS.sentence_ends)}
    if len(sentences) == 1:
        assert found.ids.tolist() == clean.tolist()


def test_sentence_orders_are_uniform() -> None:
    clean = np.array([5, 9, 6, 9, 7, 9])
    found = Counter(
        tuple(add_noise("sentence_permutation", clean, OPTIONS, np.random.default_rng(seed)).ids.tolist())
        for seed in range(3000)
    )
    assert len(found) == 6
    assert sum((count - 500) ** 2 / 500 for count in found.values()) < 20.5  # chi-square, 5 degrees, p = 0.001


@given(st.integers(0, 2**32), st.integers(1, 90))
def test_rotation_is_cyclic(seed: int, length: int) -> None:
    clean, found = draw("document_rotation", seed, length)
    start = int(found.order[0])
    assert np.roll(found.ids, start).tolist() == clean.tolist()
    assert rotate(found.ids, (length - start) % length).ids.tolist() == clean.tolist()
    assert rotate(clean, 0).ids.tolist() == clean.tolist()


@given(st.integers(0, 2**32), st.integers(1, 90))
def test_reordering_keeps_the_tokens(seed: int, length: int) -> None:
    clean, found = draw("token_reordering", seed, length)
    assert sorted(found.ids.tolist()) == sorted(clean.tolist())


def test_alteration_draws_every_other_token_alike() -> None:
    options = replace(OPTIONS, rate=1.0, replacements=(5, 6, 7, 8))
    clean = np.full(6000, 6)
    found = Counter(add_noise("token_alteration", clean, options, np.random.default_rng(0)).ids.tolist())
    assert found.keys() == {5, 7, 8}
    assert sum((count - 2000) ** 2 / 2000 for count in found.values()) < 13.8


def test_a_mixture_follows_its_weights_and_every_target_is_clean() -> None:
    mixture: dict[Any, float] = {"token_masking": 5, "token_deletion": 3, ("token_reordering", "text_infilling"): 2}
    objective = Denoising(Framing.t5(100), mixture, OPTIONS)
    clean = np.arange(5, 25)
    batch = objective.prepare([(clean, None)] * 2000, [(0, i) for i in range(2000)])
    shares = {kind: count / 2000 for kind, count in Counter(batch.kinds).items()}
    assert shares == {
        "token_masking": pytest.approx(0.5, abs=0.04),
        "token_deletion": pytest.approx(0.3, abs=0.04),
        "token_reordering+text_infilling": pytest.approx(0.2, abs=0.04),
    }
    assert (batch.target.target_ids.view(2000, 21)[:, :-1].numpy() == clean).all()
    sources = batch.source.input_ids.split(batch.source.segment_lengths)
    for kind, source in zip(batch.kinds, sources, strict=True):
        assert (2 in source.tolist()) == (kind != "token_deletion")
        assert (len(source) == 15) == (kind == "token_deletion")


def test_the_published_noise_of_bart_permutes_and_infills() -> None:
    batch = Denoising(Framing.bart(100, begin=0, end=1), BART, OPTIONS).prepare([(np.arange(5, 35), None)], [(3,)])
    assert batch.kinds == ("sentence_permutation+text_infilling",)


def test_unfit_noises_are_refused_by_name() -> None:
    plain = NoiseOptions(mask_id=2)
    for mixture, why in [
        ({"token_maskin": 1.0}, "unknown noise 'token_maskin'. Did you mean token_masking"),
        ({"sentence_permutation": 1.0}, "needs sentence_ends"),
        ({"token_alteration": 1.0}, "needs replacements"),
        ({"token_masking": 0.0}, "the mixture needs weights"),
        ({"token_masking": -1.0, "identity": 2.0}, "the mixture needs weights"),
        ({}, "the mixture needs weights"),
    ]:
        with pytest.raises(DataError, match=why):
            Denoising(FRAMING, mixture, plain)  # type: ignore[arg-type]
    for options in ({"rate": 0.0}, {"rate": 1.5}, {"mean_span": 0.0}, {"max_inserted": -1}):
        with pytest.raises(DataError, match=next(iter(options))):
            NoiseOptions(mask_id=2, **options)
    with pytest.raises(DataError, match="kept for the mask, but stands in the text"):
        Denoising(FRAMING, {"identity": 1.0}, plain).prepare([([5, 2], None)], [(0,)])


def test_the_identity_is_a_copy_task_that_is_learned() -> None:
    import torch

    from objectives.cases_seq2seq import FRAMING as FRAME
    from objectives.cases_seq2seq import encoder_decoder, segment

    torch.manual_seed(0)
    objective, model = Denoising(FRAME, {"identity": 1.0}, OPTIONS), encoder_decoder()
    batch = objective.prepare([segment(n) for n in range(6)], [(n,) for n in range(6)])
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        total, count = objective.loss_sum(model, batch)
        optimiser.zero_grad()
        (total / count).backward()
        optimiser.step()
    assert total.item() / count < 0.05

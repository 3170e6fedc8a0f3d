"""The table of objectives: its fifteen rows, its twenty marks, and each row made by the objective that it builds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gristmill.errors import DataError
from gristmill.objectives.masked import MaskedLM
from gristmill.objectives.pairs import SentencePair
from gristmill.objectives.permuted import PermutedLM
from gristmill.objectives.sentence_comparison import ScoredPair
from gristmill.objectives.sequence_pair import PairObjective
from gristmill.objectives.single import example_generator
from gristmill.objectives.taxonomy import TAXONOMY, Symbols, build_objective, pairs
from gristmill.objectives.token_classification import LabelledTokens
from objectives.words import CLS, KITTEN, MASK, SENTINELS, SEP, START, STOP, SWIFTLY, VOCABULARY, ids, text

SYMBOLS = Symbols(
    size=len(VOCABULARY),
    cls=CLS,
    sep=SEP,
    mask=MASK,
    start=START,
    sentinels=tuple(SENTINELS),
    sentence_ends=STOP,
)
E, D, B = "encoder", "decoder", "encoder_decoder"
MATRIX = {
    "causal LM": {D, B},
    "prefix LM": {D, B},
    "masked LM": {E, B},
    "MASS-style": {E, B},
    "BERT-style": {E, B},
    "permuted LM": {E},
    "next sentence prediction": {E},
    "sentence comparison": {E},
    "token classification": {E},
    "token reordering": {B},
    "token deletion": {B},
    "span masking": {B},
    "sentinel masking": {B},
    "sentence reordering": {B},
    "document rotation": {B},
}


def test_the_table_has_these_rows_and_marks() -> None:
    assert {entry.name: set(entry.builds) for entry in TAXONOMY} == MATRIX
    marks = [architecture for _, architecture in pairs()]
    assert (marks.count(E), marks.count(D), marks.count(B), len(marks)) == (7, 2, 11, 20)
    assert len({entry.family for entry in TAXONOMY}) == 5


def test_every_mark_is_built_and_every_other_pair_refused() -> None:
    for name, fitting in MATRIX.items():
        for architecture in (E, D, B):
            if architecture in fitting:
                objective: Any = build_objective(name, architecture, SYMBOLS)
                assert isinstance(objective, PairObjective) == (architecture == B)
            else:
                with pytest.raises(DataError, match=f"{name} goes with .*, not with '{architecture}'"):
                    build_objective(name, architecture, SYMBOLS)
    with pytest.raises(DataError, match=r"unknown objective 'masked'\. Did you mean masked LM"):
        build_objective("masked", E, SYMBOLS)


def search(found: Callable[[np.random.Generator], bool]) -> bool:
    """Whether some key draws the row."""
    return any(found(example_generator((0, number))) for number in range(40_000))


PAIR_ROWS: list[tuple[str, dict[str, Any], str, str, str]] = [
    ("causal LM", {}, KITTEN, "", KITTEN),
    ("prefix LM", {}, KITTEN, "The kitten is", "chasing the ball ."),
    ("masked LM", {"rate": 0.28}, KITTEN, "The kitten [MASK] chasing the [MASK] .", "_ _ is _ _ ball _"),
    ("MASS-style", {"rate": 0.42}, KITTEN, "The kitten [MASK] [MASK] [MASK] ball .", "_ _ is chasing the _ _"),
    ("token reordering", {}, KITTEN, ". kitten the chasing The is ball", KITTEN),
    ("token deletion", {"rate": 0.28}, KITTEN, "The kitten chasing the .", KITTEN),
    ("span masking", {"rate": 0.42}, KITTEN, "The kitten [MASK] is [MASK] .", KITTEN),
    # the printed row lacks the closing sentinel
    (
        "sentinel masking",
        {"rate": 0.57, "mean_length": 2.0},
        KITTEN,
        "The kitten [X] the [Y]",
        "[X] is chasing [Y] ball . [Z]",
    ),
    ("sentence reordering", {}, SWIFTLY, f"The ball rolls away swiftly . {KITTEN}", SWIFTLY),
    (
        "document rotation",
        {},
        SWIFTLY,
        "chasing the ball . The ball rolls away swiftly . The kitten is",
        SWIFTLY,
    ),
]


@pytest.mark.parametrize(("name", "options", "clean", "source", "target"), PAIR_ROWS, ids=lambda value: str(value)[:20])
def test_an_encoder_decoder_row_on_the_kitten(
    name: str, options: dict[str, Any], clean: str, source: str, target: str
) -> None:
    objective: Any = build_objective(name, B, SYMBOLS, **options)
    example, wanted = (ids(clean), None), ids(source)

    def found(generator: np.random.Generator) -> bool:
        pair = objective.pair(example, generator)
        if not np.array_equal(pair.source, wanted):
            return False
        learned = np.ones(len(pair.target), bool) if pair.learned is None else pair.learned
        made = " ".join(word if known else "_" for word, known in zip(text(pair.target).split(), learned, strict=True))
        return made == target

    assert search(found)


def test_decoder_rows_on_the_kitten() -> None:
    example = (ids(KITTEN), None)
    causal = build_objective("causal LM", D, SYMBOLS).prepare([example], [(0,)])
    assert text(causal.target_ids) == "kitten is chasing the ball . _"
    prefix = build_objective("prefix LM", D, SYMBOLS, prefix_length=3).prepare([example], [(0,)])
    assert text(prefix.target_ids) == "_ _ chasing the ball . _"


ENCODER_ROWS = [row for row in PAIR_ROWS if row[0] in ("masked LM", "MASS-style")]


@pytest.mark.parametrize(("name", "options", "clean", "source", "target"), ENCODER_ROWS, ids=lambda v: str(v)[:20])
def test_a_masked_encoder_row_on_the_kitten(
    name: str, options: dict[str, Any], clean: str, source: str, target: str
) -> None:
    objective = build_objective(name, E, SYMBOLS, **options)
    assert isinstance(objective, MaskedLM)
    framed = ids(f"[CLS] {clean} [SEP]")

    def found(generator: np.random.Generator) -> bool:
        made = objective.masking.corrupt(framed, objective.vocabulary, generator)
        return (text(made.input_ids), text(made.target_ids)) == (f"[CLS] {source} [SEP]", f"_ {target} _")

    assert search(found)


def test_the_bert_style_row_on_the_kitten() -> None:
    # only words of the row are left to draw from, and each fate of a chosen token is likely
    words = set(ids(f"{KITTEN} playing").tolist())
    symbols = replace(SYMBOLS, sentinels=tuple(set(range(len(VOCABULARY))) - words - {CLS, SEP, MASK, START}))
    options = {"rate": 4 / 7, "mask_share": 0.5, "random_share": 0.25}
    encoder: Any = build_objective("BERT-style", E, symbols, **options)
    both: Any = build_objective("BERT-style", B, symbols, **options)
    clean, wanted = ids(KITTEN), ids("The kitten [MASK] playing the [MASK] .")
    masking, vocabulary = both.masking, both.vocabulary

    def found(number: int) -> bool:
        made = masking.corrupt(clean, vocabulary, example_generator((0, number)))
        return bool((made.input_ids == wanted).all()) and text(made.target_ids) == "_ kitten is chasing _ ball _"

    key = (0, next(number for number in range(100_000) if found(number)))
    pair = both.prepare([(clean, None)], [key])
    assert text(pair.source.input_ids) == "[CLS] The kitten [MASK] playing the [MASK] ."
    assert text(pair.target.target_ids) == "_ kitten is chasing _ ball _ _"
    batch = encoder.prepare([(clean, None)], [key])
    assert text(batch.input_ids) == "[CLS] The kitten [MASK] playing the [MASK] . [SEP]"
    assert text(batch.target_ids) == "_ _ kitten is chasing _ ball _ _"


def test_the_other_encoder_rows_on_the_kitten() -> None:
    permuted = build_objective("permuted LM", E, SYMBOLS)
    assert isinstance(permuted, PermutedLM)
    batch = permuted.ordered([ids(f"[CLS] {KITTEN}")], [(0, 4, 6, 7, 5, 1, 3, 2)])
    ranks = {VOCABULARY[int(batch.input_ids[place])]: rank for rank, place in enumerate(batch.orders[0])}
    assert ranks == {"[CLS]": 0, "The": 5, "kitten": 7, "is": 6, "chasing": 1, "the": 4, "ball": 2, ".": 3}
    following = SentencePair(ids(KITTEN), ids("Birds eat worms ."), 0)
    pair: Any = build_objective("next sentence prediction", E, SYMBOLS).prepare([following], [(0,)])
    clean = np.where(pair.target_ids == -100, pair.input_ids, pair.target_ids)
    assert text(clean) == f"[CLS] {KITTEN} [SEP] Birds eat worms . [SEP]"  # the printed row lacks both [SEP]
    assert pair.labels.shape == (1,)
    compared: Any = build_objective("sentence comparison", E, SYMBOLS).prepare(
        [ScoredPair(ids(KITTEN), ids("Birds eat worms ."), 0.5)], [(0,)]
    )
    assert len(compared.segment_lengths) == 2
    labelled = LabelledTokens(ids(KITTEN), [0] * 7)
    assert build_objective("token classification", E, SYMBOLS).prepare([labelled], [(0,)]).target_count == 7

import random
import sys

import pytest

from gristmill.corpus.dedup import ExactDuplicates, NearDuplicates, jaccard, shingles
from gristmill.corpus.document import Document
from gristmill.errors import MissingExtra

pytest.importorskip("rensa")


def run(step, documents):
    drops = []
    kept = [document.id for document in step.run(documents, lambda document, why: drops.append((document.id, why)))]
    return kept, drops


def prose(generator, length=200):
    return [f"w{generator.randrange(5000)}" for _ in range(length)]


def edited(generator, text, edits):
    """The text with so many words replaced."""
    text = list(text)
    for place in generator.sample(range(len(text)), edits):
        text[place] = f"edit{generator.random()}"
    return text


def test_exact_copies_differ_at_most_in_case_and_space():
    kept, drops = run(
        ExactDuplicates(),
        [
            Document("a", "One text."),
            Document("b", "one  TEXT.\n"),
            Document("c", "one text"),
            Document("d", "One text."),
        ],
    )
    assert kept == ["a", "c"]
    assert drops == [("b", "same text as a"), ("d", "same text as a")]


def test_estimate_agrees_with_exact_jaccard_of_five_word_shingles():
    generator, step, errors = random.Random(1), NearDuplicates(), []
    for number in range(120):
        text = prose(generator)
        left, right = " ".join(text), " ".join(edited(generator, text, number // 3))
        exact = jaccard(shingles(left), shingles(right))
        errors.append(step.signature(left).jaccard(step.signature(right)) - exact)
    # Standard error of 256 slots is at most 0.03125; 4.5 of them over 120 pairs, and 4 of the mean's.
    assert max(map(abs, errors)) < 0.14
    assert abs(sum(errors) / len(errors)) < 4 * 0.03125 / len(errors) ** 0.5


def test_finds_near_copies_keeps_the_first_and_spares_the_unlike():
    generator = random.Random(2)
    originals = [prose(generator) for _ in range(100)]
    near = [edited(generator, text, 2) for text in originals]  # exact Jaccard about 0.9
    far = [edited(generator, text, 20) for text in originals]  # about 0.4
    documents = [
        Document(f"{kind}{number}", " ".join(text))
        for kind, texts in (("original", originals), ("near", near), ("far", far))
        for number, text in enumerate(texts)
    ]
    kept, drops = run(NearDuplicates(), documents)
    assert kept == [f"original{number}" for number in range(100)] + [f"far{number}" for number in range(100)]
    assert [(name, why.rpartition(" ")[2]) for name, why in drops] == [
        (f"near{number}", f"original{number}") for number in range(100)
    ]
    assert (kept, drops) == run(NearDuplicates(), documents)


def test_short_texts_are_compared_whole():
    assert run(NearDuplicates(), [Document("a", "A shirt."), Document("b", "A shoe."), Document("c", "a shirt")])[
        0
    ] == [
        "a",
        "b",
    ]


def test_word_order_matters():
    text = prose(random.Random(3))
    kept, _ = run(NearDuplicates(), [Document("a", " ".join(text)), Document("b", " ".join(sorted(text)))])
    assert kept == ["a", "b"]


def test_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(MissingExtra, match=r"gristmill\[corpus\]"):
        run(NearDuplicates(), [Document("a", "text")])


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="threshold"):
        NearDuplicates(threshold=0.0)
    with pytest.raises(ValueError, match="multiple of bands"):
        NearDuplicates(slots=100, bands=32)

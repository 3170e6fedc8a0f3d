"""Tasks as text: the four worked samples byte for byte, and scores that are words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.errors import DataError
from gristmill.objectives.text_to_text import (
    TextPair,
    TextToText,
    classification,
    parse,
    question,
    read_scores,
    serialise,
    simplification,
    translation,
    translation_score,
)
from objectives.cases_seq2seq import FRAMING, tokenizer

SAMPLES = {
    "[CLS] Translate from Chinese to English: 你好！ -> <s> Hello!": translation(
        "你好！", "Hello!", source="Chinese", target="English"
    ),
    "[CLS] Answer: when was Albert Einstein born? -> <s> He was born on March 14, 1879.": question(
        "when was Albert Einstein born?", "He was born on March 14, 1879."
    ),
    (
        "[CLS] Simplify: the professor, who has published numerous papers in his field, will be giving a lecture on "
        "the topic next week. -> <s> The experienced professor will give a lecture next week."
    ): simplification(
        "the professor, who has published numerous papers in his field, will be giving a lecture on the topic next "
        "week.",
        "The experienced professor will give a lecture next week.",
    ),
    (
        "[CLS] Score the translation from English to Chinese. English: when in Rome, do as the Romans do. "
        "Chinese: 人 在 罗马 就 像 罗马 人 一样 做事 。 -> <s> 0.81"
    ): translation_score(
        "when in Rome, do as the Romans do.",
        "人 在 罗马 就 像 罗马 人 一样 做事 。",
        0.81,
        source="English",
        target="Chinese",
    ),
}


@pytest.mark.parametrize(("line", "sample"), SAMPLES.items(), ids=["translate", "answer", "simplify", "score"])
def test_the_worked_samples_byte_for_byte(line: str, sample: TextPair) -> None:
    assert serialise(sample).encode() == line.encode()
    assert parse(line) == sample


@given(st.text(), st.text())
def test_what_is_written_is_read_back(source: str, target: str) -> None:
    sample = TextPair(source, target)
    assert parse(serialise(sample)) == sample


@given(st.lists(st.sampled_from([" ", "->", "<s>", " -> <s> ", "a"]), max_size=6), st.text("-> <s>a", max_size=9))
def test_arrows_in_the_text_are_kept_or_refused(parts: list[str], target: str) -> None:
    sample = TextPair("".join(parts), target)
    if " -> <s> " in sample.source + " -> <s>":
        with pytest.raises(DataError, match="reword it"):
            serialise(sample)
    else:
        assert parse(serialise(sample)) == sample


def test_other_lines_are_refused() -> None:
    for line in ("", "[CLS] a", "a -> <s> b", "[CLS] a -> b"):
        with pytest.raises(DataError, match="expected \\[CLS\\] source"):
            parse(line)


def test_scores_are_words_and_what_is_no_number_is_reported() -> None:
    target = translation_score("a", "b", 0.81, source="English", target="Chinese").target
    assert target == "0.81"
    assert float(target) == 0.81
    report = read_scores(["0.81", " 0.5\n", "good", "", "nan", "inf", "0.8 or so", "-1"])
    assert report.values == (0.81, 0.5, None, None, None, None, None, -1.0)
    assert report.unread == {2: "good", 3: "", 4: "nan", 5: "inf", 6: "0.8 or so"}
    assert report.read_share == 3 / 8
    with pytest.raises(DataError, match="finite"):
        translation_score("a", "b", float("nan"), source="x", target="y")
    assert classification("sentiment", "I love it", "positive").target == "positive"


def test_texts_become_ids_between_the_frame() -> None:
    objective = TextToText(FRAMING, tokenizer())
    batch = objective.prepare([TextPair("w1 w2", "w7")], [(0,)])
    assert batch.source.input_ids.tolist() == [4, 5, 1]
    assert batch.target.input_ids.tolist() == [0, 10]
    assert batch.target.target_ids.tolist() == [10, 1]
    with pytest.raises(DataError, match="the source spells the special token '<s>'"):
        objective.prepare([TextPair("w1 <s> w2", "w7")], [(0,)])
    with pytest.raises(DataError, match="the target of a text pair is empty"):
        objective.prepare([TextPair("w1", " ")], [(0,)])

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.corpus.document import Document
from gristmill.corpus.filters import (
    letter_share,
    repeated_line_share,
    repeated_lines,
    repeated_ngram_share,
    repeated_ngrams,
    too_few_letters,
    too_short,
    words,
)

PROSE = "The beaver is a large semiaquatic rodent of the northern hemisphere, and builds dams and lodges of branches."


@pytest.mark.parametrize(
    ("step", "bad", "reason"),
    [
        (too_short(50), "Too short.", "10 characters, fewer than 50"),
        (too_few_letters(), "12.5 | 13.9 | 14.2 | n/a | 17.0 | 11.1", "7% letters, less than 60%"),
        (repeated_lines(), "Buy now!\nBuy now!\nBuy now!\n" + "An honest line of text.", "34% of the text in repeated"),
        (repeated_ngrams(), "click here to read more news " * 4, "75% of the text in repeated 5-grams"),
    ],
)
def test_drops_the_bad_with_a_reason_and_keeps_prose(step, bad, reason):
    drops = []
    documents = [Document("good", PROSE), Document("bad", bad)]
    kept = list(step.run(documents, lambda document, why: drops.append((document.id, why))))
    assert [document.id for document in kept] == ["good"]
    assert drops[0][0] == "bad"
    assert reason in drops[0][1]


def test_scripts_with_vowel_signs_count_as_letters_and_whole_words():
    hindi = "नदी के किनारे बीवर लकड़ी से बाँध बनाता है।"
    assert letter_share(hindi) > 0.95
    assert words(hindi) == ["नदी", "के", "किनारे", "बीवर", "लकड़ी", "से", "बाँध", "बनाता", "है"]
    assert words("שָׁלוֹם עולם") == ["שָׁלוֹם", "עולם"]


def test_words_split_unspaced_scripts_by_character():
    assert words("The GPU's 3.5 大模型") == ["the", "gpu", "s", "3", "5", "大", "模", "型"]


def test_words_of_overlapping_copies_count_once():
    # Of ten equal words the bigrams at 1..8 are copies; together they cover words 1..9.
    assert repeated_ngram_share("ab " * 10, 2) == 0.9
    assert repeated_ngram_share("one two three four", 2) == 0.0


@given(st.text(alphabet="ab \n"), st.integers(1, 6))
def test_shares_are_shares(text, n):
    assert 0.0 <= repeated_ngram_share(text, n) < 1.0
    assert 0.0 <= repeated_line_share(text) < 1.0


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 4))
def test_ngram_share_equals_marking_every_word_of_a_later_copy(found, n):
    marked = set()
    for i in range(len(found) - n + 1):
        if found[i : i + n] in [found[j : j + n] for j in range(i)]:
            marked.update(range(i, i + n))
    assert repeated_ngram_share(" ".join(found), n) == (len(marked) / len(found) if found else 0.0)

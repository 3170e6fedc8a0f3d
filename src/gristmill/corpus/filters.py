"""Filters that judge one document by its own text.

Source: Rae et al. 2021 (Gopher), appendix A.1, for the repetition shares.
"""

import re
import unicodedata
from collections import Counter

from gristmill.corpus.document import Document
from gristmill.corpus.step import Filter

# Han, kana and Hangul run without spaces between words: each character counts as one word.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
# Vowel signs, accents and joiners of Hebrew, Arabic and Indic scripts are no \w but belong to their word.
_MARKS = "\u0300-\u036f\u0591-\u05bd\u05bf-\u05c7\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0ddf\u0e31-\u0e4e\u200c\u200d"
_WORD = re.compile(rf"[{_UNSPACED}]|(?:[^\W{_UNSPACED}]|[{_MARKS}])+")


def words(text: str) -> list[str]:
    """Lower-case words without punctuation, as shingles and repetition counts use them."""
    return _WORD.findall(text.lower())


def too_short(characters: int = 50) -> Filter:
    """Drop documents with fewer than so many characters."""

    def judge(document: Document) -> str | None:
        length = len(document.text)
        return f"{length} characters, fewer than {characters}" if length < characters else None

    return Filter("too-short", judge)


def too_few_letters(share: float = 0.6) -> Filter:
    """Drop documents whose letters are a smaller share of their characters other than white space."""

    def judge(document: Document) -> str | None:
        found = letter_share(document.text)
        return f"{found:.0%} letters, less than {share:.0%}" if found < share else None

    return Filter("too-few-letters", judge)


def repeated_lines(share: float = 0.2) -> Filter:
    """Drop documents with more than this share of characters in lines that stand in the document already."""

    def judge(document: Document) -> str | None:
        found = repeated_line_share(document.text)
        return f"{found:.0%} of the text in repeated lines, more than {share:.0%}" if found > share else None

    return Filter("repeated-lines", judge)


def repeated_ngrams(share: float = 0.15, n: int = 5) -> Filter:
    """Drop documents with more than this share of characters in word n-grams that stand in it already."""

    def judge(document: Document) -> str | None:
        found = repeated_ngram_share(document.text, n)
        return f"{found:.0%} of the text in repeated {n}-grams, more than {share:.0%}" if found > share else None

    return Filter("repeated-ngrams", judge)


def letter_share(text: str) -> float:
    """Letters and the marks on them over all characters but white space, in [0, 1]."""
    visible = Counter("".join(text.split()))
    letters = sum(count for character, count in visible.items() if unicodedata.category(character)[0] in "LM")
    return letters / max(visible.total(), 1)


def repeated_line_share(text: str) -> float:
    """Characters in second and later copies of a line over characters in all lines, in [0, 1)."""
    seen: set[str] = set()
    repeated = total = 0
    for line in filter(None, map(str.strip, text.splitlines())):
        total += len(line)
        if line in seen:
            repeated += len(line)
        seen.add(line)
    return repeated / total if total else 0.0


def repeated_ngram_share(text: str, n: int) -> float:
    """Characters of words in second and later copies of an n-gram over characters of all words, in [0, 1)."""
    found = words(text)
    seen: set[tuple[str, ...]] = set()
    repeated = covered = 0
    for i in range(len(found) - n + 1):
        gram = tuple(found[i : i + n])
        if gram in seen:
            repeated += sum(map(len, found[max(covered, i) : i + n]))
            covered = i + n
        seen.add(gram)
    total = sum(map(len, found))
    return repeated / total if total else 0.0

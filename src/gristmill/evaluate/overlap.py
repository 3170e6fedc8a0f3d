"""How much of a reference an answer says, and how much answers repeat themselves."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from gristmill.errors import DataError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str, *, articles: bool = False) -> list[str]:
    """Words in lower case without punctuation, and without a, an and the unless `articles`."""
    bare = text.lower().translate(_PUNCTUATION)
    return (bare if articles else _ARTICLES.sub(" ", bare)).split()


def token_f1(answer: str, reference: str, *, articles: bool = False) -> float:
    """Harmonic mean of the share of the answer's words that are in the reference and of the reference's in the answer.

    Two empty texts agree fully. Source: Rajpurkar et al. 2016 (SQuAD), section 6.1.
    """
    ours, theirs = normalised(answer, articles=articles), normalised(reference, articles=articles)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Whether an answer is one of the references, up to case, punctuation and articles."""
    return normalised(answer) in [normalised(reference) for reference in references]


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of different ones among all runs of n words of the texts; 1 means that nothing comes twice.

    Raises DataError when no text has n words. Source: Li et al. 2016, section 5.
    """
    runs = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    if not runs:
        raise DataError(f"no text has {n} words")
    return len(set(runs)) / len(runs)

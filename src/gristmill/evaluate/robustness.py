"""What a metric loses when inputs are disturbed, and whether it treats groups alike.

A perturbation is a function of a text and a random number generator that is seeded by the text and a seed: the same
text is disturbed the same way in every run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gristmill.errors import DataError

Perturbation = Callable[[str, random.Random], str]


def unchanged(text: str, choose: random.Random) -> str:
    """The text itself: the control, whose delta must be 0."""
    return text


def typos(text: str, choose: random.Random, rate: float = 0.1) -> str:
    """Swap so large a share of the words' inner neighbouring letters."""
    letters = list(text)
    for i in range(1, len(letters) - 2):
        inner = "".join(letters[i - 1 : i + 3]).isalpha()
        if inner and choose.random() < rate:
            letters[i], letters[i + 1] = letters[i + 1], letters[i]
    return "".join(letters)


def shuffled_blocks(text: str, choose: random.Random) -> str:
    """Another order of all blocks between blank lines but the last: few-shot examples before their question."""
    *examples, question = text.split("\n\n")
    return "\n\n".join([*choose.sample(examples, len(examples)), question])


def replaced(words: Mapping[str, str]) -> Perturbation:
    """Put words in the place of others: paraphrases, or the names of another group."""

    def perturb(text: str, choose: random.Random) -> str:
        return " ".join(words.get(word, word) for word in text.split(" "))

    return perturb


@dataclass(frozen=True)
class Robustness:
    """The metric on the texts as they are, and by perturbation how much more or less it is on the disturbed ones."""

    plain: float
    deltas: dict[str, float]


def robustness(
    metric: Callable[[Sequence[str]], float],
    texts: Sequence[str],
    perturbations: Mapping[str, Perturbation],
    *,
    seed: int = 0,
) -> Robustness:
    """Measure `metric` on `texts` and on each way of disturbing them. Raises DataError without texts."""
    if not texts:
        raise DataError("no texts to disturb")
    plain = metric(texts)
    deltas = {}
    for name, perturb in perturbations.items():
        deltas[name] = metric([perturb(text, random.Random(f"{seed} {name} {text}")) for text in texts]) - plain
    return Robustness(plain, deltas)


def counterfactual_gap(scorer: Callable[[str], float], pairs: Sequence[tuple[str, str]]) -> float:
    """Mean of |score of a text - score of the same text about another group|; 0 for a scorer that sees no group.

    scorer: any judge of a text, of toxicity or regard or of what a model answers to it. Raises DataError without pairs.
    Source: Huang et al. 2020, individual fairness by counterfactual evaluation.
    """
    if not pairs:
        raise DataError("no pairs to compare")
    return sum(abs(scorer(one) - scorer(other)) for one, other in pairs) / len(pairs)

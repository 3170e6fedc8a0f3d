"""How often each language of a corpus is read, and how well a shared vocabulary covers it.

Left to their sizes, a few languages would fill most batches. Raising the sizes to a power below 1 gives the small ones
more, at the price of more epochs over them.

Source: Conneau and Lample 2019 (XLM), section 3.1; Conneau et al. 2020 (XLM-R), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from gristmill.errors import DataError
from gristmill.tokens.tokenizer import Tokenizer


def language_shares(sizes: Mapping[str, float], *, exponent: float = 0.3) -> dict[str, float]:
    """The share of samples of each language: (size / all) ^ exponent, scaled to sum to 1.

    exponent: 1 reads languages as the corpus has them, 0 all alike; a temperature is 1 / exponent. XLM took 0.7 for
    pretraining and 0.5 for its vocabulary, XLM-R 0.3. The shares serve as weights of a mixture.
    Raises DataError for no language, a size that is not a number above 0, or an exponent outside [0, 1].
    """
    if not sizes:
        raise DataError("there is no language to share between")
    for language, size in sizes.items():
        if not (size > 0 and math.isfinite(size)):
            raise DataError(f"the size of language {language!r} must be above 0, got {size}; leave it out instead")
    if not 0.0 <= exponent <= 1.0:
        raise DataError(f"exponent must be in [0, 1] (a temperature is 1 / exponent), got {exponent}")
    total = math.fsum(sizes.values())
    raised = {language: (size / total) ** exponent for language, size in sizes.items()}
    scale = math.fsum(raised.values())
    return {language: value / scale for language, value in raised.items()}


class LanguageSampler:
    """The language of each sample, by number: a function of the seed and the number alone."""

    def __init__(self, shares: Mapping[str, float], *, seed: int) -> None:
        """Raises DataError for negative shares, or shares that do not sum to 1."""
        if min(shares.values(), default=-1.0) < 0 or abs(math.fsum(shares.values()) - 1.0) > 1e-6:
            raise DataError(f"shares must be 0 or more and sum to 1, got {dict(shares)}")
        self.languages, self.seed = tuple(shares), seed
        self._limits = np.cumsum(list(shares.values()))

    def language(self, number: int) -> str:
        """That of sample `number`, counted from 0."""
        drawn = np.random.Generator(np.random.PCG64((self.seed, number))).random() * self._limits[-1]
        return self.languages[int(np.searchsorted(self._limits, drawn, side="right"))]


def unknown_rates(tokenizer: Tokenizer, texts: Mapping[str, Iterable[str]]) -> dict[str, float]:
    """The share of unknown tokens in the texts of each language; 0 where the tokenizer has no unknown token.

    Raises DataError for a language whose texts have no token.
    """
    unknown = tokenizer.id_of(dict(tokenizer.named_tokens).get("unk_token", ""))
    found = {}
    for language, lines in texts.items():
        ids = [index for row in tokenizer.encode_batch(list(lines)) for index in row]
        if not ids:
            raise DataError(f"the texts of language {language!r} have no token")
        found[language] = 0.0 if unknown is None else ids.count(unknown) / len(ids)
    return found

"""The simplest tokenisation: English words and punctuation marks, one token each.

For counting and for examples one can check by eye; models use `gristmill.tokens.train`.
"""

import re

_TOKEN = re.compile(r"['\u2019](?:s|t|m|d|ll|re|ve)\b|\w+|[^\w\s]", re.IGNORECASE)


def split_words(text: str) -> list[str]:
    """Words, clitics such as 's as tokens of their own, and single punctuation marks; blanks are dropped."""
    return _TOKEN.findall(text)

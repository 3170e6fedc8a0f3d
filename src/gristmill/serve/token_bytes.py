"""The UTF-8 bytes of one token, for log-probabilities: a token may be a part of a character."""

import re
from functools import cache

from gristmill.tokens.tokenizer import Tokenizer


def token_bytes(tokenizer: Tokenizer, token_id: int, text: str) -> list[int] | None:
    """Bytes of the token that decodes to `text` on its own; None when they are not known.

    A token that is no complete text decodes to U+FFFD. Its bytes then come from its spelling in the vocabulary: one
    stand-in character per byte in a byte-level vocabulary, or <0xE2> in one that falls back to bytes.
    """
    if "\ufffd" not in text:
        return list(text.encode("utf-8"))
    spelling = tokenizer.token_of(token_id) or ""
    fallback = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", spelling)
    if fallback:
        return [int(fallback[1], 16)]
    table = _byte_of_stand_in()
    return [table[character] for character in spelling] if spelling and table.keys() >= set(spelling) else None


@cache
def _byte_of_stand_in() -> dict[str, int]:
    """Byte-level vocabularies write printable bytes as themselves and the others, in order, as U+0100 and up.

    Source: Radford et al. 2019, the GPT-2 encoder.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(0x100)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}

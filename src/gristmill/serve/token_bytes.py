"""The UTF-8 bytes of one token, for log-probabilities: a token may be a part of a character."""

import re

from gristmill.tokens.token_bytes import byte_of_stand_in
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
    table = byte_of_stand_in()
    return [table[character] for character in spelling] if spelling and table.keys() >= set(spelling) else None

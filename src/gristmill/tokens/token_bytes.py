"""The bytes that each token of a byte-level vocabulary stands for: text is then their plain concatenation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from tokenizers import Tokenizer as Backend
from tokenizers import decoders


class TokenBytes:
    """Bytes of token ids, each looked up once. Where they exist, decoding is joining them and reading UTF-8.

    backend: one whose decoder is the byte-level one alone (see `has_token_bytes`).
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._known: dict[int, bytes] = {}
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self._plain: dict[int, bytes] = dict.fromkeys(self.special_ids, b"")

    def join(self, ids: Sequence[int], *, skip_special_tokens: bool) -> bytes:
        """The bytes of several tokens; an id that the tokenizer does not know has none."""
        known = self._plain if skip_special_tokens else self._known
        try:
            return b"".join([known[index] for index in ids])
        except KeyError:
            for index in ids:
                if index not in known:
                    known[index] = self._spelled(index)
            return b"".join([known[index] for index in ids])

    def _spelled(self, index: int) -> bytes:
        token = self._backend.id_to_token(index) or ""
        table = byte_of_stand_in()
        try:
            return bytes([table[character] for character in token])
        except KeyError:  # an added token may hold any character, and then stands for itself
            return token.encode("utf-8")


def has_token_bytes(backend: Backend) -> bool:
    """Whether each token stands for bytes whatever is beside it."""
    return isinstance(backend.decoder, decoders.ByteLevel)


@cache
def byte_of_stand_in() -> dict[str, int]:
    """Byte-level vocabularies write printable bytes as themselves and the others, in order, as U+0100 and up.

    Source: Radford et al. 2019, the GPT-2 encoder.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(0x100)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}

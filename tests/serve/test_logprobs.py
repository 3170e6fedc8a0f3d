"""Bytes of tokens that are parts of characters."""

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from gristmill.serve.answering.logprobs import token_bytes
from gristmill.tokens.tokenizer import Tokenizer
from serve.scripted_engine import byte_tokenizer

BYTES = byte_tokenizer()


@given(st.text())
def test_bytes_of_a_byte_level_vocabulary_add_up_to_the_text(text: str) -> None:
    ids = BYTES.encode(text)
    pieces = [token_bytes(BYTES, i, BYTES.decode([i], skip_special_tokens=False)) for i in ids]
    assert b"".join(bytes(piece or []) for piece in pieces) == text.encode()


def test_byte_fallback_and_unknown_spellings() -> None:
    vocabulary = {"<0xE2>": 0, "a": 1, "\ufffd": 2}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.ByteFallback()
    tokenizer = Tokenizer(backend=backend)
    assert token_bytes(tokenizer, 0, tokenizer.decode([0])) == [0xE2]
    assert token_bytes(tokenizer, 1, "a") == [0x61]
    assert token_bytes(tokenizer, 2, "\ufffd") is None
    assert token_bytes(tokenizer, 99, "\ufffd") is None

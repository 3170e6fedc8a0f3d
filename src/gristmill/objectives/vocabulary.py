"""What encoder objectives know of a vocabulary: its special symbols, and which tokens go on with a word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gristmill.errors import DataError
from gristmill.tokens.tokenizer import Tokenizer

Ids = Sequence[int] | np.ndarray

_WORD_MARKS = ("\u0120", "\u2581")
"""What byte-level BPE and SentencePiece put before the first token of a word."""


@dataclass(frozen=True, eq=False, kw_only=True)
class EncoderVocabulary:
    """Ids of a vocabulary of `size` tokens. Special ones, [MASK], [CLS] and [SEP] among them, are never chosen for
    masking and never drawn as random tokens.

    continues: (size,) bool, whether a token goes on with the word of the token before; None where words are not asked
    for. Raises DataError for an id outside the vocabulary.
    """

    size: int
    mask_id: int
    cls_id: int | None = None
    sep_id: int | None = None
    special_ids: frozenset[int] = frozenset()
    continues: np.ndarray | None = None

    def __post_init__(self) -> None:
        outside = sorted(index for index in self._specials if not 0 <= index < self.size)
        if outside:
            raise DataError(f"special token {outside[0]} is outside the vocabulary of {self.size}")
        if self.continues is not None and len(self.continues) != self.size:
            raise DataError(f"continues has {len(self.continues)} entries for a vocabulary of {self.size}")
        if len(self.ordinary_ids) == 0:
            raise DataError("every token of the vocabulary is special: nothing is left to predict")

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> EncoderVocabulary:
        """That of a tokenizer. Raises DataError when it names no mask token."""
        named = {name: tokenizer.id_of(text) for name, text in tokenizer.named_tokens}
        mask = named.get("mask_token")
        if mask is None:
            raise DataError("the tokenizer names no mask_token: add one to its vocabulary and to tokenizer_config.json")
        return cls(
            size=tokenizer.vocab_size,
            mask_id=mask,
            cls_id=named.get("cls_token"),
            sep_id=named.get("sep_token"),
            special_ids=frozenset(tokenizer.special_tokens.values()),
            continues=word_continuations(tokenizer),
        )

    @property
    def _specials(self) -> frozenset[int]:
        named = (self.mask_id, self.cls_id, self.sep_id)
        return self.special_ids | {index for index in named if index is not None}

    @cached_property
    def is_special(self) -> np.ndarray:
        """(size,) bool."""
        table = np.zeros(self.size, bool)
        table[list(self._specials)] = True
        return table

    @cached_property
    def ordinary_ids(self) -> np.ndarray:
        """All ids that are not special, ascending."""
        return np.flatnonzero(~self.is_special)

    def require_frame(self, *, sep: bool = True) -> None:
        """Raise DataError when [CLS], or [SEP] where it is needed, is not known."""
        if self.cls_id is None or (sep and self.sep_id is None):
            missing = "cls_id" if self.cls_id is None else "sep_id"
            raise DataError(f"sequences are to be framed, but the vocabulary has no {missing}: give it")

    def checked(self, ids: Ids, what: str) -> np.ndarray:
        """The ids as int64. Raises DataError, beginning with `what`, when there are none or one is not in the
        vocabulary."""
        found = np.asarray(ids)
        if found.ndim != 1 or len(found) == 0:
            raise DataError(f"{what} has no tokens")
        if not np.issubdtype(found.dtype, np.integer):
            raise DataError(f"{what}: token ids must be whole numbers, got {found.dtype}")
        wrong = (found < 0) | (found >= self.size)
        if wrong.any():
            raise DataError(f"{what}: token {int(found[wrong.argmax()])} is outside the vocabulary of {self.size}")
        return found.astype(np.int64)

    def segment(self, example: Any, number: int) -> np.ndarray:
        """The ids of segment (ids, mask). Raises DataError as `checked` does, and when there is a mask: the objective
        chooses itself what is learned."""
        ids, mask = example
        if mask is not None:
            raise DataError(
                f"segment {number} has a loss mask, but this objective chooses itself what is learned: drop the mask"
            )
        return self.checked(ids, f"segment {number}")


def word_continuations(tokenizer: Tokenizer) -> np.ndarray:
    """(vocabulary,) bool: whether a token goes on with a word.

    WordPiece writes ## before such tokens. Byte-level BPE and SentencePiece mark the others, the first of a word;
    without the mark a token goes on when it begins with a letter or digit, so that punctuation stands for itself.
    """
    texts = [tokenizer.token_of(index) or "" for index in range(tokenizer.vocab_size)]
    if any(text.startswith("##") and len(text) > 2 for text in texts):
        return np.array([text.startswith("##") and len(text) > 2 for text in texts])
    return np.array([not text.startswith(_WORD_MARKS) and text[:1].isalnum() for text in texts])

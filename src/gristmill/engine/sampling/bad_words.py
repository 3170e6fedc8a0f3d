"""Token sequences that are never completed, as transformers' bad_words_ids and vLLM's bad_words."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from gristmill.core import LogitsRow, SamplingParams
from gristmill.engine.sampling.processors import SlotProcessor, ban, check_ids, tail
from gristmill.errors import RequestError
from gristmill.tokens.tokenizer import Tokenizer


class _Words:
    """Banned single tokens, and longer sequences by the token before their last."""

    def __init__(self, sequences: Sequence[tuple[int, ...]]) -> None:
        self.always = [ids[0] for ids in sequences if len(ids) == 1]
        self.longest = max(map(len, sequences))
        self.after: dict[int, list[tuple[list[int], int]]] = {}
        for *before, last in sequences:
            if before:
                self.after.setdefault(before[-1], []).append((before, last))

    def banned(self, row: LogitsRow) -> list[int]:
        """Tokens that would complete a sequence, which may begin in the prompt."""
        ids = tail(row, self.longest - 1) if self.longest > 1 else []
        words = self.after.get(ids[-1], ()) if ids else ()
        return [*self.always, *(last for before, last in words if ids[-len(before) :] == before)]


class BadWords(SlotProcessor[_Words]):
    """Bans the last token of each of `bad_words` where the others stand."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        super().__init__()
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    def _sequences(self, params: SamplingParams) -> list[tuple[int, ...]]:
        found: dict[tuple[int, ...], None] = {}
        for word in params.bad_words or ():
            if isinstance(word, str):
                spelled = [self._tokenizer.encode(text, add_bos=False) for text in (word, " " + word.lstrip(" "))]
            else:
                spelled = [list(word)]
            found |= dict.fromkeys(tuple(ids) for ids in spelled)
        return list(found)

    def validate(self, params: SamplingParams) -> None:
        """See SlotProcessor."""
        for ids in self._sequences(params):
            if not ids:
                raise RequestError("bad_words: a text has no tokens; leave it out", field="bad_words")
            check_ids("bad_words", ids, self._vocab_size)

    def begin(self, params: SamplingParams, prompt_ids: Sequence[int], end_ids: Collection[int]) -> _Words | None:
        """See SlotProcessor."""
        return _Words(self._sequences(params)) if params.bad_words else None

    def change(self, logits: Tensor, concerned: Sequence[tuple[int, LogitsRow, _Words]]) -> None:
        """See SlotProcessor."""
        ban(logits, [number for number, _, _ in concerned], [state.banned(row) for _, row, state in concerned])

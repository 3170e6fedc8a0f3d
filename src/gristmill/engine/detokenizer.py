"""Text of a growing token sequence: complete characters only, stop strings found and never leaked in part."""

from __future__ import annotations

from collections.abc import Sequence

from gristmill.core import SamplingParams
from gristmill.tokens.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Turns tokens into text one at a time. `text` is safe to send: it only ever grows.

    Held back are bytes that do not yet make a character, and a tail that may become a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._stops = params.stop_strings
        self._keep_stop = params.include_stop_str_in_output
        self._skip_special = params.skip_special_tokens
        self._ids: list[int] = []
        # ids[prefix:read] are decoded already; they are decoded again as context of what follows, because some
        # decoders treat the start of a text specially. `taken` characters of ids[prefix:] are in `decoded`.
        self._prefix = self._read = self._taken = 0
        self._decoded = ""

    def append(self, token_ids: Sequence[int]) -> str | None:
        """Take new tokens; returns the stop string that now ends the text, or None."""
        self._ids.extend(token_ids)
        window = self._decode(self._ids[self._prefix :])
        whole = window.rstrip(_REPLACEMENT)  # bytes at the end may be the beginning of a character
        if len(whole) <= self._taken:
            return None
        stop = self._take(whole)
        if len(whole) == len(window):
            self._prefix, self._read = self._read, len(self._ids)
            self._taken = len(self._decode(self._ids[self._prefix :]))
        if stop is None:
            self.text = self._decoded[: len(self._decoded) - self._held_back()]
        return stop

    def finish(self) -> str | None:
        """Release what was held back, for no more tokens come; returns the stop string that ends it, or None."""
        stop = self._take(self._decode(self._ids[self._prefix :]))
        if stop is None:
            self.text = self._decoded
        return stop

    def _take(self, window: str) -> str | None:
        searched = len(self._decoded)
        self._decoded += window[self._taken :]
        self._taken = len(window)
        return self._find_stop(searched)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special)

    def _find_stop(self, searched: int) -> str | None:
        """The earliest stop string in the text; ends the text there."""
        found: tuple[int, int, str] | None = None
        for stop in self._stops:
            at = self._decoded.find(stop, max(0, searched - len(stop) + 1))
            if at >= 0 and (found is None or at < found[0]):
                found = (at, at + len(stop), stop)
        if found is None:
            return None
        self.text = self._decoded[: found[1] if self._keep_stop else found[0]]
        return found[2]

    def _held_back(self) -> int:
        """Length of the longest tail that is the beginning of a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._decoded)), longest, -1):
                if self._decoded.endswith(stop[:length]):
                    longest = length
                    break
        return longest

"""Text of a growing token sequence: complete characters only, stop strings found and never leaked in part."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Protocol

from gristmill.core import SamplingParams
from gristmill.tokens.token_bytes import TokenBytes
from gristmill.tokens.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Turns tokens into text one at a time. `text` is safe to send: it only ever grows.

    Held back are bytes that do not yet make a character, and a tail that may become a stop string. Without stop
    strings nothing is decoded before somebody reads `text`.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._stops = params.stop_strings
        self._first = re.compile("|".join(re.escape(stop[0]) for stop in self._stops))
        self._keep_stop = params.include_stop_str_in_output
        self._outside = params.stop_outside  # None as soon as the passage is over
        table = tokenizer.token_bytes
        self._decoder: _Decoder = (
            _Windows(tokenizer, params.skip_special_tokens)
            if table is None
            else _Bytes(table, params.skip_special_tokens)
        )
        self._waiting: list[int] = []  # ids that are not decoded yet
        self._text = ""
        self._held = ""  # decoded, and the beginning of a stop string
        self._stopped: str | None = None  # the text up to a stop string that was found, until more tokens come

    @property
    def text(self) -> str:
        """The text so far."""
        if self._waiting:
            self._text += self._decoder.push(self._waiting)
            self._waiting = []
        return self._text if self._stopped is None else self._stopped

    def append(self, token_ids: Sequence[int]) -> str | None:
        """Take new tokens; returns the stop string that now ends the text, or None."""
        if not self._stops:
            self._waiting += token_ids
            return None
        return self._take(self._decoder.push(token_ids))

    def finish(self) -> str | None:
        """Release what was held back, for no more tokens come; returns the stop string that ends it, or None."""
        if self._stops:
            return self._take(self._decoder.finish(), final=True)
        self._text = self.text + self._decoder.finish()
        return None

    def _take(self, new: str, *, final: bool = False) -> str | None:
        """Add decoded text, but not the end of it that may become a stop string."""
        if self._outside is not None:
            new = self._beyond_passage(self._held + new, *self._outside, final=final)
            if self._outside is not None:
                return None
        window = self._held + new
        if self._first.search(window) is None:  # as for most tokens
            self._stopped, self._held = None, ""
            self._text += window
            return None
        found = self._find_stop(window, len(self._held))
        self._stopped = None if found is None else self._text + window[: found[0]]
        release = len(window) if final else len(window) - _beginning(window, self._stops)
        self._text += window[:release]
        self._held = window[release:]
        return None if found is None else found[1]

    def _beyond_passage(self, window: str, opening: str, closing: str, *, final: bool) -> str:
        """Add what belongs to the passage in which stop strings do not count; returns what comes after it."""
        begun = window.lstrip()
        self._held = window
        if opening and not begun.startswith(opening):
            if final:
                self._text, self._held = self._text + window, ""
            elif not opening.startswith(begun):
                self._outside, self._held = None, ""
                return window
            return ""
        since = window.find(opening) + len(opening)
        at = window.find(closing, since)
        if at >= 0:
            self._outside, self._held, end = None, "", at + len(closing)
            self._text += window[:end]
            return window[end:]
        end = len(window) if final else len(window) - _beginning(window[since:], [closing])
        self._outside, self._held = ("", closing), window[end:]
        self._text += window[:end]
        return ""

    def _find_stop(self, window: str, searched: int) -> tuple[int, str] | None:
        """Where the text ends that the earliest stop string leaves, and that string."""
        found: tuple[int, str] | None = None
        for stop in self._stops:
            at = window.find(stop, max(0, searched - len(stop) + 1))
            if at >= 0 and (found is None or at < found[0]):
                found = at, stop
        if found is None or not self._keep_stop:
            return found
        return found[0] + len(found[1]), found[1]


def _beginning(window: str, marks: Sequence[str]) -> int:
    """Length of the longest tail that is the beginning of one of the marks."""
    longest = 0
    for mark in marks:
        for length in range(min(len(mark) - 1, len(window)), longest, -1):
            if window.endswith(mark[:length]):
                longest = length
                break
    return longest


class _Decoder(Protocol):
    def push(self, token_ids: Sequence[int]) -> str:
        """The characters that are complete now and were not before."""

    def finish(self) -> str:
        """What is left, with U+FFFD for what makes no character."""


class _Bytes:
    """Tokens that are bytes, whatever stands beside them."""

    def __init__(self, table: TokenBytes, skip_special_tokens: bool) -> None:
        self._table, self._skip = table, skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        return self._utf8.decode(self._table.join(token_ids, skip_special_tokens=self._skip))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Windows:
    """Any other tokens: the last ones are decoded again as context of new ones, because some decoders treat the start
    of a text specially."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids: list[int] = []
        # ids[prefix:read] are decoded already; `taken` characters of ids[prefix:] are
        self._prefix = self._read = self._taken = 0

    def push(self, token_ids: Sequence[int]) -> str:
        self._ids.extend(token_ids)
        window = self._decode()
        whole = window.rstrip(_REPLACEMENT)  # bytes at the end may be the beginning of a character
        new = whole[self._taken :]
        if new:
            self._taken = len(whole)
            if len(whole) == len(window):
                self._prefix, self._read = self._read, len(self._ids)
                self._taken = len(self._decode())
        return new

    def finish(self) -> str:
        window, taken = self._decode(), self._taken
        self._taken = len(window)
        return window[taken:]

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids[self._prefix :], skip_special_tokens=self._skip)

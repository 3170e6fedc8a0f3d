"""One JSON object, read a character at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

BLANKS = frozenset(" \t\r\n")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NUMERIC = frozenset("0123456789+-.eE")
_WORDS = {"t": "rue", "f": "alse", "n": "ull"}
_HEX = frozenset("0123456789abcdefABCDEF")


class JsonObject:
    """Says of each character whether the object may go on with it, in constant time and whatever the nesting.

    Raw control characters inside a string, which models write but JSON forbids, are passed on escaped.
    """

    def __init__(self) -> None:
        self.done = False
        self._open: list[str] = []
        self._state: Callable[[str], str | None] = self._begin
        self._key = False  # the string being read is a key
        self._rest = ""  # of a word, or hexadecimal digits still to come
        self._number: list[str] = []

    def take(self, char: str) -> str | None:
        """What to pass on for it; None when the object cannot go on with it, and then nothing has changed."""
        return self._state(char)

    def _begin(self, char: str) -> str | None:
        return self._value(char) if char == "{" else None

    def _value(self, char: str) -> str | None:
        if char in BLANKS:
            return char
        if char == "{" or char == "[":
            self._open.append(char)
            self._state = self._first_key if char == "{" else self._first_item
        elif char == '"':
            self._key, self._state = False, self._string
        elif char in _WORDS:
            self._rest, self._state = _WORDS[char], self._word
        elif char == "-" or (char.isdecimal() and char.isascii()):
            self._number, self._state = [char], self._digits
        else:
            return None
        return char

    def _first_item(self, char: str) -> str | None:
        return self._close(char) if char == "]" else self._value(char)

    def _first_key(self, char: str) -> str | None:
        return self._close(char) if char == "}" else self._next_key(char)

    def _next_key(self, char: str) -> str | None:
        if char == '"':
            self._key, self._state = True, self._string
        return char if char == '"' or char in BLANKS else None

    def _colon(self, char: str) -> str | None:
        if char == ":":
            self._state = self._value
        return char if char == ":" or char in BLANKS else None

    def _after(self, char: str) -> str | None:
        if char in BLANKS:
            return char
        if char == ",":
            self._state = self._next_key if self._open[-1] == "{" else self._value
            return char
        return self._close(char) if char == ("}" if self._open[-1] == "{" else "]") else None

    def _close(self, char: str) -> str:
        self._open.pop()
        self.done, self._state = not self._open, self._after
        return char

    def _string(self, char: str) -> str | None:
        if char == '"':
            self._state = self._colon if self._key else self._after
        elif char == "\\":
            self._state = self._escape
        elif "" < char < " ":
            return json.dumps(char)[1:-1]
        return char or None

    def _escape(self, char: str) -> str | None:
        if char == "u":
            self._rest, self._state = "0000", self._hex
        elif char in frozenset('"\\/bfnrt'):
            self._state = self._string
        else:
            return None
        return char

    def _hex(self, char: str) -> str | None:
        if char not in _HEX:
            return None
        self._rest = self._rest[1:]
        if not self._rest:
            self._state = self._string
        return char

    def _word(self, char: str) -> str | None:
        if not char or char != self._rest[0]:
            return None
        self._rest = self._rest[1:]
        if not self._rest:
            self._state = self._after
        return char

    def _digits(self, char: str) -> str | None:
        if char in _NUMERIC:
            self._number.append(char)
            return char
        if not _NUMBER.fullmatch("".join(self._number)):
            return None
        self._state = self._after
        if (passed := self._after(char)) is None:
            self._state = self._digits
        return passed

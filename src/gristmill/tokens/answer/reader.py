"""Text that comes a character at a time, and generators that read it: each `yield` waits for the next character.

So a reader is written as if the whole text were there, and how the text was cut cannot matter.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gristmill.tokens.answer.json_object import BLANKS, JsonObject

T = TypeVar("T")
Reading = Generator[None, None, T]

END = ""
"""The character after the last."""


@dataclass(frozen=True)
class Reasoning:
    """More of the text before the answer proper."""

    text: str


@dataclass(frozen=True)
class Content:
    """More of the answer proper."""

    text: str


@dataclass(frozen=True)
class CallBegan:
    """A tool call; its arguments follow. `index` counts calls from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Event = Reasoning | Content | CallBegan | CallArguments


def new_call_id() -> str:
    """Nine letters and digits, which is what the strictest chat templates (Mistral's) ask for."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class Reader:
    """The current character, what was read and not yet understood (`held`), and the events so far."""

    def __init__(self, new_id: Callable[[], str]) -> None:
        self.char = END
        self.held: list[str] = []
        self.calls = 0
        self._new_id = new_id
        self._events: list[tuple[type[Reasoning] | type[Content] | CallBegan | int, list[str]]] = []

    def events(self) -> list[Event]:
        """The events since the last call of this."""
        events: list[Event] = []
        for kind, pieces in self._events:
            if isinstance(kind, CallBegan):
                events.append(kind)
            elif isinstance(kind, int):
                events.append(CallArguments(kind, "".join(pieces)))
            else:
                events.append(kind("".join(pieces)))
        self._events = []
        return events

    def emit(self, kind: type[Reasoning] | type[Content] | int, text: str) -> None:
        """Add to the last event if that is of the same kind; a number means the arguments of that call."""
        if self._events and self._events[-1][0] == kind:
            self._events[-1][1].append(text)
        elif text:
            self._events.append((kind, [text]))

    def release(self, kind: type[Reasoning] | type[Content], *, keep: int = 0) -> None:
        """What is held, but for its end, turns out to be this."""
        end = len(self.held) - keep
        self.emit(kind, "".join(self.held[:end]))
        del self.held[:end]

    def begin_call(self, name: str, call_id: str | None = None) -> None:
        """What is held turns out to be the frame of a call."""
        self.held.clear()
        self._events.append((CallBegan(self.calls, call_id or self._new_id(), name), []))
        self.calls += 1

    def arguments(self, text: str) -> None:
        """More arguments of the last call."""
        self.emit(self.calls - 1, text)

    def hold(self) -> Reading[None]:
        """Keep the current character and go on."""
        self.held.append(self.char)
        yield

    def blanks(self) -> Reading[None]:
        """Hold white space."""
        while self.char in BLANKS:
            yield from self.hold()

    def marker(self, markers: Sequence[str]) -> Reading[str | None]:
        """Hold one of these; None when another character comes, and then its beginning is held. What is held already
        may end with its beginning."""
        at = self.beginning(markers)
        if at:
            markers = [marker for marker in markers if marker.startswith("".join(self.held[-at:]))]
        while left := [marker for marker in markers if marker[at] == self.char]:
            yield from self.hold()
            at += 1
            if found := next((marker for marker in left if len(marker) == at), None):
                return found
            markers = left
        return None

    def beginning(self, markers: Sequence[str]) -> int:
        """How much of the end of what is held is the beginning of a marker, not all of it."""
        if not self.held or self.held[-1] in BLANKS:
            return 0
        for length in range(min(len(self.held), max(map(len, markers), default=0)), 0, -1):
            tail = "".join(self.held[-length:])
            if any(marker.startswith(tail) and marker != tail for marker in markers):
                return length
        return 0

    def until(self, ends: frozenset[str]) -> Reading[str]:
        """Hold all characters before one of `ends` or the end of the text."""
        start = len(self.held)
        while self.char not in ends and self.char != END:
            yield from self.hold()
        return "".join(self.held[start:])

    def json_string(self) -> Reading[str | None]:
        """Hold a JSON string; its value, or None when it is none."""
        start = len(self.held)
        if self.char != '"':
            return None
        yield from self.hold()
        while self.char != '"':
            if self.char == "\\":
                yield from self.hold()
            if self.char == END:
                return None
            yield from self.hold()
        yield from self.hold()
        try:
            return str(json.loads("".join(self.held[start:]), strict=False))
        except ValueError:
            return None

    def json_object(self, take: Callable[[str], None], *, hold: bool = False) -> Reading[bool]:
        """Give an object's characters to `take`; False at one that cannot belong to it."""
        scanner = JsonObject()
        while not scanner.done:
            passed = scanner.take(self.char)
            if passed is None:
                return False
            take(passed)
            if hold:
                self.held.append(self.char)
            yield
        return True

    def close(self, marker: str) -> Reading[None]:
        """Drop the marker that ends a call; where something else comes, that is held. An answer may end before it."""
        yield from self.blanks()
        if (yield from self.marker([marker])) or self.char == END:
            self.held.clear()

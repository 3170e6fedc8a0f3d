"""An answer's text to reasoning, content and tool calls, while it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gristmill.tokens.answer.calls import Schemas, read_calls
from gristmill.tokens.answer.formats import AnswerFormat, CallStyle
from gristmill.tokens.answer.json_object import BLANKS
from gristmill.tokens.answer.reader import END, Content, Event, Reader, Reading, Reasoning, new_call_id


class AnswerParser:
    """Takes the text of one answer in pieces, special tokens shown, and says what each piece adds to the message.

    tools: those that may be called, {"name", "parameters"} or that under "function" as OpenAI writes it; None allows
    any name; empty means that calls are content, as they are where the style of calls is unknown. reasoning: tell
    reasoning from content; `opened`: the prompt began it. ends: texts of the tokens that end an answer; the one with
    which the text ends is dropped (unless its first character comes in it again). new_id: makes ids for calls.

    However the text is cut, the events add up to the same message. Nothing is lost: what is no call is content, as it
    was written. A call exists once its name (a known one) and the beginning of its arguments are there; until then a
    call that turns out malformed is content. After that it remains a call: if it breaks, its arguments end there, and
    content goes on with the character that broke it. White space around calls, line breaks inside and after the
    reasoning markers, and markers that an answer breaks off in belong to the frame and are dropped. Takes constant time
    for each character.
    """

    def __init__(
        self,
        form: AnswerFormat,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning: bool = True,
        opened: bool = False,
        ends: Sequence[str] = (),
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._style = form.calls
        self._schemas: Schemas = None if tools is None else _schemas(tools)
        self._markers = [form.calls.marker] if form.calls and (tools is None or tools) else []
        self._reasoning = form.reasoning if reasoning else None
        self._opened = opened
        self._ends = [end for end in ends if end and end[0] not in end[1:]]
        self._reader = Reader(new_id)
        self._run = self._answer()
        next(self._run)

    def feed(self, text: str) -> list[Event]:
        """What this piece adds; neighbours of one kind are joined."""
        for char in text:
            self._reader.char = char
            next(self._run)
        return self._reader.events()

    def finish(self) -> list[Event]:
        """What was held back, for no more text comes."""
        self._reader.char = END
        next(self._run, None)
        return self._reader.events()

    def _answer(self) -> Reading[None]:
        reader = self._reader
        yield
        may_reason = self._reasoning is not None
        if may_reason and self._opened:
            yield from self._reason()
            may_reason = False
        beginning, after_call = True, False  # nothing but white space so far; the last thing but that was a call
        special = self._first(*(self._reasoning or ()), *self._markers, *self._ends)
        while reader.char != END:
            while not beginning and not reader.held and reader.char not in special and reader.char != END:
                after_call = False  # the usual case, made quick
                reader.emit(Content, reader.char)
                yield
            yield from reader.blanks()
            opening = self._reasoning[:1] if self._reasoning and beginning and may_reason else ()
            marker = yield from reader.marker([*opening, *self._markers, *self._ends])
            if marker in opening:
                reader.held.clear()
                yield from self._reason()
                may_reason = False
                continue
            calls, keep = reader.calls, 0
            if marker in self._ends:
                self._drop_end(marker)
            elif self._style and (marker or (beginning and self._bare_call())):
                yield from read_calls(reader, self._style, self._schemas)
                keep = 0 if reader.char == END else reader.beginning([*self._markers, *self._ends])
            if reader.calls > calls:
                beginning, after_call = False, True
            if after_call and reader.char == END and not "".join(reader.held).strip():
                reader.held.clear()
            elif keep and not "".join(reader.held[:-keep]).strip():
                continue  # nothing but white space and the beginning of a marker
            elif reader.held:
                beginning = beginning and not "".join(reader.held).strip()
                after_call = False
                reader.release(Content, keep=keep)
            elif reader.calls == calls and reader.char != END:
                beginning = after_call = False
                reader.emit(Content, reader.char)
                yield

    @staticmethod
    def _first(*markers: str) -> frozenset[str]:
        """White space and the characters with which these begin: all others are what they seem."""
        return BLANKS | {marker[0] for marker in markers}

    def _drop_end(self, marker: str | None) -> None:
        if marker and self._reader.char == END:
            del self._reader.held[-len(marker) :]

    def _bare_call(self) -> bool:
        return self._style is CallStyle.LLAMA3 and bool(self._markers) and self._reader.char == "{"

    def _reason(self) -> Reading[None]:
        """Reasoning up to its closing marker, without the line breaks beside the markers."""
        reader = self._reader
        assert self._reasoning is not None
        while reader.char == "\n":
            yield
        special = self._first(*self._reasoning, *self._ends)
        while reader.char != END:
            if not reader.held and reader.char not in special:
                reader.emit(Reasoning, reader.char)
                yield
                continue
            while reader.char == "\n":
                yield from reader.hold()
            marker = yield from reader.marker([*self._reasoning[1:], *self._ends])
            if marker in self._ends:
                self._drop_end(marker)
            elif marker:
                reader.held.clear()
                while reader.char == "\n":
                    yield
                return
            if reader.held:
                reader.release(Reasoning)
            elif reader.char != END:
                reader.emit(Reasoning, reader.char)
                yield


def _schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    functions = [tool.get("function", tool) for tool in tools]
    return {function["name"]: function.get("parameters") or {} for function in functions}

"""Readers of one tool call or list of calls, in each style.

A reader begins after the marker that introduces calls, which is held. It announces a call when its name and the
beginning of its arguments are known, and returns with what it could not understand held.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from typing import Any

from gristmill.tokens.answer.formats import CallStyle
from gristmill.tokens.answer.reader import END, Reader, Reading

Schemas = Mapping[str, Mapping[str, Any]] | None
"""Parameters of each function that may be called; None allows any name."""

_ARGUMENTS = frozenset({"arguments", "parameters"})
_NAME_ENDS = frozenset(string.printable) - frozenset(string.ascii_letters + string.digits + "_-.")
_BRACKET = frozenset(">\n<")
_SQUARE = frozenset("[{")


def read_calls(reader: Reader, style: CallStyle, schemas: Schemas) -> Reading[None]:
    """The calls after the style's marker."""
    yield from reader.blanks()
    match style:
        case CallStyle.HERMES:
            if (yield from _json_call(reader, schemas)):
                yield from reader.close("</tool_call>")
        case CallStyle.QWEN_XML:
            if (yield from _xml_call(reader, schemas)):
                yield from reader.close("</tool_call>")
        case CallStyle.LLAMA3:
            yield from _list(reader, schemas, ";")
        case _ if reader.char == "[":
            yield from reader.hold()
            yield from reader.blanks()
            yield from _list(reader, schemas, ",", "]")
        case _:
            yield from _named_call(reader, schemas)


def _known(name: str | None, schemas: Schemas) -> bool:
    return bool(name) and (schemas is None or name in schemas)


def _list(reader: Reader, schemas: Schemas, comma: str, end: str = END) -> Reading[None]:
    """JSON calls with `comma` between them and `end` after the last."""
    while (yield from _json_call(reader, schemas)):
        yield from reader.blanks()
        if end != END and reader.char == end:
            reader.held.clear()
            yield
            return
        if reader.char == comma:
            yield from reader.hold()
            yield from reader.blanks()
        if reader.char == END:
            reader.held.clear()


def _json_call(reader: Reader, schemas: Schemas) -> Reading[bool]:
    """`{"name": ..., "arguments": {...}}`, its keys in any order, arguments left out where there are none."""
    name: str | None = None
    call_id: str | None = None
    early: list[str] | None = None  # arguments that came before the name
    begun, separator, seen = False, "{", set()
    while reader.char == separator:
        yield from reader.hold()
        yield from reader.blanks()
        key = yield from reader.json_string()
        yield from reader.blanks()
        role = "arguments" if key in _ARGUMENTS else key
        if reader.char != ":" or role in seen:
            return _broken(reader, begun)
        seen.add(role)
        yield from reader.hold()
        yield from reader.blanks()
        if role == "arguments" and name is None:
            early = []
            fine = yield from reader.json_object(early.append, hold=True)
        elif role == "arguments" and name is not None:
            if reader.char != "{":
                return False
            reader.begin_call(name, call_id)
            begun = True
            fine = yield from reader.json_object(reader.arguments)
        else:
            value = yield from reader.json_string()
            name = value if role == "name" else name
            call_id = value if role == "id" else call_id
            fine = _known(value, schemas) if role == "name" else value is not None and role in ("id", "type")
        if not fine:
            return _broken(reader, begun)
        yield from reader.blanks()
        separator = ","
    if reader.char != "}" or name is None:
        return _broken(reader, begun)
    yield
    if not begun:
        reader.begin_call(name, call_id)
        reader.arguments("{}" if early is None else "".join(early))
    reader.held.clear()
    return True


def _broken(reader: Reader, begun: bool) -> bool:
    """The frame of a call that began is no content when the answer ends within it."""
    if begun and reader.char == END:
        reader.held.clear()
    return False


def _named_call(reader: Reader, schemas: Schemas) -> Reading[None]:
    """`NAME[ARGS]{...}` or `NAME[CALL_ID]ID[ARGS]{...}`."""
    name = yield from reader.until(_NAME_ENDS)
    if not _known(name, schemas):
        return
    call_id: str | None = None
    yield from reader.blanks()
    found = yield from reader.marker(["[ARGS]", "[CALL_ID]"])
    if found == "[CALL_ID]":
        call_id = (yield from reader.until(_SQUARE)).strip()
        found = yield from reader.marker(["[ARGS]"])
    yield from reader.blanks()
    if found and reader.char == "{":
        reader.begin_call(name, call_id)
        yield from reader.json_object(reader.arguments)


def _xml_call(reader: Reader, schemas: Schemas) -> Reading[bool]:
    """`<function=NAME>`, then `<parameter=KEY>`, a line with the value and `</parameter>` for each argument."""
    if not (yield from reader.marker(["<function="])):
        return False
    name = yield from reader.until(_BRACKET)
    if reader.char != ">" or not _known(name, schemas):
        return False
    yield
    reader.begin_call(name)
    properties = (schemas or {}).get(name, {}).get("properties") or {}
    seen: set[str] = set()
    while True:
        yield from reader.blanks()
        found = yield from reader.marker(["<parameter=", "</function>"])
        if found == "</function>":
            break
        key = yield from reader.until(_BRACKET)
        if found is None or reader.char != ">" or key in seen:
            return _broken(reader, True)
        yield
        reader.held.clear()
        reader.arguments(f"{', ' if seen else '{'}{json.dumps(key, ensure_ascii=False)}: ")
        seen.add(key)
        if not (yield from _xml_value(reader, types_of(properties.get(key)))):
            return False
    reader.held.clear()
    reader.arguments("}" if seen else "{}")
    return True


def _xml_value(reader: Reader, types: frozenset[str]) -> Reading[bool]:
    """An argument up to `</parameter>`, without the line breaks beside the tags. Text streams, all else comes whole."""
    if reader.char == "\n":
        yield
    streams, pieces = types == {"string"}, []
    if streams:
        reader.arguments('"')
    while not (found := (yield from reader.marker(["\n</parameter>", "</parameter>"]))):
        if reader.char == END:
            break
        if not reader.held:
            yield from reader.hold()
        if streams:
            reader.arguments(json.dumps("".join(reader.held), ensure_ascii=False)[1:-1])
        else:
            pieces += reader.held
        reader.held.clear()
    reader.held.clear()
    reader.arguments(('"' if found else "") if streams else _typed("".join(pieces), types))
    return found is not None


def types_of(schema: Any) -> frozenset[str]:
    """The JSON types that a property may have; empty when its schema does not say."""
    if not isinstance(schema, Mapping):
        return frozenset()
    own = schema.get("type", [])
    found = {own} if isinstance(own, str) else set(own)
    for choice in [*(schema.get("anyOf") or ()), *(schema.get("oneOf") or ())]:
        found |= types_of(choice)
    return frozenset(found | {_type_of(value) for value in schema.get("enum") or () if not own})


def _type_of(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _typed(text: str, types: frozenset[str]) -> str:
    """The JSON of an argument written as plain text: as JSON where that has an allowed type, else a string."""
    spoken = {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text.strip())
    try:
        kind = _type_of(json.loads(spoken, parse_constant=_refuse))
    except (ValueError, RecursionError):
        kind = "string"
    wider = types | {"integer"} if "number" in types else types
    if kind != "string" and (not types or kind in wider or (kind == "number" and "integer" in types)):
        return spoken
    return json.dumps(text, ensure_ascii=False)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")

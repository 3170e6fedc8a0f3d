"""What a `StructuredOutput` asks for, as a grammar of llguidance, and how far its outputs can be from their end."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gristmill.core import StructuredOutput
from gristmill.errors import RequestError

MOST_CHARACTERS = 1 << 18
"""Longer schemas, expressions and grammars are refused."""
_WHITE_SPACE = r"\n?[ \t]{0,16}"
_HEADER = '%llguidance {"no_forcing": true}\n'
"""Any spelling of a forced text is allowed, as without a form, not only the one the tokenizer would choose."""
_SUFFIX = re.compile(r'\[suffix=("(?:[^"\\]|\\.)*")')
_REPEATS = re.compile(r'(?:"min(?:Items|Length|Properties)"\s*:\s*|\{)(\d+)')


@dataclass(frozen=True)
class Form:
    """A grammar, and what bounds the bytes of the shortest end of an output.

    detour: one structural character takes an output at most so much farther from its end. farthest: no output is
    farther than this. Either may be infinite. free_strings: a string that any word may go on with is a free one.
    blanks: white space may be needed. closings: texts that end passages of free text.
    """

    field: str
    grammar: str
    detour: float = math.inf
    farthest: float = math.inf
    free_strings: bool = False
    blanks: bool = True
    closings: tuple[bytes, ...] = ()


def form_of(asked: StructuredOutput) -> Form:
    """Raises RequestError, naming the field, for what is no schema, expression, grammar or list of tools."""
    field = f"structured.{asked.kind}"
    form = _form_of(asked, field)
    return form if asked.outside is None else _after_passage(form, *asked.outside)


def _form_of(asked: StructuredOutput, field: str) -> Form:
    try:
        match asked.kind:
            case "json_schema":
                return _json_form(field, _schema(field, asked.json_schema), asked.compact)
            case "tools":
                return _json_form(field, call_schema(asked.tools or ()), asked.compact)
            case "json_object":
                return _json_form(field, {"type": "object"}, asked.compact)
            case "regex":
                return _regex_form(field, str(asked.regex))
            case "choice":
                return _choice_form(field, asked.choice or ())
        return _grammar_form(field, str(asked.grammar), math.inf if asked.detour is None else asked.detour)
    except RecursionError as error:
        raise RequestError(f"{field} is nested too deeply", field=field) from error


def call_schema(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """JSON schema of a call of one of the tools: {"name": ..., "arguments": {...}}.

    A tool is {"name": ..., "parameters": schema}, or that under "function" as OpenAI writes it. Raises RequestError
    for one without a name, or a name that comes twice.
    """
    calls, parameters, names = [], {}, set()
    for number, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
        name = function.get("name")
        if not isinstance(name, str) or not name or name in names:
            raise RequestError(f"structured.tools[{number}] needs a name of its own", field="structured.tools")
        names.add(name)
        # references inside a tool's schema start at its root, which lies deeper now
        parameters[f"tool{number}"] = _moved(function.get("parameters") or {"type": "object"}, f"#/$defs/tool{number}")
        properties = {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/tool{number}"}}
        calls.append(
            {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
        )
    if not calls:
        raise RequestError("structured.tools is empty", field="structured.tools")
    return {"$defs": parameters, "anyOf": calls}


def _moved(schema: Any, root: str) -> Any:
    if isinstance(schema, Mapping):
        return {
            key: root + value[1:]
            if key == "$ref" and isinstance(value, str) and value[:1] == "#"
            else _moved(value, root)
            for key, value in schema.items()
        }
    return [_moved(item, root) for item in schema] if isinstance(schema, list | tuple) else schema


def _schema(field: str, given: Mapping[str, Any] | str | None) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except ValueError as error:
        raise RequestError(f"{field} is not JSON: {error}", field=field) from error


def json_grammar(schema: Any, *, field: str, compact: bool = False) -> str:
    """JSON of this schema, in the notation of llguidance's grammars. Raises RequestError, naming the field."""
    if not isinstance(schema, Mapping) or "x-guidance" in schema:
        raise RequestError(f"{field} must be an object without x-guidance, got {schema!r:.60}", field=field)
    _refuse_what_is_not_kept(field, schema)
    white: dict[str, Any] = {"whitespace_flexible": False} if compact else {"whitespace_pattern": _WHITE_SPACE}
    try:
        return "%json " + _limited(field, json.dumps({**schema, "x-guidance": white}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise RequestError(f"{field} is not JSON: {error}", field=field) from error


def _json_form(field: str, schema: Any, compact: bool) -> Form:
    text = json_grammar(schema, field=field, compact=compact)
    free = '"pattern' not in text and '"format"' not in text
    return Form(field, f"{_HEADER}start: {text}", detour=json_detour(text), free_strings=free, blanks=False)


def _refuse_what_is_not_kept(field: str, schema: Any) -> None:
    """Keys that the schema does not name may come twice, and the JSON then has fewer properties than were written; the
    library reads whole numbers as floating-point ones."""
    if isinstance(schema, int) and abs(schema) > 1 << 53:
        raise RequestError(f"{field}: {schema} is beyond 2**53, where whole numbers are not exact", field=field)
    if isinstance(schema, Mapping):
        fewest = schema.get("minProperties", 0)
        if isinstance(fewest, int) and fewest > 1 and schema.get("additionalProperties") is not False:
            raise RequestError(
                f"{field}: minProperties {fewest} cannot be kept where keys are free. Name the properties in"
                ' "required", or set "additionalProperties": false',
                field=field,
            )
        schema = list(schema.values())
    if isinstance(schema, list | tuple):
        for item in schema:
            _refuse_what_is_not_kept(field, item)


def _regex_form(field: str, regex: str) -> Form:
    from llguidance import regex_to_lark

    if not regex:
        raise RequestError(f"{field} is empty", field=field)
    grammar = f"{_HEADER}start: /{regex_to_lark(_limited(field, regex), '')}/"
    return Form(field, grammar, farthest=_repeated(2 * len(regex.encode()) + 2, regex))


def _choice_form(field: str, choices: Sequence[str]) -> Form:
    if not choices or not all(isinstance(choice, str) and choice for choice in choices):
        raise RequestError(f"{field} needs one text or more, none of them empty", field=field)
    texts = _limited(field, " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices))
    return Form(field, f"{_HEADER}start: {texts}", farthest=max(len(choice.encode()) for choice in choices))


def _grammar_form(field: str, text: str, detour: float) -> Form:
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        lark = any_to_lark(_limited(field, text))
    except Exception as error:  # the library raises bare ones
        raise RequestError(f"{field} is refused: {error}", field=field) from error
    closings = tuple(json.loads(closing).encode() for closing in _SUFFIX.findall(lark))
    return Form(field, lark if "%llguidance" in lark else _HEADER + lark, detour=detour, closings=closings)


def _after_passage(form: Form, opening: str, closing: str) -> Form:
    """The form after a passage of free text."""
    passage = f'passage[suffix={json.dumps(closing)}]: /(.|\n)*/\ngap: ("\\n" "\\n"?)?\n'
    start = f"({json.dumps(opening)} passage gap)? form" if opening else "passage gap form"
    grammar = f"{_HEADER}start: {start}\n{passage}form: %lark {{\n{form.grammar}\n}}"
    # what was written of the closing text may have to be written again
    longer = len(closing.encode())
    return dataclasses.replace(
        form,
        grammar=grammar,
        detour=max(form.detour, longer),
        farthest=form.farthest + longer + len(opening.encode()),
        closings=(*form.closings, closing.encode()),
    )


def json_detour(text: str) -> float:
    """The detour of a form made of these JSON schemas and literal texts."""
    # an instance of no more than is required is hardly longer than its schema, but for repeats
    return _repeated(2 * len(text) + 64, text) * (1 + text.count('"$ref"'))


def _limited(field: str, text: str) -> str:
    if len(text) > MOST_CHARACTERS:
        raise RequestError(f"{field} has {len(text)} characters, at most {MOST_CHARACTERS} are taken", field=field)
    return text


def _repeated(length: int, text: str) -> float:
    return float(length) * math.prod(float(max(1, int(count[:9]))) for count in _REPEATS.findall(text))

"""Tool choice as a form of the answer: calls in the model's own spelling, so that its parser reads them.

The grammar is Lark's with llguidance's JSON schemas. Calls that must come are the whole answer; one that may come
begins at the format's marker, and the text before and after it is free.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gristmill.core import StructuredOutput
from gristmill.engine.constraints.form import json_detour, json_grammar
from gristmill.errors import RequestError, closest
from gristmill.tokens.answer.calls import types_of
from gristmill.tokens.answer.formats import AnswerFormat, CallStyle

_ANY = r"(.|\n)*"
_LIMITS = ("pattern", "format", "minLength", "maxLength")
_SEPARATORS = {CallStyle.LLAMA3: "; ", CallStyle.MISTRAL: ", ", CallStyle.MISTRAL_ARGS: ""}


def after_reasoning(structured: StructuredOutput, form: AnswerFormat, *, opened: bool = False) -> StructuredOutput:
    """The same form after the reasoning, where the format has any; `opened`: the prompt began the reasoning."""
    if form.reasoning is None:
        return structured
    opening, closing = form.reasoning
    return dataclasses.replace(structured, outside=("" if opened else opening, closing))


def calls_form(
    form: AnswerFormat,
    tools: Sequence[Mapping[str, Any]],
    choice: str | Mapping[str, Any] = "auto",
    *,
    parallel: bool = True,
) -> StructuredOutput | None:
    """What `tool_choice` makes of the answer; None where it may be any text.

    tools and choice are OpenAI's: "none", "auto", "required" or {"type": "function", "function": {"name": ...}}. A
    named function is called once, `required` without `parallel` likewise. With "auto" the arguments of functions that
    are `strict` follow their schema once a call begins, and without `parallel` there is one call at most. Reasoning is
    not part of it: see `after_reasoning`.

    Raises RequestError, naming the field, for a function that is not among the tools, a format without known calls, and
    a strict schema that the format cannot be held to.
    """
    functions = [tool.get("function", tool) for tool in tools]
    if choice == "none" or (choice == "auto" and parallel and not any(one.get("strict") for one in functions)):
        return None
    if form.calls is None:
        raise RequestError("this model's form of tool calls is not known", field="tool_choice")
    if not functions:
        raise RequestError("tool_choice needs tools. Give tools, or leave tool_choice out.", field="tool_choice")
    numbered = [*enumerate(functions)]
    if isinstance(choice, Mapping):
        numbered, parallel = [_named(numbered, choice)], False
    elif choice not in ("auto", "required"):
        raise RequestError(f"tool_choice {choice!r} is not known.{closest(choice, _CHOICES)}", field="tool_choice")
    writer = _WRITERS[form.calls]
    rules = [f"call{number}: {writer(one, number, choice == 'auto')}" for number, one in numbered]
    rules.append("call: " + " | ".join(f"call{number}" for number, _ in numbered))
    if form.calls is CallStyle.QWEN_XML:
        rules.append(_XML_TEXT)
    start = _free if choice == "auto" else _forced
    grammar = "\n".join([*start(form.calls, parallel), *rules])
    return StructuredOutput(grammar=grammar, markers=_MARKERS, detour=json_detour(grammar))


_CHOICES = ("none", "auto", "required")
_MARKERS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>")


def _named(
    functions: Sequence[tuple[int, Mapping[str, Any]]], choice: Mapping[str, Any]
) -> tuple[int, Mapping[str, Any]]:
    name = choice.get("function", choice).get("name")
    names = [one["name"] for _, one in functions]
    if name not in names:
        near = closest(str(name), names)
        raise RequestError(f"tool_choice names {name!r}, which is not in tools.{near}", field="tool_choice")
    return functions[names.index(name)]


def _forced(style: CallStyle, parallel: bool) -> list[str]:
    """Rules of an answer that is calls and nothing else."""
    marker = "" if style is CallStyle.LLAMA3 else _quoted(style.marker)
    if style is CallStyle.MISTRAL:
        more = f" ({_quoted(_SEPARATORS[style])} call)*" if parallel else ""
        return [f'start: {marker} "[" call{more} "]"']
    separator = _quoted(_SEPARATORS.get(style, "\n"))
    return [f"start: {marker} call" + (f" ({separator} {marker} call)*" if parallel else "")]


def _free(style: CallStyle, parallel: bool) -> list[str]:
    """Rules of an answer with calls perhaps. Free text never holds the marker, so that no call escapes its schema."""
    marker = re.escape(style.marker)
    rest = f"REST: /{_ANY}/ & ~/{_ANY}{marker}{_ANY}/"
    if style is CallStyle.LLAMA3:
        more = '("; " call)*' if parallel else ""
        return [f"start: call {more} | REST", rf"{rest} & ~/\s*\{{{_ANY}/"]
    calls = "call"
    if style is CallStyle.MISTRAL:
        calls = '"[" call (", " call)* "]"' if parallel else '"[" call "]"'
    times = "*" if parallel else "?"
    return [f"start: (head {calls}){times} REST", f"head[lazy]: /{_ANY}{marker}/", rest]


def _json_call(function: Mapping[str, Any], number: int, auto: bool, key: str = "arguments") -> str:
    head = f'{{"name": {json.dumps(function["name"])}, "{key}": '
    return f"{_quoted(head)} {_arguments(function, number, auto)} {_quoted('}')}"


def _hermes_call(function: Mapping[str, Any], number: int, auto: bool) -> str:
    return f"{_quoted(chr(10))} {_json_call(function, number, auto)} {_quoted(chr(10) + '</tool_call>')}"


def _llama_call(function: Mapping[str, Any], number: int, auto: bool) -> str:
    return _json_call(function, number, auto, "parameters")


def _named_call(function: Mapping[str, Any], number: int, auto: bool) -> str:
    call_id = '("[CALL_ID]" /[a-zA-Z0-9]{9}/)?'
    return f'{_quoted(function["name"])} {call_id} "[ARGS]" {_arguments(function, number, auto)}'


def _xml_call(function: Mapping[str, Any], number: int, auto: bool) -> str:
    """Arguments in the order of the schema. Text is free up to the closing tag; anything else is JSON."""
    schema = _schema(function)
    required, strict = schema.get("required", ()), bool(function.get("strict"))
    if (auto and not strict) or not isinstance(schema.get("properties"), Mapping):
        arguments = [f"({_quoted('<parameter=')} /[^>\\n<]+/ {_quoted('>' + chr(10))} {_TEXT})*"]
    else:
        arguments = []
        for key, value in schema["properties"].items():
            written = _quoted(f"<parameter={key}>\n") + " " + _xml_value(value, schema, strict, number, key)
            arguments.append(written if key in required else f"({written})?")
    head, tail = f"\n<function={function['name']}>\n", "</function>\n</tool_call>"
    return " ".join([_quoted(head), *arguments, _quoted(tail)])


_TEXT = "xml_text"
_XML_TEXT = f'{_TEXT}[suffix="\\n</parameter>\\n"]: /{_ANY}/'


def _xml_value(value: Mapping[str, Any], schema: Mapping[str, Any], strict: bool, number: int, key: str) -> str:
    types, end = types_of(value), _quoted("\n</parameter>\n")
    if types and "string" not in types:
        field = f"tools[{number}].function.parameters"
        return f"{json_grammar({**value, '$defs': schema.get('$defs', {})}, field=field)} {end}"
    if types == {"string"} and value.get("enum"):
        return "(" + " | ".join(_quoted(str(one)) for one in value["enum"]) + f") {end}"
    if strict and (types != {"string"} or any(name in value for name in _LIMITS)):
        raise RequestError(
            f"tools[{number}].function: this model writes arguments as plain text, which cannot be held to the schema "
            f"of {key!r}. Leave strict out, or give it one type without {', '.join(_LIMITS)}.",
            field=f"tools[{number}].function.strict",
        )
    return _TEXT


def _schema(function: Mapping[str, Any]) -> Mapping[str, Any]:
    return function.get("parameters") or {"type": "object"}


def _arguments(function: Mapping[str, Any], number: int, auto: bool) -> str:
    """The schema of the arguments; any object where nobody asked to keep to it."""
    schema = {"type": "object"} if auto and not function.get("strict") else _schema(function)
    return json_grammar(schema, field=f"tools[{number}].function.parameters")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


_WRITERS: Mapping[CallStyle, Callable[[Mapping[str, Any], int, bool], str]] = {
    CallStyle.HERMES: _hermes_call,
    CallStyle.QWEN_XML: _xml_call,
    CallStyle.LLAMA3: _llama_call,
    CallStyle.MISTRAL: _json_call,
    CallStyle.MISTRAL_ARGS: _named_call,
}

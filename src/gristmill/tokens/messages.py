"""Messages as they come, checked field by field, and as chat templates want them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gristmill.core import Message
from gristmill.errors import DataError, closest

Turn = dict[str, Any]
"""A message for a template: the arguments of its tool calls are objects, not JSON text."""

_OPTIONAL = {"name": None, "tool_call_id": "tool", "tool_calls": "assistant", "reasoning_content": "assistant"}
"""Optional fields, and the one role that has each."""


def check_messages(messages: Sequence[Message]) -> None:
    """Raise DataError, naming message and field, unless all can be rendered."""
    if not messages:
        raise DataError("the conversation is empty. Give at least one message.")
    known: set[str] = set()
    for index, message in enumerate(messages):
        check_message(message, index)
        known |= {call["id"] for call in message.get("tool_calls", ())}
        answered = message.get("tool_call_id")
        if answered is not None and answered not in known:
            raise DataError(f"message {index}: tool_call_id {answered!r} is the id of no call before it")


def check_message(message: Mapping[str, Any], index: int) -> None:
    """Raise DataError, naming the message, unless it has a role and content that can be rendered, and of other fields
    only those of `core.Message`, of their types."""
    if not isinstance(message, dict):
        raise DataError(f"message {index}: expected an object with role and content, got {type(message).__name__}")
    for field in ("role", "content"):
        if field not in message:
            raise DataError(f"message {index}: field {field!r} is missing (found: {', '.join(message) or 'nothing'})")
    for field, value in message.items():
        if field not in ("role", "content", *_OPTIONAL):
            mend = closest(field, _OPTIONAL) or " Remove it."
            raise DataError(f"message {index}: field {field!r} is not supported.{mend}")
        if (role := _OPTIONAL.get(field)) is not None and message["role"] != role:
            raise DataError(f"message {index}: only the role {role} has the field {field!r}")
        if field != "tool_calls":
            _check_text(index, field, value)
    if "tool_calls" in message:
        _check_calls(message["tool_calls"], index)


def _check_text(index: int, field: str, value: object) -> None:
    if not isinstance(value, str):
        raise DataError(f"message {index}: field {field!r} must be text, got {type(value).__name__}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"message {index}: field {field!r} holds half of a surrogate pair, which is not text")


def _check_calls(calls: object, index: int) -> None:
    if not isinstance(calls, list | tuple) or not calls:
        raise DataError(f"message {index}: field 'tool_calls' must be a list of calls, got {calls!r:.60}")
    for number, call in enumerate(calls):
        field = f"tool_calls[{number}]"
        _check_keys(index, field, call, ("id", "type", "function"))
        _check_text(index, f"{field}.id", call["id"])
        if call["type"] != "function":
            raise DataError(f"message {index}: field '{field}.type' must be 'function', got {call['type']!r:.60}")
        _check_keys(index, f"{field}.function", call["function"], ("name", "arguments"))
        for key, value in call["function"].items():
            _check_text(index, f"{field}.function.{key}", value)


def _check_keys(index: int, field: str, value: object, keys: tuple[str, ...]) -> None:
    if not isinstance(value, dict) or set(value) != set(keys):
        found = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise DataError(f"message {index}: field {field!r} must have exactly {', '.join(keys)} (found: {found})")


def turns_of(messages: Sequence[Message]) -> list[Turn]:
    """Checked messages as a template wants them. Raises DataError where arguments are not a JSON object."""
    turns: list[Turn] = [dict(message) for message in messages]
    for index, turn in enumerate(turns):
        if "tool_calls" in turn:
            turn["tool_calls"] = [_parsed(call, index, number) for number, call in enumerate(turn["tool_calls"])]
    return turns


def _parsed(call: Mapping[str, Any], index: int, number: int) -> Turn:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}", parse_constant=_refuse)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise DataError(
            f"message {index}: field 'tool_calls[{number}].function.arguments' must be the text of a JSON object, "
            f"got {function['arguments']!r:.60}"
        )
    return {"id": call["id"], "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def check_tools(tools: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Tools as templates want them: {"type": "function", "function": {"name", "description", "parameters"}}.

    Raises DataError for what is no tool, or has no name of its own.
    """
    checked: list[Turn] = []
    for number, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name or any(name == other["function"]["name"] for other in checked):
            raise DataError(f"tools[{number}] needs a function with a name of its own")
        checked.append({"type": "function", "function": dict(function or {})})
    return checked


def texts_in(value: object) -> Iterator[str]:
    """All texts in a JSON-like value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from texts_in(key)
            yield from texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)


def in_hermes_form(turns: Sequence[Turn], tools: Sequence[Turn]) -> list[Turn]:
    """A conversation with tools for a template that knows none, in the form of the Hermes models.

    The tools are described at the end of the system message (one is put first where there is none), calls become text
    of the answer, and results become user messages between `<tool_response>` tags.
    Source: Teknium et al. 2024 (Hermes 3), function calling; its tags, our words.
    """
    changed = [_as_text(turn) for turn in turns]
    if not tools:
        return changed
    description = _DESCRIPTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if changed[0]["role"] == "system":
        return [{**changed[0], "content": f"{changed[0]['content']}\n\n{description}"}, *changed[1:]]
    return [{"role": "system", "content": description}, *changed]


_DESCRIPTION = """\
You can call functions to help the user. They are described here, one JSON object on each line:
<tools>
{tools}
</tools>
To call functions, write for each call its name and arguments as a JSON object between these tags:
<tool_call>
{{"name": "FUNCTION_NAME", "arguments": {{"ARGUMENT": "VALUE"}}}}
</tool_call>
The results come back between <tool_response> and </tool_response>. If no function helps, answer without one."""


def _as_text(turn: Turn) -> Turn:
    if turn["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{turn['content']}\n</tool_response>"}
    if "tool_calls" not in turn:
        return turn
    calls = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>" for call in turn["tool_calls"]
    ]
    text = "\n".join([*([turn["content"]] if turn["content"] else []), *calls])
    return {**{key: value for key, value in turn.items() if key != "tool_calls"}, "content": text}

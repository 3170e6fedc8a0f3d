"""Chat templates as text: the ChatML constant, and Jinja templates as Hugging Face tokenizers carry them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gristmill.errors import DataError, closest
from gristmill.tokens.tokenizer import Tokenizer

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"

CHATML = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role ' ~ message['role']) }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Turns between `<|im_start|>role` and `<|im_end|>`, for the roles system, user, assistant and tool.

Source: OpenAI 2023, Chat Markup Language.
"""

NAMED = {"chatml": CHATML}


def read_template(name_or_path: str) -> str:
    """A template by its name (`chatml`) or from a `.jinja` file. Raises DataError when it is neither."""
    if name_or_path in NAMED:
        return NAMED[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        raise DataError(f"template {name_or_path!r} is neither a name nor a file.{closest(name_or_path, NAMED)}")
    return path.read_text(encoding="utf-8")


class ChatTemplate:
    """A Jinja chat template with the names that Hugging Face templates expect.

    Raises DataError when `source` is not a Jinja template.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self._reads = meta.find_undeclared_variables(environment.parse(source))
        except TemplateError as error:
            raise DataError(f"chat template: {error} (line {getattr(error, 'lineno', '?')})") from error
        self.source = source
        ids = {"bos_token": tokenizer.bos_token_id, "eos_token": tokenizer.eos_token_id}
        ids["pad_token"] = tokenizer.pad_token_id
        self._names = {name: tokenizer.token_of(index) for name, index in ids.items() if index is not None}

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text; with the generation prompt it ends where the assistant's answer begins.

        `options` are further names for the template. Raises DataError with the template's own words when it refuses
        the conversation.
        """
        try:
            return self._template.render(
                **(options or {}),
                messages=list(messages),
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._names,
            )
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise DataError(f"the chat template refuses this conversation: {error}") from error

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise DataError for a name that the template never reads, or that is not the caller's to give."""
        own = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
        free = self._reads - own - {"bos_token", "eos_token", "pad_token"}
        for name in options:
            if name not in free:
                reads = f" It reads {', '.join(sorted(free))}." if free else " It has no options."
                raise DataError(f"template option {name!r} is not read by this model's chat template.{reads}")

    def answer_starts(
        self,
        messages: Sequence[Mapping[str, Any]],
        text: str,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        exact: bool = True,
    ) -> dict[int, int]:
        """Where each assistant message begins in `text`: its index in `messages` -> a position in characters.

        An answer begins where the generation prompt of the messages before it ends. Raises DataError when that
        prompt is not a prefix of `text`, for then the model would be asked with other words than it learned from.
        Not `exact`, reasoning that only the prompt opens or closes counts for the answer, and an answer whose prompt is
        no prefix even then is left out.
        """
        starts: dict[int, int] = {}
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.text(messages[:index], tools=tools, add_generation_prompt=True)
            if not exact and not text.startswith(prompt):
                prompt = _REASONING.sub("", prompt)
            if text.startswith(prompt):
                starts[index] = len(prompt)
            elif exact:
                raise DataError(_not_a_prefix(index, prompt, text))
        return starts


_REASONING = re.compile(r"<(\w+)>\s*(</\1>\s*)?\Z")
"""The end of a prompt that opens the reasoning, and perhaps closes it at once."""


def _not_a_prefix(index: int, prompt: str, text: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), min(len(prompt), len(text)))
    near = slice(max(0, same - 20), same + 40)
    return (
        f"message {index}: the chat template is not prefix-preserving. Asking for this answer it prints "
        f"{prompt[near]!r}, in the whole conversation {text[near]!r} (character {same}). Use a template that prints "
        "earlier messages alike whatever follows them."
    )


class _GenerationTag(Extension):
    """Lets `{% generation %}...{% endgeneration %}` through: it marks answers, which we find in our own way."""

    tags = {"generation"}  # noqa: RUF012 - the attribute that Jinja reads

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    # Templates come with downloaded models, so they run in the sandbox and can change nothing that they are given.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.filters["tojson"] = _tojson  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

"""Fill a frozen dataclass from a YAML file (`--config`) and dotted command-line overrides."""

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TypeVar, get_origin, get_type_hints

import jsonargparse
from jsonargparse import set_parsing_settings

from gristmill.errors import closest

C = TypeVar("C")


class _Parser(jsonargparse.ArgumentParser):
    """Tells what is wrong and the closest names, and not all options there are."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        told = " ".join(message.split()).replace(". Got value:", ", got")
        told = re.sub(r"a typing\.Literal\[(.*?)\],", r"one of \1,", told)
        told = re.sub(r"a <class '(\w+)'>", r"\1", told).rstrip(".")
        self.exit(2, f"{self.prog}: {told}.{self._closest(message)} All options: {self.prog} --help\n")

    def _closest(self, message: str) -> str:
        choices, _, value = message.partition("Got value: ")
        if "Literal[" in choices:
            return closest(value, re.findall(r"'([^']*)'", choices))
        group = re.search(r"Group '([\w.]+)'", message)
        wrong = re.search(r"--([\w.]+)|[Oo]ption '([\w.]+)'", message)
        if wrong is None:
            return ""
        name = wrong[1] or (f"{group[1]}.{wrong[2]}" if group else wrong[2])
        known = [action.dest for action in self._actions]
        return "" if name in known else closest(name, known)


def parser_for(config: type[Any], program: str) -> jsonargparse.ArgumentParser:
    """A parser whose options are the fields of `config`; fields without a default are positional.

    `--print_config` writes a YAML file, and `--print_config=comments` one with the help beside each key; both
    load back with `--config`. A field may have `metadata={"flag": "--other"}`, another spelling of its option.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    # an abbreviation would change its meaning with every new option
    parser = _Parser(prog=program, description=(config.__doc__ or "").strip(), allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_class_arguments(config, as_positional=True)
    flags = {field.name: field.metadata["flag"] for field in dataclasses.fields(config) if "flag" in field.metadata}
    for action in parser._actions:
        if action.dest in flags:
            action.option_strings = [*action.option_strings, flags[action.dest]]
            parser._option_string_actions[flags[action.dest]] = action
    return parser


def parse(config: type[C], program: str, arguments: Sequence[str]) -> C:
    """The options as an instance of `config`. Exits with code 2 and a message that names a wrong option and the
    closest ones."""
    parser = parser_for(config, program)
    named = _named(config, arguments)
    for name, kind in _fields(config):
        given = [word for word in named if word.partition("=")[0] == f"--{name}"]
        if len(given) > 1 and _holds_several(kind):  # argparse would take the last and drop the others
            parser.error(f"--{name} is given {len(given)} times: write --{name} [a,b]")
    namespace = parser.parse_args(named)
    values = parser.instantiate(namespace).as_dict()
    values.pop("config", None)
    return config(**values)


def _fields(config: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and types of all fields, those of dataclasses inside included."""
    for name, kind in get_type_hints(config).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from _fields(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


def _holds_several(kind: Any) -> bool:
    return any(get_origin(part) in (tuple, list) for part in (kind, *getattr(kind, "__args__", ())))


def _named(config: type[Any], arguments: Sequence[str]) -> list[str]:
    """Name the bare words behind the required ones, and give bare switches their value: `get x` becomes
    `get --name=x`, and `--chat` becomes `--chat=true`.

    The words go, in order, to the fields with `metadata={"positional": True}`. Optional positionals of argparse would
    not do: they must not follow an option, and when absent they wipe out what `--config` said. Where the only required
    field is a list, all words go to it: `serve a b` becomes `serve ["a", "b"]`.
    """
    fields = dataclasses.fields(config)
    switches = {f"--{name}" for name, kind in _fields(config) if kind is bool}
    needed = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    required, listed = len(needed), [n for n in needed if get_origin(get_type_hints(config)[n]) is list]
    words: list[str] = []
    names = [f.name for f in fields if f.metadata.get("positional")]
    named, left, bare = [], list(arguments), 0
    while left:
        word = left.pop(0)
        if word in switches and left[:1] not in (["true"], ["false"]):
            named.append(f"{word}=true")
        elif word.startswith("-") and word != "-":
            named.append(word)
            if "=" not in word and word not in ("-h", "--help", "--print_config"):
                named.extend(left[:1])
                del left[:1]
        elif listed:
            words.append(word)
        else:
            bare += 1
            named.append(f"--{names.pop(0)}={word}" if bare > required and names else word)
    return [json.dumps(words), *named] if words else named

"""Fill a frozen dataclass from a YAML file (`--config`) and dotted command-line overrides."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jsonargparse
from jsonargparse import set_parsing_settings

C = TypeVar("C")


def parser_for(config: type[Any], program: str) -> jsonargparse.ArgumentParser:
    """A parser whose options are the fields of `config`; fields without a default are positional.

    `--print_config` writes a YAML file, and `--print_config=comments` one with the help beside each key; both
    load back with `--config`. A field may have `metadata={"flag": "--other"}`, another spelling of its option.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=program, description=(config.__doc__ or "").strip())
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_class_arguments(config, as_positional=True)
    flags = {field.name: field.metadata["flag"] for field in dataclasses.fields(config) if "flag" in field.metadata}
    for action in parser._actions:
        if action.dest in flags:
            action.option_strings = [*action.option_strings, flags[action.dest]]
            parser._option_string_actions[flags[action.dest]] = action
    return parser


def parse(config: type[C], program: str, arguments: Sequence[str]) -> C:
    """The options as an instance of `config`. Exits with code 2 and a message that names a wrong option."""
    parser = parser_for(config, program)
    namespace = parser.parse_args(_named(config, arguments))
    values = parser.instantiate(namespace).as_dict()
    values.pop("config", None)
    return config(**values)


def _named(config: type[Any], arguments: Sequence[str]) -> list[str]:
    """Name the bare words behind the required ones, and give bare switches their value: `get x` becomes
    `get --name=x`, and `--chat` becomes `--chat=true`.

    The words go, in order, to the fields with `metadata={"positional": True}`. Optional positionals of argparse would
    not do: they must not follow an option, and when absent they wipe out what `--config` said.
    """
    fields = dataclasses.fields(config)
    switches = {f"--{f.name}" for f in fields if f.type in (bool, "bool")}
    required = sum(f.default is f.default_factory is dataclasses.MISSING for f in fields)
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
        else:
            bare += 1
            named.append(f"--{names.pop(0)}={word}" if bare > required and names else word)
    return named

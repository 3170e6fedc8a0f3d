"""Fill a frozen dataclass from a YAML file (`--config`) and dotted command-line overrides."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jsonargparse
from jsonargparse import set_parsing_settings

C = TypeVar("C")


def parser_for(config: type[Any], program: str) -> jsonargparse.ArgumentParser:
    """A parser whose options are the fields of `config`; fields without a default are positional.

    `--print_config` writes a YAML file, and `--print_config=comments` one with the help beside each key; both
    load back with `--config`.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=program, description=(config.__doc__ or "").strip())
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_class_arguments(config, as_positional=True)
    return parser


def parse(config: type[C], program: str, arguments: Sequence[str]) -> C:
    """The options as an instance of `config`. Exits with code 2 and a message that names a wrong option."""
    parser = parser_for(config, program)
    namespace = parser.parse_args(list(arguments))
    values = parser.instantiate_classes(namespace).as_dict()
    values.pop("config", None)
    return config(**values)

"""gristmill tokens show FILE: how conversations are tokenised and which tokens are learned."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from gristmill.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    """Print conversations with the tokens that a model would learn marked."""

    action: Literal["show"]
    """What to do."""
    file: str
    """JSONL file with one {"messages": [...]} a line, or JSON file with one or a list of them."""
    tokenizer: str = "smollm2-135m"
    """Where the tokenizer comes from: a model's name, a Hugging Face or run directory or a GGUF file."""
    template: str | None = None
    """Chat template: chatml or a .jinja file. Without it the tokenizer's own, else ChatML."""
    ids: bool = False
    """List every token with its id below the text."""
    allow_special: bool = False
    """Let messages spell special tokens."""


def run(config: Config) -> int:
    """Show the file; 0 when every conversation could be rendered."""
    from gristmill.tokens.renderer import JinjaRenderer
    from gristmill.tokens.show import show_file
    from gristmill.tokens.templates import read_template

    template = None if config.template is None else read_template(config.template)
    tokenizer = _load(config.tokenizer)
    renderer = JinjaRenderer(tokenizer, template, allow_special=config.allow_special)
    show_file(Path(config.file), renderer, sys.stdout, ids=config.ids)
    return 0


def _load(path_or_name: str) -> Tokenizer:
    from gristmill.tokens.tokenizer import Tokenizer

    if (Path(path_or_name) / "tokenizer.json").is_file():
        return Tokenizer.load(Path(path_or_name))  # without torch, which takes seconds to import
    from gristmill.model.load import load_tokenizer

    return load_tokenizer(path_or_name)

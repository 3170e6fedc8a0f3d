"""Show how conversations are tokenised and which tokens a model would learn."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from gristmill.core import Rendered, Renderer
from gristmill.errors import DataError
from gristmill.files import read_jsonl

OPEN, CLOSE = "\u27e6", "\u27e7"
"""Brackets around learned text where there are no colours."""


def show_file(path: Path, renderer: Renderer, out: TextIO, *, ids: bool = False, colour: bool | None = None) -> int:
    """Print every conversation of a JSONL or JSON file with its learned tokens marked; returns how many there were.

    On a terminal (`colour` None asks `out`) learned text is highlighted, elsewhere it stands between `OPEN` and
    `CLOSE`. `ids` lists the single tokens too. Raises DataError, naming file and line, for the first conversation
    that cannot be read or rendered, and for a file without any.
    """
    shown = 0
    for where, record in _records(path):
        if "messages" not in record:
            raise DataError(f'{where}: field "messages" is missing (found: {", ".join(record) or "nothing"})')
        if not isinstance(record["messages"], list):
            raise DataError(f'{where}: field "messages" must be a list, got {type(record["messages"]).__name__}')
        try:
            rendered = renderer.render(record["messages"])
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        show(rendered, where, out, ids=ids, colour=out.isatty() if colour is None else colour)
        shown += 1
    if shown == 0:
        raise DataError(f"{path}: holds no conversation")
    return shown


def show(rendered: Rendered, title: str, out: TextIO, *, ids: bool = False, colour: bool = False) -> None:
    """Print one conversation: a line of counts, the text with learned runs marked and, with `ids`, the tokens."""
    learned = sum(rendered.loss_mask)
    count = len(rendered.token_ids)
    heading = f"{title}: {count} tokens, {learned} learned ({learned / max(count, 1):.0%})"
    if colour:
        _print_coloured(rendered, heading, out)
    else:
        marked = "".join(f"{OPEN}{text}{CLOSE}" if mask else text for mask, text in runs(rendered))
        out.write(f"{heading}\n{marked}\n")
    if ids:
        for index, mask, (start, end) in zip(rendered.token_ids, rendered.loss_mask, rendered.offsets, strict=True):
            out.write(f"{index:>8}  {'learned' if mask else '-':<7}  {rendered.text[start:end]!r}\n")
    out.write("\n")


def runs(rendered: Rendered) -> list[tuple[int, str]]:
    """The text in runs of equal mask: (mask, text), in order; joined they are `rendered.text`."""
    marked = zip(rendered.loss_mask, rendered.offsets, strict=True)
    starts = [(mask, next(group)[1][0]) for mask, group in itertools.groupby(marked, key=lambda pair: pair[0])]
    ends = [start for _, start in starts[1:]] + [len(rendered.text)]
    return [(mask, rendered.text[start:end]) for (mask, start), end in zip(starts, ends, strict=True)]


def _print_coloured(rendered: Rendered, heading: str, out: TextIO) -> None:
    from rich.console import Console
    from rich.text import Text

    body = Text()
    for mask, text in runs(rendered):
        text = text.replace("\x1b", "\u241b")  # what a message holds must not steer the terminal
        body.append(text, style="black on green" if mask else "dim")
    console = Console(file=out, force_terminal=True, highlight=False)
    console.print(Text(heading, style="bold"))
    console.print(body, soft_wrap=True)


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each conversation stands and what it is; a .json file holds one object or a list of them."""
    if path.suffix != ".json":
        yield from ((f"{path} line {number}", record) for number, record in read_jsonl(path))
        return
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from error
    single = isinstance(value, dict)
    for index, record in enumerate([value] if single else value if isinstance(value, list) else [None]):
        where = str(path) if single else f"{path} item {index}"
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object with messages")
        yield where, record

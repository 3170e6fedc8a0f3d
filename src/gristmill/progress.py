"""Progress of long work on stderr: a live bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

Advance = Callable[..., None]
"""advance(done, note=''): tell how many units are done in all, and what to show beside them."""

_SECONDS_BETWEEN_LINES = 15.0


@contextlib.contextmanager
def progress(description: str, total: int, *, done: int = 0) -> Iterator[Advance]:
    """Show work of `total` units of which `done` were finished before. Yields the function to report with."""
    if sys.stderr.isatty():
        with _bar(description, total, done) as advance:
            yield advance
    else:
        yield _lines(description, total, done)


@contextlib.contextmanager
def _bar(description: str, total: int, done: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total, completed=done, note="")
        yield lambda count, note="": bar.update(task, completed=count, note=note)


def _lines(description: str, total: int, done: int) -> Advance:
    started = last = time.monotonic()

    def advance(count: int, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _SECONDS_BETWEEN_LINES and count < total:
            return
        last = now
        left = (now - started) / max(count - done, 1) * max(total - count, 0)
        print(f"{description}: {count}/{total}, {left:.0f} s left {note}".rstrip(), file=sys.stderr, flush=True)

    return advance

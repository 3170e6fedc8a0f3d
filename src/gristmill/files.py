"""Atomic writes: a reader sees the old file or the new one, never half of either.

A temporary sibling is written, flushed to disk and renamed over the target; on any error (a full disk, Ctrl-C)
the sibling is removed and the old file stays as it was.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gristmill.errors import DataError, GristmillError

_LEFTOVER = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.tmp")


def _sibling(path: Path) -> Path:  # its name is what _LEFTOVER matches
    return path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write a file at; it replaces `path` when the block ends without error.

    Raises GristmillError when the disk is full or the folder cannot be written; `path` is then unchanged.
    """
    temporary = _sibling(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # nothing to remove, or a folder that was never there
            temporary.unlink()


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory to fill; it becomes `path` when the block ends without error.

    An existing directory at `path` is moved aside first and deleted only after the new one stands. A SIGKILL in the
    instant between leaves both beside it, under hidden names.
    """
    temporary, old = _sibling(path), _sibling(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb+") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        if old.exists() and not path.exists():  # stopped between the two renames, by an error or by Ctrl-C
            old.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Delete the temporary siblings that killed writers left in `directory`. Nobody else may be writing there."""
    for path in list(directory.glob(".*.tmp")):
        if _LEFTOVER.fullmatch(path.name) is None:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold the directory of a run: two processes in it would overwrite each other. What killed ones left half-written
    there, and in the folders in it, is removed. Raises GristmillError when it is held or cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = (directory / ".lock").open("w")
    except OSError as error:
        raise GristmillError(f"{directory}: cannot be used as a run directory ({error.strerror})") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise GristmillError(f"{directory}: another process is running here") from error
        for place in (directory, *filter(Path.is_dir, list(directory.iterdir()))):
            remove_leftovers(place)
        yield


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically. NaN is refused: it is not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_jsonl(
    path: Path, *, on_error: Callable[[DataError], None] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number, from 1, and object of each line that is not blank.

    Raises DataError with file, line and byte for a line that is not UTF-8, not JSON or not an object; with
    `on_error` the error is handed to it instead, and when it returns the line is left out. A missing file raises.
    """
    try:
        handle = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    offset = 0
    with handle:
        for number, line in enumerate(handle, start=1):
            begin, offset = offset, offset + len(line)
            if not line.strip():
                continue
            try:
                yield number, _parse_line(line, f"{path} line {number}", begin)
            except DataError as error:
                if on_error is None:
                    raise
                on_error(error)


def _parse_line(line: bytes, where: str, begin: int) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig" if begin == 0 else "utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {begin + error.start} (0x{line[error.start]:02x})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}, column {error.colno}: not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested without end
        raise DataError(f"{where}: not JSON that can be read ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _write_error(path: Path, error: OSError) -> GristmillError:
    return GristmillError(
        f"{path}: could not be written ({error.strerror or error}); what was there before is unchanged."
    )

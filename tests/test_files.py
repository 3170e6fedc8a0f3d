"""Atomic writes and reading JSONL."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gristmill.errors import DataError, GristmillError
from gristmill.files import atomic_directory, atomic_path, read_jsonl, remove_leftovers, write_json


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_appears_whole_and_with_its_folders(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert only(target.parent) == ["b.txt"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_after_an_error_the_old_file_stands_alone(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "b.txt"
    target.write_text("old")
    expected = GristmillError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), atomic_path(target) as temporary:  # noqa: PT012
        temporary.write_text("half of the n")
        raise error
    assert target.read_text() == "old"
    assert only(tmp_path) == ["b.txt"]


def test_a_disk_that_fills_up_while_flushing_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "b.json"
    write_json(target, {"old": 1})
    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(GristmillError, match=r"b\.json: could not be written \(No space left on device\)"):
        write_json(target, {"new": 2})
    with pytest.raises(GristmillError, match="No space left"), atomic_directory(tmp_path / "d") as temporary:
        (temporary / "x").write_text("x")
    assert json.loads(target.read_text()) == {"old": 1}
    assert only(tmp_path) == ["b.json"]


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for write in (atomic_path, atomic_directory):
        with pytest.raises(GristmillError, match="could not be written"), write(tmp_path / "file" / "x"):
            pytest.fail("there is no place to write to")
    assert only(tmp_path) == ["file"]


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", float("nan"))


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    with atomic_directory(folder) as temporary:
        (temporary / "weights").write_text("old")
    return folder


def test_a_directory_replaces_the_old_one_whole(filled: Path) -> None:
    with atomic_directory(filled) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "new").write_text("new")
        assert only(filled) == ["weights"]
    assert only(filled) == ["sub"]
    assert only(filled.parent) == ["model"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_after_an_error_the_old_directory_stands_alone(filled: Path, error: BaseException) -> None:
    expected = GristmillError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), atomic_directory(filled) as temporary:  # noqa: PT012
        (temporary / "weights").write_text("new")
        raise error
    assert (filled / "weights").read_text() == "old"
    assert only(filled.parent) == ["model"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_an_error_between_the_two_renames_brings_the_old_directory_back(
    filled: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    rename: Callable[[Path, Path], Path] = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == filled and (self / "weights").read_text() == "new":
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    expected = GristmillError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), atomic_directory(filled) as temporary:
        (temporary / "weights").write_text("new")
    assert (filled / "weights").read_text() == "old"
    assert only(filled.parent) == ["model"]


def jsonl(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_objects_come_with_their_line_numbers(tmp_path: Path) -> None:
    # U+2028 ends a line for str.splitlines, but not in JSONL.
    content = b'\xef\xbb\xbf{"a": 1}\n\n  \r\n{"b": "x\xe2\x80\xa8y"}\r\n{"c": 3}'
    read = list(read_jsonl(jsonl(tmp_path / "x.jsonl", content)))
    assert read == [(1, {"a": 1}), (4, {"b": "x\u2028y"}), (5, {"c": 3})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": "\xff"}', r"x\.jsonl line 2: not UTF-8 at byte 16 \(0xff\)"),
        (b'{"a": }', r"x\.jsonl line 2, column 7: not JSON"),
        (b'["a"]', r"x\.jsonl line 2: expected a JSON object, found list"),
        (b"1" * 5000, r"x\.jsonl line 2: not JSON"),
        (b"[" * 200_000, r"x\.jsonl line 2: not JSON"),
    ],
    ids=["utf-8", "json", "list", "number", "nesting"],
)
def test_a_broken_line_is_named_or_handed_over(tmp_path: Path, line: bytes, reason: str) -> None:
    path = jsonl(tmp_path / "x.jsonl", b'{"a": 1}\n' + line + b'\n{"c": 3}\n')
    with pytest.raises(DataError, match=reason):
        list(read_jsonl(path))
    errors: list[DataError] = []
    assert [number for number, _ in read_jsonl(path, on_error=errors.append)] == [1, 3]
    assert len(errors) == 1


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match=f"{path.name}: cannot be read"):
            list(read_jsonl(path))


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    code = f"""
import os, pathlib
from gristmill.files import atomic_directory, atomic_path
here = pathlib.Path({str(tmp_path)!r})
with atomic_path(here / "file") as file, atomic_directory(here / "folder") as folder:
    file.write_text("half")
    (folder / "x").write_text("half")
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert len(only(tmp_path)) == 2
    (tmp_path / ".notes.tmp").write_text("mine")
    (tmp_path / "data.1.0123abcd.tmp").write_text("mine")
    remove_leftovers(tmp_path)
    assert only(tmp_path) == [".notes.tmp", "data.1.0123abcd.tmp"]
    remove_leftovers(tmp_path / "not there")

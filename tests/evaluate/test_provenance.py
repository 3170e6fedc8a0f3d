"""A hash stands for the values and nothing else; a revision is only told where it is the project's own."""

import hashlib
import re
import subprocess
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.errors import DataError
from gristmill.evaluate.provenance import content_hash, git_revision, provenance


class Preset(Enum):
    TINY = "tiny"


@dataclass(frozen=True)
class Inner:
    rate: float = 1e-3


@dataclass(frozen=True)
class Config:
    out: Path = Path("runs/a")
    preset: Preset = Preset.TINY
    inner: Inner = field(default_factory=Inner)
    sizes: tuple[int, ...] = (1, 2)
    note: str | None = None


def test_the_hash_is_that_of_the_canonical_json() -> None:
    text = '{"inner":{"rate":0.001},"note":null,"out":"runs/a","preset":"tiny","sizes":[1,2]}'
    assert content_hash(Config()) == hashlib.sha256(text.encode()).hexdigest()
    assert content_hash(Config()) == content_hash(Config(sizes=(1, 2)))
    assert content_hash(Config()) != content_hash(Config(inner=Inner(rate=2e-3)))


@given(st.dictionaries(st.text(), st.one_of(st.integers(), st.text(), st.booleans())))
def test_the_order_of_keys_does_not_matter(values: dict[str, Any]) -> None:
    assert content_hash(values) == content_hash(dict(reversed(values.items())))


@pytest.mark.parametrize("value", [object(), float("nan"), b"bytes", {1, 2}])
def test_what_cannot_be_written_is_named(value: object) -> None:
    with pytest.raises(DataError, match=r"value\.a\[1\]"):
        content_hash({"a": [0, value]})


def test_facts_are_text_and_complete() -> None:
    facts = provenance(Config(), seed=7)
    assert all(isinstance(value, str) and value for value in facts.values())
    assert facts["seed"] == "7"
    assert facts["config hash"] == content_hash(Config())
    assert {"python", "torch", "gristmill", "machine", "date"} <= facts.keys()
    assert re.search(r", \d+ cores, ", facts["machine"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", facts["date"])


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(root), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_revision_of_a_checkout_and_whether_it_was_changed(tmp_path: Path) -> None:
    package = tmp_path / "src" / "gristmill"
    package.mkdir(parents=True)
    (package / "a.py").write_text("x = 1\n")
    assert git_revision(package) is None
    git(tmp_path, "init", "-q")
    assert git_revision(package) is None  # no commit yet
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    assert git_revision(package) == git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "notes.txt").write_text("not source\n")
    assert git_revision(package) == git(tmp_path, "rev-parse", "HEAD")
    (package / "a.py").write_text("x = 2\n")
    assert git_revision(package) == git(tmp_path, "rev-parse", "HEAD") + " (modified)"


def test_an_installed_copy_inside_another_repository_has_no_revision(tmp_path: Path) -> None:
    package = tmp_path / ".venv" / "lib" / "gristmill"
    package.mkdir(parents=True)
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "theirs")
    assert git_revision(package) is None

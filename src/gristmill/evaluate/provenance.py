"""Where a figure comes from: configuration, seed, code revision, versions and machine."""

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gristmill.errors import DataError

PACKAGES = ("gristmill", "torch", "numpy", "tokenizers", "safetensors")


def provenance(config: object, seed: int) -> dict[str, str]:
    """Facts to print beside every figure of a run.

    The revision is left out where the package is not run from a checkout of the project. Raises DataError when the
    configuration holds a value that cannot be written down.
    """
    facts = {"seed": str(seed), "config hash": content_hash(config)}
    if revision := git_revision(Path(__file__).resolve().parents[1]):
        facts["git revision"] = revision
    facts["python"] = platform.python_version()
    facts |= {name: found for name in PACKAGES if (found := _version(name))}
    facts["machine"] = f"{_processor()}, {_cores()} cores, {platform.system()} {platform.machine()}"
    facts["date"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return facts


def content_hash(value: object) -> str:
    """SHA-256 of the canonical JSON of a dataclass, mapping or list: sorted keys, no spaces, paths as text.

    Two configurations or tasks with the same hash hold the same values.
    """
    text = json.dumps(_plain(value, "value"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def git_revision(package: Path) -> str | None:
    """Revision of the project's checkout, with ' (modified)' where its source was changed; None outside of one."""
    root = package.parents[1]
    # An installed copy inside someone else's repository must not report that repository's revision.
    if package != root / "src" / "gristmill" or not (root / ".git").exists():
        return None
    revision = _git(root, "rev-parse", "HEAD")
    if not revision:
        return None
    changes = _git(root, "status", "--porcelain", "--", "src", "pyproject.toml")
    return f"{revision} (modified)" if changes else revision


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _plain(value: object, path: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name), f"{path}.{name}") for name in fields}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, Enum):
        return _plain(value.value, path)
    if isinstance(value, Path):
        return value.as_posix()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and value == value and abs(value) != float("inf"):
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    raise DataError(f"{path}: {value!r} cannot be written as JSON, so the configuration has no hash")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or "unknown processor"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

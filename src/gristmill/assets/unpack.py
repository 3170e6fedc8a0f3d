"""Take archives apart safely, and hash what comes out.

All names of an archive are checked before the first byte is written: a path that would leave the target, a link or
a device is refused, never skipped or renamed.
"""

from __future__ import annotations

import hashlib
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import IO

from gristmill.errors import AssetError

_ZIP = (".whl", ".zip")
_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def is_archive(path: Path) -> bool:
    """Whether the name is that of an archive we unpack."""
    return path.name.lower().endswith(_ZIP + _TAR)


def unpack(archive: Path, target: Path) -> None:
    """Unpack a zip, wheel or tar archive into the new directory `target`.

    Raises AssetError for a broken archive, an unsafe entry or too little space; OSError when writing fails.
    """
    target.mkdir()
    try:
        if archive.name.lower().endswith(_ZIP):
            _unpack_zip(archive, target)
        else:
            _unpack_tar(archive, target)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        # zipfile raises RuntimeError for an encrypted entry and NotImplementedError for an unknown compression
        raise AssetError(f"{archive.name}: the archive is broken or cannot be read ({error})") from error


def copy(source: Path, target: Path) -> None:
    """Copy a file into, or the files of a directory to, the new directory `target`. Linked files are copied whole.

    Raises AssetError for too little space, OSError when reading or writing fails.
    """
    if source.is_file():
        need_space(source.stat().st_size, target.parent, source.name)
        target.mkdir()
        shutil.copyfile(source, target / source.name)
        return
    need_space(sum(file.stat().st_size for file in source.rglob("*") if file.is_file()), target.parent, source.name)
    shutil.copytree(source, target)


def need_space(size: int, directory: Path, name: str) -> None:
    """Raise AssetError unless `size` bytes are free on the disk of `directory`."""
    free = shutil.disk_usage(directory).free
    if free < size:
        raise AssetError(
            f"{name}: needs {megabytes(size)} of disk, only {megabytes(free)} are free. "
            "Make room or set GRISTMILL_CACHE to a directory on another disk."
        )


def megabytes(size: int) -> str:
    """Bytes as text in MB (10^6 bytes)."""
    return f"{size / 1e6:,.1f} MB"


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def listing(directory: Path, *, follow: bool = False) -> dict[str, str]:
    """SHA-256 of every file below `directory` by its relative path, sorted.

    A link has "link" in place of a hash, or with `follow` the hash of the file it leads to. Raises AssetError for a
    link to a directory that would have to be followed: it could lead anywhere.
    """
    found = {}
    for file in directory.rglob("*"):
        if file.is_dir() and not file.is_symlink():
            continue
        if file.is_dir() and follow:
            raise AssetError(f"{file}: a link to a directory is not followed; put the files there")
        found[file.relative_to(directory).as_posix()] = "link" if file.is_symlink() and not follow else sha256_of(file)
    return dict(sorted(found.items()))


def tree_digest(files: dict[str, str]) -> str:
    """SHA-256 of a listing as `sha256sum` prints it, one line per file in the order of their paths."""
    lines = "".join(f"{digest}  {path}\n" for path, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _unpack_zip(archive: Path, target: Path) -> None:
    with zipfile.ZipFile(archive) as handle:
        entries = [entry for entry in handle.infolist() if not entry.is_dir()]
        for entry in entries:
            if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
                raise _unsafe(archive, entry.filename, "is not a plain file")
        _check_names(archive, [entry.filename for entry in entries])
        need_space(sum(entry.file_size for entry in entries), target, archive.name)
        for entry in entries:
            with handle.open(entry) as source:
                _write(source, target / entry.filename)


def _unpack_tar(archive: Path, target: Path) -> None:
    with tarfile.open(archive) as handle:
        entries = [entry for entry in handle.getmembers() if not entry.isdir()]
        for entry in entries:
            if not entry.isfile():
                raise _unsafe(archive, entry.name, "is not a plain file")
        _check_names(archive, [entry.name for entry in entries])
        need_space(sum(entry.size for entry in entries), target, archive.name)
        for entry in entries:
            source = handle.extractfile(entry)
            assert source is not None  # only for entries that are no file
            with source:
                _write(source, target / entry.name)


def _check_names(archive: Path, names: Iterable[str]) -> None:
    seen = set()
    for name in names:
        # the Windows flavour splits at both slashes and knows drives, so it is the stricter of the two
        path = PureWindowsPath(name)
        if path.anchor or ".." in path.parts or not path.parts:
            raise _unsafe(archive, name, "points outside of the archive")
        if path.parts in seen:
            raise _unsafe(archive, name, "is there twice")
        seen.add(path.parts)


def _unsafe(archive: Path, name: str, why: str) -> AssetError:
    return AssetError(f"{archive.name}: entry {name!r} {why}; nothing of it was unpacked")


def _write(source: IO[bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as handle:
        shutil.copyfileobj(source, handle, 1 << 20)

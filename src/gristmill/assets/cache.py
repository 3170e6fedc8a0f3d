"""Where fetched assets live, and how they get there and stay whole.

    CACHE/assets/NAME/.lock                   held while NAME is being fetched
    CACHE/assets/NAME/.*.tmp                  half-made, owned by who holds the lock, removed by the next who does
    CACHE/assets/NAME/VERSION/manifest.json   the asset and the SHA-256 of each of its files
    CACHE/assets/NAME/VERSION/files/          the files

A version's directory appears by one rename when it is complete, so whoever sees it may read it without the lock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gristmill.assets.catalogue import KNOWN, Asset, LocalPath
from gristmill.assets.fetch import Progress, digest_of, local, place
from gristmill.assets.unpack import listing, megabytes
from gristmill.errors import AssetError, GristmillError, MissingExtra, closest
from gristmill.files import atomic_directory, write_json

_SHOWN = 10


@dataclass(frozen=True)
class Verified:
    """What `verify` went through: how many files, and their bytes."""

    files: int
    size: int


def cache_root() -> Path:
    """Directory of everything that can be fetched again: GRISTMILL_CACHE, or ~/.cache/gristmill."""
    return Path(os.environ.get("GRISTMILL_CACHE") or "~/.cache/gristmill").expanduser()


def known() -> tuple[Asset, ...]:
    """The assets that need no description."""
    return KNOWN


def cached(*, cache: Path | None = None) -> tuple[Asset, ...]:
    """The assets in the cache, the user's own included, by name. `sha256` is the one found when it was fetched."""
    manifests = sorted(_root(cache).glob("*/*/manifest.json"))
    return tuple(_read(manifest)[0] for manifest in manifests)


def find(name: str, *, cache: Path | None = None) -> Asset:
    """The asset of that name: a known one, or one of the user's own that is in the cache.

    Raises AssetError with the closest names.
    """
    for asset in KNOWN:
        if asset.name == name:
            return asset
    own = cached(cache=cache)
    for asset in own:
        if asset.name == name:
            return asset
    names = list(dict.fromkeys(asset.name for asset in (*KNOWN, *own)))
    near = closest(name, names) or f" Known: {', '.join(names)}."
    raise AssetError(f"unknown asset {name!r}.{near} For one of your own add --from pip:, hub: or path:")


def get(
    name: str | Asset,
    *,
    cache: Path | None = None,
    source_path: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Path of the asset's main file or directory; it is fetched, checked and unpacked first when missing.

    `source_path` is a copy of the download to use in place of the network. `progress` None shows a bar on stderr when
    that is a terminal. Any number of processes may call this at once: one fetches, the others wait for it.

    Raises AssetError for an unknown name, no network, a wrong hash, an unsafe archive or a full disk; the cache is
    then as it was before. MissingExtra when a hub is asked without huggingface_hub.
    """
    asset = find(name, cache=cache) if isinstance(name, str) else name
    if asset not in KNOWN and asset.name in [other.name for other in KNOWN]:
        raise AssetError(f"{asset.name} is the name of a known asset. Choose another for {asset.source}")
    home = _root(cache) / asset.name
    ready = _ready(asset, home)
    if ready is not None:
        return ready
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _locked(home / ".lock"):
            ready = _ready(asset, home)  # another process may have fetched it while we waited
            if ready is not None:
                return ready
            for leftover in home.glob(".*.tmp"):  # of one who was killed: we hold the lock, so nobody uses it
                shutil.rmtree(leftover, ignore_errors=True)
            with _bar(asset) if progress is None else contextlib.nullcontext(progress) as report:
                _install(asset, home, source_path, report)
            return _main(asset, home)
    except (AssetError, MissingExtra):
        raise
    except (GristmillError, OSError) as error:
        raise _disk_error(asset, home, error) from error


def path(name: str, *, cache: Path | None = None) -> Path:
    """Path of the main file or directory of an asset in the cache. Raises AssetError when it is not there."""
    asset = find(name, cache=cache)
    ready = _ready(asset, _root(cache) / asset.name)
    if ready is None:
        raise _absent(name, cache)
    return ready


def verify(name: str, *, cache: Path | None = None) -> Verified:
    """Hash every file of a fetched asset again. Raises AssetError naming each changed, missing or extra file."""
    directory = _root(cache) / name / find(name, cache=cache).version
    if not (directory / "manifest.json").is_file():
        raise _absent(name, cache)
    _, expected = _read(directory / "manifest.json")
    found = listing(directory / "files")
    wrong = [f"changed: {file}" for file in expected if file in found and found[file] != expected[file]]
    wrong += [f"missing: {file}" for file in expected if file not in found]
    wrong += [f"extra: {file}" for file in found if file not in expected]
    if wrong:
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        raise AssetError(
            f"{name}: {directory / 'files'} is not as it was fetched:\n  "
            + "\n  ".join(wrong[:_SHOWN] + more)
            + f"\nDelete {directory} and run: gristmill assets get {name}"
        )
    return Verified(len(found), sum((directory / "files" / file).stat().st_size for file in found))


def _root(cache: Path | None) -> Path:
    return (cache or cache_root()) / "assets"


def _absent(name: str, cache: Path | None) -> AssetError:
    return AssetError(f"{name} is not in the cache {_root(cache)}. Run: gristmill assets get {name}")


def _main(asset: Asset, home: Path) -> Path:
    return home / asset.version / "files" / asset.main


def _ready(asset: Asset, home: Path) -> Path | None:
    """The main path when this very asset is in the cache; AssetError when another has its name or it is damaged."""
    others = [] if asset in KNOWN else sorted(home.glob("*/manifest.json"))
    manifest = home / asset.version / "manifest.json"
    if not manifest.is_file():
        if others:
            raise _taken(asset, others[0])
        return None
    recorded, _ = _read(manifest)
    same = (recorded.source, recorded.main, recorded.kind) == (asset.source, asset.main, asset.kind)
    if not same or asset.sha256 not in (None, recorded.sha256):
        raise _taken(asset, manifest)
    # asked for by its path, not by its name: an edited file must not be served from its old copy in silence
    if isinstance(asset.source, LocalPath) and asset.sha256 is None:
        digest = digest_of(asset, asset.source.path)
        if digest != recorded.sha256:
            raise AssetError(
                f"{asset.name}: {asset.source.path} has changed since it was copied (sha256 {recorded.sha256} then, "
                f"{digest} now). Delete {manifest.parent} to take it anew, or choose another name."
            )
    main = _main(asset, home)
    if not main.exists():
        raise AssetError(
            f"{asset.name}: {main} is missing. Delete {manifest.parent} and run: gristmill assets get {asset.name}"
        )
    return main


def _taken(asset: Asset, manifest: Path) -> AssetError:
    recorded, _ = _read(manifest)
    return AssetError(
        f"{asset.name}: the cache holds another asset of this name, {recorded.kind} {recorded.main} from "
        f"{recorded.source} with sha256 {recorded.sha256}. Choose another name or delete {manifest.parent}"
    )


def _install(asset: Asset, home: Path, source_path: Path | None, progress: Progress) -> None:
    fetched = asset if source_path is None else local(asset, source_path)
    with (
        tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=home, ignore_cleanup_errors=True) as work,
        atomic_directory(home / asset.version) as target,
    ):
        digest = place(fetched, target / "files", Path(work), progress)
        files = listing(target / "files")
        if not (target / "files" / asset.main).exists():
            raise AssetError(f"{asset.name}: {fetched.source} holds no {asset.main}.{closest(asset.main, files)}")
        recorded = replace(asset, sha256=digest)
        write_json(target / "manifest.json", {"asset": recorded.to_json(), "files": files})


def _read(manifest: Path) -> tuple[Asset, dict[str, str]]:
    try:
        value = json.loads(manifest.read_text(encoding="utf-8"))
        return Asset.from_json(value["asset"]), dict(value["files"])
    except (OSError, ValueError, KeyError, TypeError, AssetError) as error:
        raise AssetError(
            f"{manifest}: not a manifest of this version ({error!r}). Delete {manifest.parent} and fetch it again."
        ) from error


def _disk_error(asset: Asset, home: Path, error: Exception) -> AssetError:
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(next(folder for folder in (home, *home.parents) if folder.exists())).free
        return AssetError(
            f"{asset.name}: the disk of {home} is full ({megabytes(free)} free). Nothing half-written was kept. "
            "Make room or set GRISTMILL_CACHE to a directory on another disk."
        )
    return AssetError(f"{asset.name}: could not be put into {home} ({cause or error})")


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the lock file alone; the system frees it when the process ends, however it ends."""
    with file.open("ab") as handle:
        if sys.platform == "win32":
            import msvcrt

            while True:
                with contextlib.suppress(OSError):  # LK_LOCK gives up after ten seconds
                    handle.seek(0)
                    msvcrt.locking(handle.fileno(), msvcrt.LK_LOCK, 1)
                    break
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _bar(asset: Asset) -> Iterator[Progress]:
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Display

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Display(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task(asset.name, total=asset.size)
        yield lambda what, done, total: display.update(
            task, description=f"{asset.name}: {what}", completed=done, total=total
        )

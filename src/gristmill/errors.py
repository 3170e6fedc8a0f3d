"""Errors a user can act on. Each names what was wrong and where; the command line prints the message alone."""

import difflib
from collections.abc import Iterable


class GristmillError(Exception):
    """Base of every error that is the input's or the machine's fault, not a bug of ours."""


class AssetError(GristmillError):
    """A model or data set could not be found, fetched, verified or unpacked."""


class DataError(GristmillError):
    """A corpus, shard, conversation or configuration file is broken; the message names file and line."""


class CheckpointError(GristmillError):
    """A checkpoint is missing, incomplete or belongs to another model; the message names the tensor or key."""


class BrokenCheckpoint(CheckpointError):
    """A checkpoint's files are missing or damaged; an older checkpoint may still be whole."""


class RequestError(GristmillError):
    """A generation request cannot be served as asked. `field` is the name of the offending argument."""

    def __init__(self, message: str, *, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.code = code


class MissingExtra(GristmillError):
    """An optional dependency is not installed; the message is the install command."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f'{package} is not installed. Run: pip install "gristmill[{extra}]"')
        self.package, self.extra = package, extra

    def __reduce__(self) -> tuple[type["MissingExtra"], tuple[str, str]]:
        return MissingExtra, (self.package, self.extra)  # workers send their errors, and pickle would give the message


def closest(name: str, known: Iterable[str]) -> str:
    """' Did you mean a, b?' for the nearest known names, or '' when nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {', '.join(near)}?" if near else ""

"""API keys: a file of names and hashes, read again whenever it changes, so that revoking needs no restart.

A key is 256 random bits and is shown once, when it is made; the file holds its SHA-256. A slow hash protects passwords
because those can be guessed. 256 random bits cannot, so a fast hash gives nothing away and costs a request nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from gristmill.errors import DataError, GristmillError, closest
from gristmill.files import atomic_path

logger = logging.getLogger(__name__)

PREFIX = "gm-"
"""How keys begin, so that scanners for leaked secrets can know them."""

Limit = Annotated[int, Field(ge=1, le=10**12)]


class Key(BaseModel):
    """An entry of the file. A limit or date that is absent does not bind."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.@-]+$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    tokens_per_day: Limit | None = None
    models: tuple[str, ...] | None = None
    """Names that the key may use, each with its adapters; None for all."""
    expires: AwareDatetime | None = None
    admin: bool = False
    """Whether it may load and unload models."""

    @property
    def is_expired(self) -> bool:
        """Whether its time is over."""
        return self.expires is not None and self.expires <= datetime.now(UTC)

    def allows(self, model: str) -> bool:
        """Whether the key may use a model, or an adapter (`model:adapter`) of one that it may use."""
        return self.models is None or any(model == name or model.startswith(f"{name}:") for name in self.models)


class Keys(BaseModel):
    """The file as a whole."""

    model_config = ConfigDict(extra="forbid")

    keys: list[Key]

    @model_validator(mode="after")
    def _are_distinct(self) -> Keys:
        for field in ("name", "sha256"):
            values = [getattr(key, field) for key in self.keys]
            if twice := next((value for value in values if values.count(value) > 1), None):
                raise ValueError(f"two keys have the {field} {twice!r}")
        return self


def read_keys(path: Path) -> list[Key]:
    """The keys of a file. Raises DataError when it cannot be read, is not a valid one, or others may write it."""
    try:
        if path.stat().st_mode & 0o022:
            raise DataError(f"{path}: others may write it, and so make keys of their own. Run: chmod 600 {path}")
        return Keys.model_validate_json(path.read_bytes()).keys
    except OSError as error:
        raise DataError(f"{path}: the keys cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(f"{path}: {where}: {first['msg']}") from error


def write_keys(path: Path, keys: list[Key]) -> None:
    """Write the file atomically, readable by its owner alone. Raises GristmillError when that is impossible."""
    text = json.dumps({"keys": [key.model_dump(mode="json", exclude_defaults=True) for key in keys]}, indent=2) + "\n"
    with atomic_path(path) as temporary, os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o600), "w") as handle:
        handle.write(text)


def create_key(path: Path, name: str, **limits: object) -> str:
    """Add a key to the file, which is made when it is missing, and return its secret, which is kept nowhere.

    limits: the other fields of `Key`. Raises GristmillError for a name that is taken and for values out of range.
    """
    keys = read_keys(path) if path.exists() else []
    if name in (key.name for key in keys):
        raise GristmillError(f"{path}: there is a key {name!r} already. Revoke it first, or take another name.")
    secret = PREFIX + secrets.token_urlsafe(32)
    try:
        key = Key.model_validate({"name": name, "sha256": hashed(secret), **limits})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise GristmillError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    write_keys(path, [*keys, key])
    return secret


def revoke_key(path: Path, name: str) -> None:
    """Take a key out of the file. Raises GristmillError when it is not there."""
    keys = read_keys(path)
    left = [key for key in keys if key.name != name]
    if len(left) == len(keys):
        raise GristmillError(f"{path}: there is no key {name!r}.{closest(name, [key.name for key in keys])}")
    write_keys(path, left)


def hashed(secret: str) -> str:
    """SHA-256 of a key, in hexadecimal."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


class KeyFile:
    """The keys of a file as it is now. Raises DataError at first when the file is no good."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._version = self._stat()  # before it is read: what is written in between is seen later
        self._keys: list[Key] | None = read_keys(path)

    def find(self, secret: str) -> Key | None:
        """The key with this secret, or None when there is none or it has expired.

        Raises DataError while the file is missing or broken: to go on with the old keys could let in one that was
        revoked.
        """
        digest, found = hashed(secret), None
        for key in self._current():  # all of them, so that the time does not tell which one was near
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return None if found is None or found.is_expired else found

    def named(self, name: str) -> Key | None:
        """The key of this name, or None when it is gone or has expired. Raises what `find` raises."""
        return next((key for key in self._current() if key.name == name and not key.is_expired), None)

    def _current(self) -> list[Key]:
        version = self._stat()
        if version != self._version:
            self._version = version
            try:
                self._keys = read_keys(self.path)
                logger.info("%s: %d keys read", self.path, len(self._keys))
            except DataError as error:
                self._keys = None
                logger.error("%s; nobody is let in until it is mended", error)
        if self._keys is None:
            raise DataError(f"{self.path}: the keys cannot be read")
        return self._keys

    def _stat(self) -> tuple[int, ...] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode

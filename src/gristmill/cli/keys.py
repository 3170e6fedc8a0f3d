"""gristmill keys create|list|revoke [NAME]: the API keys of a server."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from gristmill.errors import GristmillError, MissingExtra

LIMITS = ("requests_per_minute", "tokens_per_minute", "tokens_per_day", "models", "days", "admin")


@dataclass(frozen=True)
class Config:
    """gristmill keys create|list|revoke [NAME]: the API keys of a server. It reads the file again when it changes."""

    action: Literal["create", "list", "revoke"]
    """create one (it is printed, and kept nowhere); list them; take one back, at once."""
    name: str = field(default="", metadata={"positional": True})
    """Name of the key, which the server's log tells; also taken as the word behind the action."""
    file: Path = Path("keys.json")
    """The file that `gristmill serve --keys` reads. It holds names, limits and hashes, and no keys."""
    requests_per_minute: int | None = None
    """create: requests that the key may send in a minute."""
    tokens_per_minute: int | None = None
    """create: tokens, of prompts and answers, that it may use in a minute."""
    tokens_per_day: int | None = None
    """create: the same for a day."""
    models: list[str] | None = None
    """create: names of the models that it may use; all of them when not given."""
    days: int | None = None
    """create: how long it is valid; for ever when not given."""
    admin: bool = False
    """create: let it load and unload models too."""


def run(config: Config) -> int:
    """Do what was asked. Raises GristmillError for what does not go together, and what the file's functions raise."""
    try:
        from gristmill.serve.access.keys import create_key, read_keys, revoke_key
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name), "serve") from error

    if config.action != "create" and (given := [name for name in LIMITS if getattr(config, name)]):
        raise GristmillError(f"--{given[0]} belongs to: gristmill keys create, not {config.action}")
    if bool(config.name) == (config.action == "list"):
        raise GristmillError("list takes no name" if config.name else f"{config.action} needs the name of a key")
    if config.action == "create":
        limits = {name: getattr(config, name) for name in LIMITS if name != "days"}
        if config.days is not None:
            if not 0 < config.days < 36_525:
                raise GristmillError(f"--days must be from 1 to 36524, got {config.days}")
            limits["expires"] = datetime.now(UTC) + timedelta(days=config.days)
        print(create_key(config.file, config.name, **limits))
    elif config.action == "revoke":
        revoke_key(config.file, config.name)
    else:
        for key in read_keys(config.file):
            facts = key.model_dump(mode="json", exclude={"name", "sha256"}, exclude_defaults=True)
            print(key.name, *(f"{name}={value}" for name, value in facts.items()), sep="  ")
    return 0

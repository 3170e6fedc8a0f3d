"""What a run was started with, kept beside it: a command with other settings is told which of them differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gristmill.errors import CheckpointError
from gristmill.files import write_json
from gristmill.pretrain.config import PretrainConfig
from gristmill.train.checkpoint import checkpoints

_NAME = "settings.json"
_FREE = {
    *("directory", "data", "text_field", "on_error", "tokenizer"),  # what these bring is compared, not their names
    *("device", "workers", "parallel", "watch"),
    *("train.validate_every", "train.checkpoint_every", "train.keep_checkpoints", "train.keep_every"),
    "train.background_checkpoints",
}
"""Settings that a run may change when it goes on: the weights in the end do not hang on them."""


def decisive(config: PretrainConfig) -> dict[str, Any]:
    """The settings, by dotted name, that decide the weights in the end."""
    return dict(_flat(_plain(config)))


def has_begun(config: PretrainConfig) -> bool:
    """Whether there is work that other settings or data would lose."""
    return bool(checkpoints(config.directory / "checkpoints"))


def check(config: PretrainConfig) -> None:
    """Raise CheckpointError naming the settings that differ from those of the run that lives in the directory; until
    it has a checkpoint, they may change."""
    path = config.directory / _NAME
    if has_begun(config) and path.exists():
        there, here = dict(_flat(_read(path))), decisive(config)
        changes = [
            f"{name}: {there.get(name)!r} there, {here.get(name)!r} now"
            for name in sorted({*there, *here})
            if there.get(name) != here.get(name)
        ]
        if changes:
            raise CheckpointError(
                f"{config.directory} holds a run with other settings ({', '.join(changes)}). Use another directory, or "
                "delete this one to start anew."
            )


def record(config: PretrainConfig) -> None:
    """Write the settings beside the run, as `--config` reads them too."""
    write_json(config.directory / _NAME, _plain(config))


def _plain(config: PretrainConfig) -> dict[str, Any]:
    """As JSON has it: lists for tuples, text for paths."""
    return dict(json.loads(json.dumps(asdict(config), default=str)))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        name = prefix + key
        if name in _FREE:
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a JSON object of settings ({error})") from error

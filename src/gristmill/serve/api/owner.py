"""Whose files, batches and responses a request may see."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request


async def _owner(request: Request) -> str:
    """The name of the caller's key; without keys all callers are one."""
    key = getattr(getattr(request.state, "caller", None), "key", None)
    return key.name if key is not None else ""


Owner = Annotated[str, Depends(_owner)]

"""Server-sent events of JSON, with an end that a client can tell from a broken connection."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

from pydantic import BaseModel

from gristmill.serve.errors import ApiError, internal_error

logger = logging.getLogger(__name__)


def event(body: BaseModel) -> str:
    """One event. Fields left unset are left out."""
    return f"data: {body.model_dump_json(exclude_unset=True)}\n\n"


async def events_of(chunks: AsyncIterator[str], request_id: str) -> AsyncIterator[str]:
    """The chunks, then [DONE]. An error on the way is the last event, and no [DONE] follows it."""
    try:
        async for chunk in chunks:
            yield chunk
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield event(error.body())
    except Exception:
        logger.exception("stream %s failed", request_id)
        yield event(internal_error().body())

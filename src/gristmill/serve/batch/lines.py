"""The lines of a batch's input file: read, and checked before the first is asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from gristmill.errors import DataError
from gristmill.serve.wire.base import Closed, NonEmpty, Text
from gristmill.serve.wire.files import LineError

MAX_LINES = 50_000
MAX_LINE_BYTES = 16 * 2**20
MAX_ERRORS = 100


class BatchLine(Closed):
    """One request of a batch. `custom_id` tells its answer from the others."""

    custom_id: Annotated[NonEmpty, Field(max_length=512)]
    method: Literal["POST"]
    url: Text
    body: dict[str, Any]


class BadLine(DataError):
    """A line that cannot be asked, with what OpenAI's line errors have."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


def read_lines(path: Path, endpoint: str) -> Iterator[tuple[int, BatchLine]]:
    """Numbers, from 1, and requests of the lines that are not blank. Raises BadLine."""
    with path.open("rb") as handle:
        for number, text in enumerate(handle, start=1):
            if text.strip():
                yield number, _parsed(text, endpoint)


def check_lines(path: Path, endpoint: str) -> tuple[int, list[LineError]]:
    """How many requests there are, and what is wrong with them; of many errors the first ones, and how many more."""
    taken: dict[str, int] = {}
    errors: list[LineError] = []
    count = wrong = 0
    with path.open("rb") as handle:
        for number, text in enumerate(handle, start=1):
            if not text.strip():
                continue
            count += 1
            try:
                name = _parsed(text, endpoint).custom_id
                if (first := taken.setdefault(name, number)) != number:
                    raise BadLine("duplicate_custom_id", f"custom_id {name!r} is that of line {first} too", "custom_id")
            except BadLine as error:
                wrong += 1
                if wrong <= MAX_ERRORS:
                    errors.append(LineError(code=error.code, line=number, message=str(error), param=error.param))
    if wrong > MAX_ERRORS:
        errors.append(_of_the_file("more_errors", f"{wrong - MAX_ERRORS} more lines are wrong"))
    if count == 0:
        errors.append(_of_the_file("empty_file", "the file has no line"))
    if count > MAX_LINES:
        errors.append(_of_the_file("too_many_lines", f"the file has {count} requests; a batch takes {MAX_LINES}"))
    return count, errors


def _of_the_file(code: str, message: str) -> LineError:
    return LineError(code=code, line=None, message=message, param=None)


def _parsed(text: bytes, endpoint: str) -> BatchLine:
    if len(text) > MAX_LINE_BYTES:
        raise BadLine("line_too_long", f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        line = BatchLine.model_validate(json.loads(text, object_pairs_hook=_without_repetition))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = ".".join(map(str, first["loc"])) or first.get("ctx", {}).get("field")
        raise BadLine("invalid_request", f"{param or 'the line'}: {first['msg']}", param) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested without end
        raise BadLine("invalid_json_line", f"the line is not JSON that can be read ({error})") from None
    if line.url != endpoint:
        raise BadLine("invalid_url", f"url is {line.url[:200]!r}, the batch is for {endpoint!r}", "url")
    if line.body.get("stream"):
        raise BadLine("invalid_value", "body.stream: an answer in a file is not streamed", "body.stream")
    return line


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of two fields of one name a parser would drop the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise BadLine("invalid_json_line", "the line has an object with two fields of one name")
    return found

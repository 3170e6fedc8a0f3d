"""Every failure leaves the server in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException

from gristmill.errors import DataError, MissingExtra, RequestError
from gristmill.serve.wire.base import UNSUPPORTED
from gristmill.serve.wire.models import ErrorBody, ErrorDetail


class ApiError(HTTPException):
    """An answer with an error status. `param` names the field at fault, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}) or None)
        self.param = param
        self.code = code

    def body(self) -> ErrorBody:
        """What the client gets. Half surrogate pairs, which JSON can carry in and UTF-8 not out, become '?'."""
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        message, param = _sendable(self.detail), None if self.param is None else _sendable(self.param)
        return ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=self.code))

    def response(self) -> Response:
        """The answer as a whole."""
        return Response(self.body().model_dump_json(), self.status_code, self.headers, "application/json")


def internal_error() -> ApiError:
    """What a client learns of a bug of ours: that it happened. The log has the rest, under the request id."""
    return ApiError(500, "internal error; the server's log has it under this answer's x-request-id")


def closing() -> ApiError:
    """The answer to whoever comes while the server, or a model of it, ends."""
    return ApiError(503, "the server is closing", code="server_closing")


def refusal(error: RequestError | DataError, fields: Mapping[str, str]) -> ApiError:
    """400 for a request that the engine or the chat template refuses. `fields` are the names that the request has for
    those of the error: of the engine's parameters, and "conversation" for what a chat template refuses."""
    if isinstance(error, DataError):
        return ApiError(400, str(error), param=fields.get("conversation", "messages"), code="invalid_messages")
    name, dot, rest = (error.field or "").partition(".")
    param = None if error.field is None else fields.get(name, f"{name}{dot}{rest}")
    return ApiError(400, str(error), param=param, code=error.code or "invalid_value")


def install(app: FastAPI) -> None:
    """Answer FastAPI's and Starlette's own errors in our shape too."""

    async def on_validation(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _from_validation(error.errors(), error.body).response()

    async def on_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return (error if isinstance(error, ApiError) else _from_http(error)).response()

    async def on_missing(_: Request, error: Exception) -> Response:
        # a client cannot mend it, and need not try again
        return ApiError(501, str(error), code="package_missing", headers={"x-should-retry": "false"}).response()

    app.add_exception_handler(MissingExtra, on_missing)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)


def _from_http(error: HTTPException) -> ApiError:
    codes = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed"}
    answer = ApiError(error.status_code, str(error.detail), code=codes.get(error.status_code))
    answer.headers = error.headers
    return answer


def _from_validation(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """The first thing that is wrong; unknown fields first, as they often explain the rest."""
    first = min(errors, key=lambda error: error["type"] != UNSUPPORTED)
    kind, location = first["type"], tuple(first["loc"])[1:]
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']} at {location[0]}", code="invalid_json")
    if first["loc"][0] != "body" or isinstance(body, FormData):  # of the query, or of an upload's form
        name = str(location[0])[:200]
        return ApiError(400, f"{name}: {first['msg']}", param=name, code="invalid_value")
    if not isinstance(body, dict):
        return ApiError(400, "the body must be a JSON object, sent as application/json", code="invalid_json")
    path = _path_in(body, location, missing=kind == "missing")
    param: str | None
    if kind == UNSUPPORTED:
        param = _spelled([*path, first["ctx"]["field"]])
        reason = str(first["ctx"]["reason"])
        separator = " is an " if reason.startswith("unknown") else " is not supported: "
        return ApiError(400, f"{param}{separator}{reason}", param=param, code="unsupported_parameter")
    if kind.startswith("union_tag") and "discriminator" in first["ctx"]:
        path.append(str(first["ctx"]["discriminator"]).strip("'"))
    param = _spelled(path) or None
    if kind == "missing":
        return ApiError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    what = str(first["msg"]).removeprefix("Value error, ")
    if kind == "string_type" and location[-1] == "string":  # the first branch of "text or list"
        what = "Input should be a string or a list"
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return ApiError(400, f"{param or 'the body'}: {what[:1].lower()}{what[1:]}", param=param, code=code)


def _path_in(body: Any, location: Iterable[str | int], *, missing: bool) -> list[str | int]:
    """Pydantic's location without the names of union branches: the steps that one can go in the body itself."""
    path: list[str | int] = []
    value, steps = body, list(location)
    for step in steps:
        if _leads_on(value, step):
            value = value[step]
            path.append(step)
    return [*path, steps[-1]] if missing else path


def _leads_on(value: Any, step: str | int) -> bool:
    if isinstance(value, list):
        return isinstance(step, int) and step < len(value)
    return isinstance(value, dict) and step in value


def _spelled(path: Sequence[str | int]) -> str:
    """messages[0].content"""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")[:200]


def _sendable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")

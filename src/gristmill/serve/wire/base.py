"""What all request bodies share: they are strict and closed, and say why they refuse a field.

Strict: no "0.5" for 0.5, no true for 1. Closed: a name that a model does not have is an error. A known field that is
not served stands in the model's REFUSED with the reason, and may be null, which means absent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    JsonValue,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic_core import CoreSchema, PydanticCustomError

from gristmill.errors import closest

INT32 = 2**31 - 1
INT64 = 2**63 - 1

LABEL: JsonDict = {"x-effect": "none"}
"""Marks a field that is accepted and has no effect on the answer."""

MOST_FAULTS = 100
"""Of one object that are told one by one."""

UNSUPPORTED = "unsupported_field"
"""The type of the validation error for a field that is refused or unknown; its context has `field` and `reason`."""


def _stop_at_first_fault(schema: Any) -> None:
    for part in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(part, (dict, list, tuple)):
            _stop_at_first_fault(part)
    if isinstance(schema, dict) and schema.get("type") == "list":
        schema["fail_fast"] = True


class Closed(BaseModel):
    """A body, or a part of one, whose every field is applied, a label without effect, or refused by name."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    REFUSED: ClassVar[Mapping[str, str]] = {}
    """Fields of the interface that are answered with 400, and why."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """With lists that stop at their first wrong item: a body can hold a million, and each would be told of."""
        schema = handler(source)
        _stop_at_first_fault(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for key, value in values.items():
            name = str(key).encode("utf-8", "replace").decode("utf-8")[:200]  # it goes into the answer
            if name in cls.REFUSED and value is not None:
                raise PydanticCustomError(UNSUPPORTED, "{reason}", {"field": name, "reason": cls.REFUSED[name]})
            if name not in known and name not in cls.REFUSED:
                reason = f"unknown field.{closest(name, known)}"
                raise PydanticCustomError(UNSUPPORTED, "{reason}", {"field": name, "reason": reason})
        return {key: value for key, value in values.items() if key not in cls.REFUSED}


def _few_faults(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError as error:
        if error.error_count() <= MOST_FAULTS:
            raise
        raise ValueError(f"{error.error_count()} of its names and values are wrong") from None


FewFaults = WrapValidator(_few_faults)
"""For an object of any names, what `Closed` does for lists: to tell of each fault could take the server seconds."""


def _is_unicode(value: str) -> str:
    """JSON can spell half of a surrogate pair ("\\ud800"), which no tokenizer can read."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is not text") from None
    return value


def _holds_unicode(value: Any) -> Any:
    """The same for all names and texts of a JSON value, which go into prompts and answers."""
    _is_unicode(json.dumps(value, ensure_ascii=False))
    return value


JsonObject = Annotated[dict[str, JsonValue], FewFaults, AfterValidator(_holds_unicode)]


def branch_of(value: Any) -> str:
    """Tells the branches of "a string or a list" apart, so that errors speak of the one that was meant."""
    return "list" if isinstance(value, list) else "string"


Text = Annotated[str, AfterValidator(_is_unicode)]
NonEmpty = Annotated[str, Field(min_length=1), AfterValidator(_is_unicode)]
Label = Annotated[str, Field(max_length=512), AfterValidator(_is_unicode)]
TokenId = Annotated[int, Field(ge=0, le=INT32)]
Metadata = Annotated[dict[Annotated[Label, Field(max_length=64)], Label], Field(max_length=16), FewFaults]
"""A client's own labels, as many and as long as OpenAI's."""

"""Files and batches: what is asked of them and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from gristmill.serve.wire.base import LABEL, Closed, Label, Metadata

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
Purpose = Literal["batch"]
Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]  # fmt: skip

SECONDS = {"h": 3600, "d": 86400}


class FileQuery(BaseModel):
    """Which files to list."""

    model_config = ConfigDict(extra="forbid")

    after: str | None = Field(None, description="The id of the last file of the page before.")
    limit: int = Field(10_000, ge=1, le=10_000, description="Most files on a page.")
    order: Literal["asc", "desc"] = Field("desc", description="Oldest first or newest first.")
    purpose: str | None = Field(None, description="Only files of this purpose.")


class BatchQuery(BaseModel):
    """Which batches to list, newest first."""

    model_config = ConfigDict(extra="forbid")

    after: str | None = Field(None, description="The id of the last batch of the page before.")
    limit: int = Field(20, ge=1, le=100, description="Most batches on a page.")


class FileObject(BaseModel):
    """A stored file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    """A page of files. The last id is where the next page begins."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    """A file is no more."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def _is_window(value: str) -> str:
    if not (value[:-1].isascii() and value[:-1].isdigit() and value[-1:] in SECONDS and 0 < int(value[:-1][:4]) < 1000):
        raise ValueError('must be a number of hours or days below 1000, as "24h" or "7d"')
    return value


class BatchRequest(Closed):
    """A request to answer a file of requests."""

    REFUSED: ClassVar[Mapping[str, str]] = {"output_expires_after": "files are kept until they are deleted"}

    input_file_id: Label = Field(description="A file of purpose batch: one request on each line.")
    endpoint: Endpoint = Field(description="The route that every line is for.")
    completion_window: Annotated[Label, AfterValidator(_is_window)] = Field(
        description='The time in which to answer, as "24h" or "7d". What is not answered by then is left out.'
    )
    metadata: Metadata | None = Field(None, description="Your labels.", json_schema_extra=LABEL)

    @property
    def seconds(self) -> int:
        """The completion window."""
        return int(self.completion_window[:-1]) * SECONDS[self.completion_window[-1]]


class LineError(BaseModel):
    """What is wrong with a line of the input file. Lines count from 1."""

    code: str
    line: int | None
    message: str
    param: str | None


class LineErrors(BaseModel):
    """Why a batch could not begin."""

    object: Literal["list"] = "list"
    data: list[LineError]


class RequestCounts(BaseModel):
    """Lines, those answered, and those answered with an error."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(BaseModel):
    """A file of requests and how far they are. Times are Unix seconds."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: Endpoint
    errors: LineErrors | None = None
    input_file_id: str
    completion_window: str
    status: Status = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = Field(default_factory=RequestCounts)
    metadata: dict[str, str] | None = None


class BatchList(BaseModel):
    """A page of batches. The last id is where the next page begins."""

    object: Literal["list"] = "list"
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool

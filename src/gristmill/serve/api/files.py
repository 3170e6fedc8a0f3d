"""Files and batches: /v1/files and /v1/batches."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, File, Form, Query, Request, UploadFile
from fastapi.responses import FileResponse

from gristmill.errors import GristmillError
from gristmill.serve.api.common import ERRORS, json_only
from gristmill.serve.api.owner import Owner
from gristmill.serve.batch.batches import CONCURRENCY, Batches, Reply, call
from gristmill.serve.batch.storage import Storage
from gristmill.serve.errors import ApiError
from gristmill.serve.wire.files import (
    Batch,
    BatchList,
    BatchQuery,
    BatchRequest,
    FileDeleted,
    FileList,
    FileObject,
    FileQuery,
)

UPLOAD_FIELDS = frozenset({"file", "purpose"})

router = APIRouter(responses=ERRORS)


@asynccontextmanager
async def files_and_batches(
    app: FastAPI, directory: Path | None, *, concurrency: int = CONCURRENCY
) -> AsyncIterator[None]:
    """What the routes here need, for as long as the app runs; without a directory it is gone afterwards.

    Unfinished batches of the directory go on. Raises GristmillError when the directory cannot be used.
    """

    async def ask(owner: str, endpoint: str, body: bytes) -> Reply:
        return await call(app, endpoint, body, {"owner": owner})

    with tempfile.TemporaryDirectory(prefix="gristmill-") as temporary:
        storage = Storage(directory or Path(temporary))
        try:
            async with Batches(storage, ask, concurrency=concurrency) as batches:
                app.state.storage, app.state.batches = storage, batches
                yield
        finally:
            storage.close()


async def _storage(request: Request) -> Storage:
    storage: Storage = request.app.state.storage
    return storage


async def _batches(request: Request) -> Batches:
    batches: Batches = request.app.state.batches
    return batches


StorageOf = Annotated[Storage, Depends(_storage)]
BatchesOf = Annotated[Batches, Depends(_batches)]


@router.post("/v1/files")
async def upload(
    request: Request,
    storage: StorageOf,
    owner: Owner,
    file: Annotated[UploadFile, File(description="JSONL: one request on each line.")],
    purpose: Annotated[str, Form(description='"batch" is the only purpose.', pattern="^batch$")],
) -> FileObject:
    """Keep a file. Its contents are looked at when a batch uses it."""
    if not owner and request.headers.get("sec-fetch-site") == "cross-site":  # a browser sends forms without asking
        raise ApiError(403, "without API keys, pages from elsewhere may not upload", code="cross_site")
    if unknown := sorted((await request.form()).keys() - UPLOAD_FIELDS):
        message = f"{unknown[0][:200]} is not supported: a file has file and purpose, and stays until it is deleted"
        raise ApiError(400, message, param=unknown[0][:200], code="unsupported_parameter")
    # a form may say in which encoding its names are, and some of those can spell what UTF-8 cannot
    filename = (file.filename or "upload")[:255].encode("utf-8", "replace").decode()
    pieces = iter(partial(file.file.read, 2**20), b"")
    try:
        stored = await asyncio.to_thread(storage.write, filename, "batch", pieces)
    except GristmillError as error:
        raise ApiError(507, "the server has no room for the file", code="storage_full") from error
    storage.add(stored, owner)
    return stored


@router.get("/v1/files")
async def list_files(storage: StorageOf, owner: Owner, query: Annotated[FileQuery, Query()]) -> FileList:
    """The caller's files."""
    files, more = storage.files(owner, query)
    ids: list[str | None] = [file.id for file in files] or [None]
    return FileList(data=files, first_id=ids[0], last_id=ids[-1], has_more=more)


@router.get("/v1/files/{file_id}")
async def get_file(file_id: str, storage: StorageOf, owner: Owner) -> FileObject:
    """One file's name, size and purpose."""
    return storage.file(file_id, owner)


@router.get(
    "/v1/files/{file_id}/content",
    response_class=FileResponse,
    responses={200: {"description": "The contents.", "content": {"application/octet-stream": {}}}},
)
async def get_content(file_id: str, storage: StorageOf, owner: Owner) -> FileResponse:
    """One file's contents, as they were sent or as a batch wrote them."""
    file = storage.file(file_id, owner)
    return FileResponse(storage.contents(file.id), media_type="application/octet-stream", filename=file.filename)


@router.delete("/v1/files/{file_id}")
async def delete_file(file_id: str, storage: StorageOf, batches: BatchesOf, owner: Owner) -> FileDeleted:
    """Forget a file, unless a batch still reads it."""
    file = storage.file(file_id, owner)
    if batches.uses(file):
        raise ApiError(400, f"a batch that has not ended reads {file.id}", param="file_id", code="file_in_use")
    storage.delete(file)
    return FileDeleted(id=file.id)


@router.post("/v1/batches", dependencies=[Depends(json_only)])
async def create_batch(body: BatchRequest, batches: BatchesOf, owner: Owner) -> Batch:
    """Answer a file of requests in the background."""
    return batches.create(body, owner)


@router.get("/v1/batches")
async def list_batches(batches: BatchesOf, owner: Owner, query: Annotated[BatchQuery, Query()]) -> BatchList:
    """The caller's batches, newest first."""
    page, more = batches.page(owner, query)
    ids: list[str | None] = [batch.id for batch in page] or [None]
    return BatchList(data=page, first_id=ids[0], last_id=ids[-1], has_more=more)


@router.get("/v1/batches/{batch_id}")
async def get_batch(batch_id: str, batches: BatchesOf, owner: Owner) -> Batch:
    """How far a batch is."""
    return batches.get(batch_id, owner)


@router.post("/v1/batches/{batch_id}/cancel")
async def cancel_batch(batch_id: str, batches: BatchesOf, owner: Owner) -> Batch:
    """Stop a batch. What was answered until then is in its files."""
    return batches.cancel(batch_id, owner)

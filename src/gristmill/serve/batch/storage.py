"""What the server keeps between requests: files, batches and their finished lines, in one folder.

The contents of files lie in `files/`, under ids of ours and never under a client's names; all else is in one SQLite
database. A file exists once its row is written, which is after its contents are whole, so that a killed server leaves
nothing half done.
"""

from __future__ import annotations

import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Literal, TypeVar

from gristmill.files import atomic_path, exclusive
from gristmill.serve.errors import ApiError
from gristmill.serve.wire.files import Batch, BatchQuery, FileObject, FileQuery

Thing = TypeVar("Thing", FileObject, Batch)

SCHEMA = """
pragma journal_mode = wal;
pragma synchronous = normal;
create table if not exists object (
  place integer primary key autoincrement, id text unique, kind text, owner text, body text
);
create index if not exists by_owner on object (kind, owner, place);
create table if not exists line (batch text, number integer, fine integer, entry blob, primary key (batch, number));
"""


class Storage:
    """Files and batches, each with the name of its owner ("" where nobody needs a key). Others do not see them.

    For one thread at a time, but where said otherwise. Raises GristmillError when another process has the folder or
    it cannot be written; the methods raise ApiError 404 for an id that the owner does not have.
    """

    def __init__(self, directory: Path) -> None:
        self._contents = directory / "files"
        self._path = directory / "server.sqlite3"
        with ExitStack() as stack:
            stack.enter_context(exclusive(directory))
            directory.chmod(0o700)  # prompts and answers
            self._contents.mkdir(exist_ok=True)
            self._database = stack.enter_context(closing(sqlite3.connect(self._path, check_same_thread=False)))
            self._database.executescript(SCHEMA)
            known = {row[0] for row in self._database.execute("select id from object where kind = 'file'")}
            for path in self._contents.iterdir():
                if path.name not in known:  # killed before the row was written, or before the contents were deleted
                    path.unlink()
            self._open = stack.pop_all()

    def close(self) -> None:
        """Let go of the folder."""
        self._open.close()

    def contents(self, name: str) -> Path:
        """Where the contents of a file lie. `name` is the id of one that exists."""
        return self._contents / name

    def write(self, filename: str, purpose: Literal["batch", "batch_output"], pieces: Iterable[bytes]) -> FileObject:
        """Put contents on disk; `add` makes them a file. Any thread may call this."""
        name = f"file-{uuid.uuid4().hex}"
        with atomic_path(self._contents / name) as temporary, temporary.open("xb") as handle:
            handle.writelines(pieces)
        size = (self._contents / name).stat().st_size
        return FileObject(id=name, bytes=size, created_at=int(time.time()), filename=filename, purpose=purpose)

    def add(self, thing: FileObject | Batch, owner: str) -> None:
        """A new file or batch of this owner."""
        with self._database:
            self._insert(thing, owner)

    def file(self, name: str, owner: str) -> FileObject:
        """A file of this owner."""
        return FileObject.model_validate_json(self._body("file", name, owner))

    def batch(self, name: str, owner: str) -> Batch:
        """A batch of this owner, as it was last saved."""
        return Batch.model_validate_json(self._body("batch", name, owner))

    def files(self, owner: str, query: FileQuery) -> tuple[list[FileObject], bool]:
        """A page of the owner's files, and whether there are more."""
        where = "" if query.purpose is None else "and json_extract(body, '$.purpose') = :purpose"
        rows = self._page("file", owner, query.after, query.limit, query.order, where, purpose=query.purpose)
        return [FileObject.model_validate_json(row) for row in rows[: query.limit]], len(rows) > query.limit

    def batches(self, owner: str, query: BatchQuery) -> tuple[list[Batch], bool]:
        """A page of the owner's batches, newest first, and whether there are more."""
        rows = self._page("batch", owner, query.after, query.limit, "desc", "")
        return [Batch.model_validate_json(row) for row in rows[: query.limit]], len(rows) > query.limit

    def delete(self, file: FileObject) -> None:
        """A file is no more. Whoever is reading it may finish."""
        with self._database:
            self._database.execute("delete from object where id = ?", (file.id,))
        self.contents(file.id).unlink(missing_ok=True)

    def save(self, batch: Batch) -> None:
        """Keep the state of a batch."""
        with self._database:
            self._update(batch)

    def unfinished(self) -> list[tuple[Batch, str]]:
        """Batches that a run is to go on with, oldest first, and their owners."""
        ended = "('completed', 'failed', 'expired', 'cancelled')"
        rows = self._database.execute(
            "select body, owner from object where kind = 'batch' "
            f"and json_extract(body, '$.status') not in {ended} order by place"
        )
        return [(Batch.model_validate_json(body), owner) for body, owner in rows]

    def add_line(self, batch: Batch, number: int, fine: bool, entry: bytes) -> None:
        """The answer to a line of a batch: it is not asked again."""
        with self._database:
            self._database.execute("insert into line values (?, ?, ?, ?)", (batch.id, number, fine, entry))

    def answered(self, batch: Batch) -> dict[int, bool]:
        """Numbers of the answered lines, and whether the answer was without error."""
        rows = self._database.execute("select number, fine from line where batch = ?", (batch.id,))
        return {number: bool(fine) for number, fine in rows}

    def entries(self, batch: Batch, fine: bool) -> Iterator[bytes]:
        """The answers without error, or those with one, in the order of the input. Any thread may call this."""
        query = "select entry from line where batch = ? and fine = ? order by number"
        with closing(sqlite3.connect(self._path)) as database:
            for (entry,) in database.execute(query, (batch.id, fine)):
                yield entry

    def finish(self, batch: Batch, owner: str, outputs: Iterable[FileObject]) -> None:
        """All at once: the batch has ended, its outputs are files, its lines are in those alone."""
        with self._database:
            for file in outputs:
                self._insert(file, owner)
            self._update(batch)
            self._database.execute("delete from line where batch = ?", (batch.id,))

    def _insert(self, thing: FileObject | Batch, owner: str) -> None:
        row = (thing.id, thing.object, owner, thing.model_dump_json())
        self._database.execute("insert into object (id, kind, owner, body) values (?, ?, ?, ?)", row)

    def _update(self, batch: Batch) -> None:
        self._database.execute("update object set body = ? where id = ?", (batch.model_dump_json(), batch.id))

    def _body(self, kind: str, name: str, owner: str, column: str = "body") -> str:
        query = f"select {column} from object where kind = ? and id = ? and owner = ?"
        row = self._database.execute(query, (kind, name.encode("utf-8", "replace").decode(), owner)).fetchone()
        if row is None:
            raise ApiError(404, f"there is no {kind} {name[:100]!r}", code=f"{kind}_not_found")
        body: str = row[0]
        return body

    def _page(
        self, kind: str, owner: str, after: str | None, limit: int, order: str, where: str, **values: str | None
    ) -> list[str]:
        """The bodies of a page and one more, if there is one."""
        if after is not None:
            where += f" and place {'<' if order == 'desc' else '>'} :after"
        place = None if after is None else self._body(kind, after, owner, "place")
        query = f"select body from object where kind = :kind and owner = :owner {where} order by place {order} limit :n"
        bound = {"kind": kind, "owner": owner, "after": place, "n": limit + 1, **values}
        return [row[0] for row in self._database.execute(query, bound)]

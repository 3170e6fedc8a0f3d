"""Readers: files in, documents out. A broken line or field is named with its file, line and mend.

Files are read as a stream, except a JSON file of one object and a text file, which are read whole.
"""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from gristmill.corpus.document import Document
from gristmill.errors import DataError
from gristmill.files import read_jsonl as read_lines

OnError = Literal["raise", "skip"]
BLANK_LINE = "\n\n"
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n")
_log = logging.getLogger(__name__)


def read_jsonl(
    path: Path, text_field: str = "text", id_field: str | None = None, on_error: OnError = "raise"
) -> Iterator[Document]:
    """One document a line. The other fields become metadata; values that are no strings are kept as JSON.

    Without `id_field` a document is named after its file and line. `on_error` "skip" logs a bad line as a warning
    and goes on. Raises DataError for a line that is not UTF-8 or not a JSON object, a missing field, or no document.
    """
    if on_error not in ("raise", "skip"):
        raise DataError(f'on_error must be "raise" or "skip", got {on_error!r}')

    def complain(error: DataError) -> None:
        if on_error == "raise":
            raise error
        _log.warning("skipped %s", error)

    count = 0
    for line, record in read_lines(path, on_error=complain):
        where = f"{path} line {line}"
        try:
            text = _field(record, text_field, where, "--text_field")
            identity = f"{path.name}:{line}" if id_field is None else _field(record, id_field, where, "id_field")
        except DataError as error:
            complain(error)
            continue
        count += 1
        yield Document(identity, text, _metadata(record, text_field, id_field))
    _refuse_empty(path, count)


def read_documents(path: Path) -> Iterator[Document]:
    """Read what `run_pipeline` wrote: id, text and metadata come back as they were. Raises DataError."""
    count = 0
    for line, record in read_lines(path):
        where = f"{path} line {line}"
        metadata = record.get("metadata")
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise DataError(
                f'{where}: field "metadata" must be an object of strings. Read other JSONL with read_jsonl.'
            )
        count += 1
        yield Document(_field(record, "id", where), _field(record, "text", where), metadata)
    _refuse_empty(path, count)


def read_text(path: Path, separator: str | None = None) -> Iterator[Document]:
    """Plain text: one document a file, or one for each part between `separator` (BLANK_LINE: between paragraphs).

    `path` is a file, or a folder whose .txt files are read in the order of their names. Parts without text are no
    documents. Raises DataError for a file that is not UTF-8, an empty separator, or no document.
    """
    if separator == "":
        raise DataError("separator must not be empty; leave it out for one document a file")
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    count = 0
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        text = _read_utf8(file).replace("\r\n", "\n")
        if separator is None:
            parts = [text]
        else:
            parts = _BLANK_LINES.split(text) if separator == BLANK_LINE else text.split(separator)
        for number, part in enumerate(filter(str.strip, parts), start=1):
            count += 1
            yield Document(name if separator is None else f"{name}#{number}", part.strip("\n"))
    _refuse_empty(path, count)


def read_wikipedia_summaries(path: Path) -> Iterator[Document]:
    """Articles of a JSON object {title: {title, extract, description, topic}}; the id is the title.

    The text is the title, a blank line and the extract; the metadata hold title, topic and description.
    Raises DataError for a file that is not UTF-8 or JSON, an article with a missing field, or no article.
    """
    try:
        articles = json.loads(_read_utf8(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno} column {error.colno}: not JSON ({error.msg})") from error
    if not isinstance(articles, dict):
        raise DataError(f"{path}: expected a JSON object of articles by title, found {_json_type(articles)}")
    for key, article in articles.items():
        where = f"{path} article {key!r}"
        if not isinstance(article, dict):
            raise DataError(f"{where}: expected a JSON object, found {_json_type(article)}")
        yield _article(article, where, key)
    _refuse_empty(path, len(articles))


def read_articles(path: Path) -> Iterator[Document]:
    """Articles as `read_wikipedia_summaries` gives them, from its layout or, for .jsonl, from one article a line."""
    if path.suffix != ".jsonl":
        yield from read_wikipedia_summaries(path)
        return
    count = 0
    for line, record in read_lines(path):
        count += 1
        yield _article(record, f"{path} line {line}")
    _refuse_empty(path, count)


def _article(article: dict[str, Any], where: str, key: str | None = None) -> Document:
    title, extract = _field(article, "title", where), _field(article, "extract", where)
    if not title.strip():
        raise DataError(f'{where}: field "title" is empty')
    metadata = {name: _field(article, name, where) for name in ("title", "topic", "description")}
    return Document(title if key is None else key, f"{title}\n\n{extract}", metadata)


def summary_body(document: Document) -> str:
    """The extract of an article from `read_wikipedia_summaries`, cleaned or not: its text without the title."""
    heading = document.metadata.get("title", "") + "\n\n"
    if not document.text.startswith(heading):
        raise DataError(f"document {document.id!r}: the text does not begin with its title and a blank line")
    return document.text.removeprefix(heading)


def _field(record: dict[str, Any], name: str, where: str, option: str | None = None) -> str:
    """A string field of a record; the error lists what is there and, for the caller's choice, the option to set."""
    value = record.get(name)
    if isinstance(value, str):
        return value
    if name in record:
        raise DataError(f'{where}: field "{name}" must be a string, found {_json_type(value)}')
    found = ", ".join(record) or "no fields"
    strings = [key for key, entry in record.items() if isinstance(entry, str)]
    longest = max(strings, key=lambda key: len(record[key]), default=None)
    mend = f" Use {option} {longest}, or --on_error skip." if option and longest else ""
    raise DataError(f'{where}: field "{name}" is missing (found: {found}).{mend}')


def _metadata(record: dict[str, Any], text_field: str, id_field: str | None) -> dict[str, str]:
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in record.items()
        if key not in (text_field, id_field)
    }


def _read_utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} line {line}: not UTF-8 at byte {error.start} (0x{error.object[error.start]:02x}). "
            "Convert the file, for example with iconv -f latin1 -t utf-8."
        ) from error


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _refuse_empty(path: Path, count: int) -> None:
    if count == 0:
        raise DataError(f"{path}: the corpus is empty, no document was found")

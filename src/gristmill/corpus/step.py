"""A pipeline step is a generator over documents that says what it drops and why."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from gristmill.corpus.document import Document

Drop = Callable[[Document, str], None]
"""Called with a document that is not kept and the reason, a short phrase."""


class Step(Protocol):
    """One stage of the cleaning funnel.

    Every document that comes in is either yielded once, changed or not and in order, or handed to `drop` once.
    The result depends on the documents alone, and a second run over the output keeps every document as it is.
    """

    @property
    def name(self) -> str:
        """Short name for reports, like 'near-duplicates'."""

    def run(self, documents: Iterable[Document], drop: Drop) -> Iterator[Document]:
        """Yield what is kept; state lives for one run only."""


@dataclass(frozen=True)
class Filter:
    """A step that judges each document on its own: `judge` returns None to keep it, or the reason to drop it."""

    name: str
    judge: Callable[[Document], str | None]

    def run(self, documents: Iterable[Document], drop: Drop) -> Iterator[Document]:
        """Yield the documents without a reason against them, unchanged."""
        for document in documents:
            reason = self.judge(document)
            if reason is None:
                yield document
            else:
                drop(document, reason)

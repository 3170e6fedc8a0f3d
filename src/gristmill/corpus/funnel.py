"""Run the cleaning steps over a corpus and account for every document: the funnel report.

The steps are generators in a chain, so one document at a time is in memory besides what a step keeps for itself.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from gristmill.corpus.clean import Clean
from gristmill.corpus.dedup import ExactDuplicates, NearDuplicates
from gristmill.corpus.document import Document
from gristmill.corpus.filters import repeated_lines, repeated_ngrams, too_few_letters, too_short
from gristmill.corpus.step import Step
from gristmill.errors import DataError
from gristmill.files import atomic_path, write_json

SAMPLES = 3
EXCERPT = 200
DOCUMENTS, REJECTS, FUNNEL, SECONDS = "documents.jsonl", "rejects.jsonl", "funnel.json", "funnel-seconds.json"


def default_steps() -> list[Step]:
    """Repair, drop what is hardly text, drop copies."""
    return [
        Clean(),
        too_short(),
        too_few_letters(),
        repeated_lines(),
        repeated_ngrams(),
        ExactDuplicates(),
        NearDuplicates(),
    ]


@dataclass
class StepCount:
    """What one step did. Lengths are in characters; `seconds` are the step's own, without those before it."""

    name: str
    documents_in: int = 0
    kept: int = 0
    dropped: int = 0
    characters_in: int = 0
    characters_out: int = 0
    samples: list[dict[str, str]] = field(default_factory=list)
    """Up to three dropped documents: id, reason and the beginning of the text."""
    seconds: float = 0.0


@dataclass
class Funnel:
    """Counts of every step, in order; `source_seconds` is the time spent reading."""

    steps: list[StepCount] = field(default_factory=list)
    source_seconds: float = 0.0

    @property
    def documents_in(self) -> int:
        """Documents the source gave."""
        return self.steps[0].documents_in if self.steps else 0

    @property
    def kept(self) -> int:
        """Documents that passed every step."""
        return self.steps[-1].kept if self.steps else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data without the times, so that two runs over the same input give the same."""
        steps = [asdict(step) for step in self.steps]
        for step in steps:
            del step["seconds"]
        return {"documents_in": self.documents_in, "kept": self.kept, "steps": steps}

    def to_markdown(self) -> str:
        """One row a step."""
        rows = [
            "| step | in | kept | dropped | share dropped | characters out | seconds |",
            "|---|--:|--:|--:|--:|--:|--:|",
        ]
        for step in self.steps:
            share = step.dropped / step.documents_in if step.documents_in else 0.0
            rows.append(
                f"| {step.name} | {step.documents_in:,} | {step.kept:,} | {step.dropped:,} | {share:.2%} "
                f"| {step.characters_out:,} | {step.seconds:.2f} |"
            )
        return "\n".join(rows) + "\n"

    @classmethod
    def load(cls, directory: Path) -> "Funnel":
        """Read the funnel that `run_pipeline` left in its output folder. Raises DataError."""
        try:
            steps = [StepCount(**step) for step in json.loads((directory / FUNNEL).read_text("utf-8"))["steps"]]
            seconds = json.loads((directory / SECONDS).read_text("utf-8"))
            for step, own in zip(steps, seconds["steps"], strict=True):
                step.seconds = own
            return cls(steps, seconds["source"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{directory}: no readable {FUNNEL} and {SECONDS} ({error})") from error


def run_pipeline(
    documents: Iterable[Document],
    steps: Sequence[Step],
    directory: Path,
    *,
    progress: Callable[[int], None] | None = None,
) -> Funnel:
    """Send documents through the steps; write what is kept, what is dropped and the funnel into `directory`.

    documents.jsonl (id, text, metadata), rejects.jsonl (id, step, reason, text up to 200 characters) and funnel.json
    depend on the input alone, byte for byte; the times stand apart in funnel-seconds.json. Each file is written
    atomically, funnel.json last: where it stands the others are complete. `progress` gets the number of documents
    read so far. Raises DataError when no document is left or an id or text cannot be written as UTF-8.
    """
    names = [step.name for step in steps]
    if not names or len(set(names)) < len(names):
        raise DataError(f"a pipeline needs steps with different names, got: {', '.join(names) or 'none'}")
    with ExitStack() as stack:
        kept_file = _atomic_lines(stack, directory / DOCUMENTS)
        reject_file = _atomic_lines(stack, directory / REJECTS)
        meter = _Meter(_counted(documents, progress))
        meters, stream = [meter], iter(meter)
        counts = [StepCount(name) for name in names]
        for step, count in zip(steps, counts, strict=True):
            meter = _Meter(step.run(_entering(stream, count), _recorder(count, reject_file)))
            meters.append(meter)
            stream = _leaving(iter(meter), count)
        for document in stream:
            _write(kept_file, document.id, asdict(document))
        funnel = _account(counts, [meter.seconds for meter in meters])
        if not funnel.kept:
            lost = ", ".join(f"{count.name} {count.dropped}" for count in counts if count.dropped)
            raise DataError(f"no document is left of {funnel.documents_in}; dropped by step: {lost or 'none came in'}")
        (directory / FUNNEL).unlink(missing_ok=True)  # an old funnel must never stand beside new documents
    seconds = {"source": funnel.source_seconds, "steps": [count.seconds for count in counts]}
    write_json(directory / SECONDS, seconds)
    write_json(directory / FUNNEL, funnel.to_dict())
    return funnel


class _Meter:
    """Passes an iterable on and adds up the time spent waiting for its items."""

    def __init__(self, items: Iterable[Document]) -> None:
        self.items = items
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Document]:
        items = iter(self.items)
        while True:
            start = time.perf_counter()
            item = next(items, None)
            self.seconds += time.perf_counter() - start
            if item is None:
                return
            yield item


def _counted(documents: Iterable[Document], progress: Callable[[int], None] | None) -> Iterator[Document]:
    for number, document in enumerate(documents, start=1):
        if progress is not None:
            progress(number)
        yield document


def _entering(documents: Iterator[Document], count: StepCount) -> Iterator[Document]:
    for document in documents:
        count.documents_in += 1
        count.characters_in += len(document.text)
        yield document


def _leaving(documents: Iterator[Document], count: StepCount) -> Iterator[Document]:
    for document in documents:
        count.kept += 1
        count.characters_out += len(document.text)
        yield document


def _recorder(count: StepCount, reject_file: IO[bytes]) -> Callable[[Document, str], None]:
    def drop(document: Document, reason: str) -> None:
        count.dropped += 1
        excerpt = document.text[:EXCERPT]
        if len(count.samples) < SAMPLES:
            count.samples.append({"id": document.id, "reason": reason, "text": excerpt})
        record = {"id": document.id, "step": count.name, "reason": reason, "text": excerpt}
        _write(reject_file, document.id, record)

    return drop


def _account(counts: list[StepCount], cumulative: list[float]) -> Funnel:
    """Turn the meters' times, each with all before it inside, into each step's own; check that the counts add up."""
    for count, before, until in zip(counts, cumulative, cumulative[1:], strict=False):
        count.seconds = max(until - before, 0.0)
        if count.kept + count.dropped != count.documents_in:
            raise DataError(
                f"step {count.name}: {count.documents_in} documents came in, but {count.kept} were kept and "
                f"{count.dropped} dropped; a step must yield or drop each document once"
            )
    return Funnel(counts, cumulative[0])


def _atomic_lines(stack: ExitStack, path: Path) -> IO[bytes]:
    return stack.enter_context(stack.enter_context(atomic_path(path)).open("wb"))


def _write(file: IO[bytes], document_id: str, record: dict[str, Any]) -> None:
    try:
        file.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
    except UnicodeEncodeError as error:
        raise DataError(
            f"document {document_id!r}: contains half of a surrogate pair, which is no character. "
            "Begin the pipeline with Clean()."
        ) from error

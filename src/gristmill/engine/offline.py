"""Offline batch: a JSONL file of prompts to a JSONL file of answers, with the engine always full, resumable.

One output line per input line, in the order of the input. What is written stays written: a killed run goes on after its
last whole line, and the file becomes what an unbroken run would have written. A file beside the output
(OUTPUT.job.json) tells what the answers depend on; another input, model or default is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import secrets
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from gristmill.core import RequestOutput, SamplingParams
from gristmill.engine.llm import LLM
from gristmill.errors import DataError, GristmillError, RequestError, closest
from gristmill.files import write_json
from gristmill.model.load import resolve
from gristmill.progress import Advance, progress

_OWN_FIELDS = ("id", "prompt", "messages")
_NOT_WRITTEN = {"n": 1, "logprobs": None, "prompt_logprobs": None}
"""Parameters whose results have no place in an output line, and the value that asks for none."""
_PARAMETERS = [field.name for field in dataclasses.fields(SamplingParams)]
_PROBE = 1 << 16


@dataclass(frozen=True)
class Counts:
    """Lines of the output, those of them that were there before, and those that tell an error."""

    lines: int
    kept: int
    errors: int


@dataclass(frozen=True)
class _Line:
    """One input line: what to ask for, or why it cannot be asked."""

    number: int
    name: str | int
    fields: dict[str, Any]
    error: str | None = None


def run_batch(
    llm: LLM,
    source: Path,
    target: Path,
    defaults: SamplingParams,
    *,
    in_flight: int = 256,
    show_progress: bool = False,
) -> Counts:
    """Answer each line of `source` with one of `target`.

    An input line has `prompt` (text or token ids) or `messages`, perhaps an `id` (text or number; else its line number)
    and any sampling parameters that differ from `defaults`. An output line has id, text, finish_reason, prompt_tokens
    and completion_tokens; for a line that cannot be served, id and error. Lines without a seed get one of the run's.
    A `max_tokens` of the defaults is lowered to what the context leaves, that of a line is not. At most `in_flight`
    lines are read ahead of the oldest unfinished one. Progress is shown on stderr.

    Raises DataError when `target` holds anything but the beginning of this run's output, GristmillError when another
    process is writing it or it cannot be written.
    """
    if in_flight < 1:
        raise RequestError(f"in_flight must be at least 1, got {in_flight}", field="in_flight")
    for name, value in _NOT_WRITTEN.items():
        if getattr(defaults, name) != value:
            raise RequestError(f"{name} has no place in a batch's output: leave it out", field=name)
    state, total = _what_answers_depend_on(llm, source, defaults)
    with _appending(target) as handle:
        done = _finished_lines(handle, target)
        seed = _enter(target.with_name(target.name + ".job.json"), state, begun=bool(done))
        lines = _lines(source)
        if [line.name for line in islice(lines, len(done))] != [line["id"] for line in done]:
            raise DataError(f"{target}: its lines are not the answers to {source}. Move it away to begin anew.")
        written, errors = len(done), sum("error" in line for line in done)
        with (
            _bar(total, written, show_progress) as advance,
            contextlib.closing(_answers(llm, lines, source, defaults, seed, in_flight)) as answers,
        ):
            for some in answers:
                handle.write(b"".join(map(_encoded, some)))
                handle.flush()
                os.fsync(handle.fileno())
                written += len(some)
                errors += sum("error" in answer for answer in some)
                advance(written)
    return Counts(written, len(done), errors)


def _bar(total: int, done: int, shown: bool) -> contextlib.AbstractContextManager[Advance]:
    return progress("lines", total, done=done) if shown else contextlib.nullcontext(lambda *_: None)


def _answers(
    llm: LLM, lines: Iterator[_Line], source: Path, defaults: SamplingParams, seed: int, in_flight: int
) -> Generator[list[dict[str, Any]], None, None]:
    """Output lines in the order of the input, as soon as all before them are there."""
    waiting: deque[dict[str, Any]] = deque()  # output lines in the making; those with an id alone are not finished
    running: dict[str, dict[str, Any]] = {}
    try:
        while True:
            for line in islice(lines, in_flight - len(waiting)):
                waiting.append(answer := {"id": line.name})
                try:
                    running[_add(llm, line, defaults, seed)] = answer
                except GristmillError as error:
                    answer["error"] = f"{source} line {line.number}: {error}"
            ready = []
            while waiting and len(waiting[0]) > 1:
                ready.append(waiting.popleft())
            if ready:
                yield ready
            elif not waiting:
                return
            else:
                for output in llm.engine.step(finished_only=True):
                    if (finished := running.pop(output.request_id, None)) is not None:
                        finished |= _answer(output)
    finally:
        for request_id in running:
            llm.engine.abort(request_id)


def _add(llm: LLM, line: _Line, defaults: SamplingParams, seed: int) -> str:
    """Queue what a line asks for. Raises GristmillError, naming the field."""
    if line.error is not None:
        raise DataError(line.error)
    fields = line.fields
    for name in fields:
        if name not in (*_OWN_FIELDS, *_PARAMETERS):
            raise DataError(f"unknown field {name!r}.{closest(name, (*_OWN_FIELDS, *_PARAMETERS))}")
        if fields[name] != _NOT_WRITTEN.get(name, fields[name]):
            raise RequestError(f"{name} has no place in a batch's output: leave it out", field=name)
    if ("prompt" in fields) == ("messages" in fields):
        raise DataError("one of prompt and messages is needed, and not both")
    given = {name: value for name, value in fields.items() if name in _PARAMETERS}
    if isinstance(bias := given.get("logit_bias"), dict):  # the keys of JSON are texts
        given["logit_bias"] = {int(key) if key.isdecimal() else key: value for key, value in bias.items()}
    unlike = {field: getattr(defaults, field) for field in _PARAMETERS}
    if unlike["seed"] is None:
        unlike["seed"] = _seed_of(seed, line.number)
    if "messages" in fields:
        if not isinstance(fields["messages"], list):
            raise DataError("messages must be a list")
        ids = llm.renderer.render_prompt(fields["messages"])
    else:
        ids = _prompt_ids(llm, fields["prompt"])
    if unlike["max_tokens"] is not None:
        unlike["max_tokens"] = min(unlike["max_tokens"], max(1, llm.room_after(ids)))
    try:
        params = SamplingParams.from_dict({**unlike, **given})
    except (TypeError, ValueError, AttributeError) as error:  # a value of a type that no check expects
        raise DataError(f"the parameters are not of their types ({error})") from error
    if "messages" in fields:
        params = params.ending_at(llm.renderer.stop_token_ids)
    return llm.engine.add(ids, params)


def _prompt_ids(llm: LLM, prompt: Any) -> list[int]:
    if not isinstance(prompt, str | list):
        raise DataError("prompt must be a text or a list of token ids")
    return llm.engine.encode(prompt)


def _answer(output: RequestOutput) -> dict[str, Any]:
    completion = output.outputs[0]
    if completion.finish_reason == "error":
        return {"error": completion.error or "the model failed to answer"}
    return {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": len(completion.token_ids),
    }


def _encoded(answer: dict[str, Any]) -> bytes:
    try:
        return json.dumps(answer, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, in an id or a message
        return json.dumps(answer).encode() + b"\n"


def _seed_of(seed: int, number: int) -> int:
    """A seed for a line, the same after a restart."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:7], "big")


def _lines(source: Path) -> Iterator[_Line]:
    """The lines that are not blank, broken ones too; their ids are all different."""
    taken: dict[str | int, int] = {}
    with source.open("rb") as handle:
        for number, text in enumerate(handle, start=1):
            if not text.strip():
                continue
            try:
                fields = json.loads(text.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                yield _Line(number, number, {}, f"not JSON ({error})")
                continue
            if not isinstance(fields, dict):
                yield _Line(number, number, {}, f"expected a JSON object, found {type(fields).__name__}")
                continue
            name = fields.get("id", number)
            if not isinstance(name, str | int) or isinstance(name, bool):
                yield _Line(number, number, fields, "id must be a text or a whole number")
            elif name in taken:
                yield _Line(number, name, fields, f"id {name!r} is that of line {taken[name]} too")
            else:
                taken[name] = number
                yield _Line(number, name, fields)


def _what_answers_depend_on(llm: LLM, source: Path, defaults: SamplingParams) -> tuple[dict[str, Any], int]:
    """Digests of input and model, the default parameters, and how many lines there are to answer."""
    digest, total = hashlib.sha256(), 0
    try:
        with source.open("rb") as handle:
            for text in handle:
                digest.update(text)
                total += bool(text.strip())
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror})") from error
    plain = json.loads(json.dumps(dataclasses.asdict(defaults), default=list))
    return {"input": digest.hexdigest(), "model": _model_digest(llm), "defaults": plain}, total


def _model_digest(llm: LLM) -> str:
    """Of the names, sizes and both ends of the model's files, and of the weights' type."""
    path = resolve(llm.model_name)
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors"))
    digest = hashlib.sha256(str(next(llm.network.parameters()).dtype).encode())
    for file in files:
        with file.open("rb") as handle:
            size = handle.seek(0, os.SEEK_END)
            digest.update(f"{file.name} {size} ".encode())
            for start in (0, max(0, size - _PROBE)):
                handle.seek(start)
                digest.update(handle.read(_PROBE))
    return digest.hexdigest()


def _enter(path: Path, state: dict[str, Any], *, begun: bool) -> int:
    """The seed of the run that began here, or that of a new one. Raises DataError for a run of something else."""
    known: dict[str, Any] = {}
    if path.is_file():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error})") from error
    changed = [name for name, value in state.items() if known.get(name) != value]
    if not changed:
        return int(known["seed"])
    if begun:
        what = f"another {' and '.join(changed)}" if known else "nobody knows what: this file is missing"
        raise DataError(f"{path}: the answers beside it are of {what}. Move both away to begin anew.")
    seed = secrets.randbits(32)
    write_json(path, {**state, "seed": seed})
    return seed


@contextlib.contextmanager
def _appending(target: Path) -> Iterator[BinaryIO]:
    """The output, open for appending, ours alone, without a last line that was cut."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab+") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise GristmillError(f"{target}: another process is writing it") from error
            yield handle
    except OSError as error:
        raise GristmillError(f"{target}: could not be written ({error.strerror}); the same command goes on") from error


def _finished_lines(handle: BinaryIO, target: Path) -> Sequence[dict[str, Any]]:
    """The whole lines of the output so far; what follows the last line end was cut by a kill, and is removed."""
    handle.seek(0)
    text = handle.read()
    whole = text.rfind(b"\n") + 1
    handle.truncate(whole)
    lines = []
    for number, line in enumerate(text[:whole].split(b"\n")[:-1], start=1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict) or "id" not in value:
            raise DataError(f"{target} line {number}: not an answer. Move the file away to begin anew.")
        lines.append(value)
    return lines

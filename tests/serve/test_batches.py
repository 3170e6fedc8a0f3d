"""Files of requests, answered in the background: what a line may be, what becomes of it, and what a kill leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from gristmill.errors import GristmillError
from gristmill.serve.batch.batches import LATER, Batches, Reply, call
from gristmill.serve.batch.lines import MAX_ERRORS, check_lines
from gristmill.serve.batch.storage import Storage
from gristmill.serve.errors import ApiError
from gristmill.serve.wire.files import Batch, BatchQuery, BatchRequest, FileObject, FileQuery
from serve.running import wait_for

CHAT = "/v1/chat/completions"
Ask = Callable[[str, str, bytes], Awaitable[Reply]]


def line(name: str, **changes: Any) -> bytes:
    """A good line with these changes."""
    fields = {"custom_id": name, "method": "POST", "url": CHAT, "body": {"model": "m", "say": name}, **changes}
    return json.dumps(fields).encode() + b"\n"


def answered(status: int, **body: Any) -> Reply:
    """A reply of a route."""
    return Reply(status, {"x-request-id": "req_1"}, json.dumps(body).encode())


async def echo(owner: str, endpoint: str, body: bytes) -> Reply:
    """Says what it was asked, after letting others in."""
    await asyncio.sleep(0)
    return answered(200, said=json.loads(body)["say"])


def request(file: FileObject, **changes: Any) -> BatchRequest:
    """A request for a batch of this file."""
    fields = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h", **changes}
    return BatchRequest.model_validate(fields)


def upload(storage: Storage, lines: Iterable[bytes], owner: str = "") -> FileObject:
    """A file of these lines."""
    file = storage.write("in.jsonl", "batch", lines)
    storage.add(file, owner)
    return file


def read(storage: Storage, name: str | None, owner: str = "") -> list[dict[str, Any]]:
    """The lines of a batch's file; none when there is no file."""
    if name is None:
        return []
    assert storage.file(name, owner).purpose == "batch_output"
    return [json.loads(text) for text in storage.contents(name).read_text().splitlines()]


async def ended(batches: Batches, batch: Batch, owner: str = "") -> Batch:
    """The batch once nothing happens to it any more."""
    async with asyncio.timeout(20):
        while not (batch := batches.get(batch.id, owner)).status.endswith("ed"):
            await asyncio.sleep(0.001)
    return batch


def run(
    tmp_path: Path, lines: Iterable[bytes], ask: Ask = echo, endpoint: str = CHAT
) -> tuple[Batch, list[Any], list[Any]]:
    """A batch at its end, its answers and its errors."""

    async def whole() -> tuple[Batch, list[Any], list[Any]]:
        storage = Storage(tmp_path)
        try:
            async with Batches(storage, ask) as batches:
                batch = batches.create(request(upload(storage, lines), endpoint=endpoint), "")
                batch = await ended(batches, batch)
            return batch, read(storage, batch.output_file_id), read(storage, batch.error_file_id)
        finally:
            storage.close()

    return asyncio.run(whole())


def test_every_line_is_answered_once_in_the_order_of_the_input(tmp_path: Path) -> None:
    async def slow_first(owner: str, endpoint: str, body: bytes) -> Reply:
        name = json.loads(body)["say"]
        await asyncio.sleep(0.02 if name == "0" else 0)
        return await echo(owner, endpoint, body)

    batch, answers, errors = run(tmp_path, [b"\n", *(line(str(i)) for i in range(20)), b" \n"], slow_first)
    assert batch.status == "completed"
    assert batch.request_counts.model_dump() == {"total": 20, "completed": 20, "failed": 0}
    assert [answer["custom_id"] for answer in answers] == [str(i) for i in range(20)]
    for answer in answers:
        response = {"status_code": 200, "request_id": "req_1", "body": {"said": answer["custom_id"]}}
        assert answer == {"id": answer["id"], "custom_id": answer["custom_id"], "response": response, "error": None}
    assert len({answer["id"] for answer in answers}) == 20
    assert not errors
    assert batch.error_file_id is None
    stamps = (batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at)
    assert all(stamps)
    assert list(stamps) == sorted(filter(None, stamps))
    assert batch.expires_at == batch.created_at + 24 * 3600


def test_no_more_lines_than_allowed_are_asked_at_a_time_over_all_batches(tmp_path: Path) -> None:
    flying = most = 0

    async def counted(owner: str, endpoint: str, body: bytes) -> Reply:
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        await asyncio.sleep(0.001)
        flying -= 1
        return await echo(owner, endpoint, body)

    async def two() -> None:
        storage = Storage(tmp_path)
        async with Batches(storage, counted, concurrency=3) as batches:
            file = upload(storage, [line(str(i)) for i in range(10)])
            both = [batches.create(request(file), "") for _ in range(2)]
            assert [(await ended(batches, batch)).status for batch in both] == ["completed"] * 2
        storage.close()

    asyncio.run(two())
    assert most == 3


def test_lines_come_after_others_unless_they_say_otherwise(tmp_path: Path) -> None:
    bodies = []

    async def kept(owner: str, endpoint: str, body: bytes) -> Reply:
        bodies.append(json.loads(body))
        return answered(200)

    run(tmp_path, [line("a"), line("b", body={"priority": -1})], kept)
    assert bodies == [{"priority": LATER, "model": "m", "say": "a"}, {"priority": -1}]
    url = "/v1/embeddings"  # which has no such field
    run(tmp_path, [line("c", url=url)], kept, endpoint=url)
    assert bodies[2] == {"model": "m", "say": "c"}


def test_refusals_go_to_the_error_file_with_what_the_route_said(tmp_path: Path) -> None:
    async def refuse_odd(owner: str, endpoint: str, body: bytes) -> Reply:
        said = json.loads(body)["say"]
        return answered(400, error={"param": "say"}) if int(said) % 2 else answered(200, said=said)

    batch, answers, errors = run(tmp_path, [line(str(i)) for i in range(5)], refuse_odd)
    assert batch.status == "completed"
    assert batch.request_counts.model_dump() == {"total": 5, "completed": 3, "failed": 2}
    assert [answer["custom_id"] for answer in answers] == ["0", "2", "4"]
    assert [error["custom_id"] for error in errors] == ["1", "3"]
    assert errors[0]["response"] == {"status_code": 400, "request_id": "req_1", "body": {"error": {"param": "say"}}}


def test_a_busy_server_is_asked_again(tmp_path: Path) -> None:
    asked: dict[str, int] = {}

    async def busy_twice(owner: str, endpoint: str, body: bytes) -> Reply:
        name = json.loads(body)["say"]
        asked[name] = asked.get(name, 0) + 1
        if asked[name] > 2:
            return await echo(owner, endpoint, body)
        return Reply((429, 503)[asked[name] - 1], {"retry-after": "0"}, b'{"error": {}}')

    batch, answers, errors = run(tmp_path, [line("a"), line("b")], busy_twice)
    assert batch.status == "completed"
    assert len(answers) == 2
    assert not errors
    assert asked == {"a": 3, "b": 3}


@pytest.mark.parametrize(
    ("text", "code", "param"),
    [
        (b"{\n", "invalid_json_line", None),
        (b"[]\n", "invalid_request", None),
        (line("x").replace(b'"say"', b'"model"'), "invalid_json_line", None),
        (b"\xff\n", "invalid_json_line", None),
        (b"[" * 100_000 + b"\n", "invalid_json_line", None),
        (b'{"custom_id": ' + b"9" * 9_000 + b"}\n", "invalid_json_line", None),
        (line("x").replace(b'"x"', b'"\\ud800"', 1), "invalid_request", "custom_id"),
        (line(""), "invalid_request", "custom_id"),
        (line("x", method="GET"), "invalid_request", "method"),
        (line("x", url="/v1/completions"), "invalid_url", "url"),
        (line("x", body=[]), "invalid_request", "body"),
        (line("x", body={"stream": True}), "invalid_value", "body.stream"),
        (line("x", priority=1), "invalid_request", "priority"),
        (line("good"), "duplicate_custom_id", "custom_id"),
    ],
)  # fmt: skip
def test_a_batch_with_a_bad_line_fails_before_any_is_asked(
    tmp_path: Path, text: bytes, code: str, param: str | None
) -> None:
    async def never(owner: str, endpoint: str, body: bytes) -> Reply:
        raise AssertionError("a line was asked")

    batch, answers, errors = run(tmp_path, [line("good"), b"\n", text], never)
    assert batch.status == "failed"
    assert batch.failed_at
    assert batch.errors is not None
    (error,) = batch.errors.data
    assert (error.code, error.line, error.param) == (code, 3, param)
    assert "Traceback" not in error.message
    assert str(tmp_path) not in error.message
    assert answers == errors == []


def test_errors_of_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n \n")
    assert [error.code for error in check_lines(path, CHAT)[1]] == ["empty_file"]
    path.write_bytes(b"{\n" * (MAX_ERRORS + 5))
    count, errors = check_lines(path, CHAT)
    assert count == MAX_ERRORS + 5
    assert [error.line for error in errors] == [*range(1, MAX_ERRORS + 1), None]
    assert "5 more" in errors[-1].message


async def _until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def test_a_cancelled_batch_keeps_its_answers_and_names_the_rest(tmp_path: Path) -> None:
    async def only_first(owner: str, endpoint: str, body: bytes) -> Reply:
        if json.loads(body)["say"] != "0":
            await asyncio.Event().wait()
        return await echo(owner, endpoint, body)

    async def cancelled() -> None:
        storage = Storage(tmp_path)
        async with Batches(storage, only_first, concurrency=2) as batches:
            batch = batches.create(request(upload(storage, [line(str(i)) for i in range(4)])), "")
            await _until(lambda: batches.get(batch.id, "").request_counts.completed)
            assert batches.cancel(batch.id, "").status == "cancelling"
            assert batches.cancel(batch.id, "").status in ("cancelling", "cancelled")
            batch = await ended(batches, batch)
            assert batch.status == "cancelled"
            assert batch.cancelling_at
            assert batch.cancelled_at
            assert [answer["custom_id"] for answer in read(storage, batch.output_file_id)] == ["0"]
            rest = read(storage, batch.error_file_id)
            assert [entry["custom_id"] for entry in rest] == ["1", "2", "3"]
            assert {entry["error"]["code"] for entry in rest} == {"batch_cancelled"}
            assert {entry["response"] for entry in rest} == {None}
            with pytest.raises(ApiError, match="cannot be cancelled"):
                batches.cancel(batch.id, "")
        storage.close()

    asyncio.run(cancelled())


def test_what_is_not_answered_in_the_window_is_left_out(tmp_path: Path) -> None:
    async def only_first(owner: str, endpoint: str, body: bytes) -> Reply:
        if json.loads(body)["say"] != "0":
            await asyncio.Event().wait()
        return await echo(owner, endpoint, body)

    async def expired() -> None:
        storage = Storage(tmp_path)
        async with Batches(storage, only_first) as batches:
            file = upload(storage, [line(str(i)) for i in range(3)])
            batch = batches.create(request(file, completion_window="2h"), "")
            await _until(lambda: batches.get(batch.id, "").request_counts.completed)
        later = batch.created_at + 2 * 3600
        async with Batches(storage, only_first, clock=lambda: later) as batches:
            batch = await ended(batches, batch)
        assert batch.status == "expired"
        assert batch.expired_at == later
        assert [answer["custom_id"] for answer in read(storage, batch.output_file_id)] == ["0"]
        assert [entry["error"]["code"] for entry in read(storage, batch.error_file_id)] == ["batch_expired"] * 2
        storage.close()

    asyncio.run(expired())


def test_batches_and_files_belong_to_who_made_them(tmp_path: Path) -> None:
    async def both() -> None:
        storage = Storage(tmp_path)
        asked_by = set()

        async def ask(owner: str, endpoint: str, body: bytes) -> Reply:
            asked_by.add(owner)
            return await echo(owner, endpoint, body)

        async with Batches(storage, ask) as batches:
            file = upload(storage, [line("a")], "ann")
            batch = batches.create(request(file), "ann")
            for owner in ("bob", ""):
                for forbidden in (
                    lambda owner=owner: storage.file(file.id, owner),
                    lambda owner=owner: batches.create(request(file), owner),
                    lambda owner=owner: batches.get(batch.id, owner),
                    lambda owner=owner: batches.cancel(batch.id, owner),
                    lambda owner=owner: batches.page(owner, BatchQuery(after=batch.id)),
                ):
                    with pytest.raises(ApiError) as error:
                        forbidden()
                    assert error.value.status_code == 404
                assert batches.page(owner, BatchQuery()) == ([], False)
                assert storage.files(owner, FileQuery()) == ([], False)
            batch = await ended(batches, batch, "ann")
            assert asked_by == {"ann"}
            assert read(storage, batch.output_file_id, "ann")[0]["custom_id"] == "a"
            with pytest.raises(ApiError, match="was not uploaded for a batch"):
                batches.create(request(storage.file(batch.output_file_id or "", "ann")), "ann")
        storage.close()

    asyncio.run(both())


def test_lists_come_in_pages(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    files = [upload(storage, [b"x"]) for _ in range(5)]
    seen: list[str] = []
    more = True
    while more:
        page, more = storage.files("", FileQuery(limit=2, after=seen[-1] if seen else None))
        seen += [file.id for file in page]
    assert seen == [file.id for file in reversed(files)]
    assert storage.files("", FileQuery(order="asc", after=files[3].id)) == ([files[4]], False)
    assert storage.files("", FileQuery(purpose="batch_output")) == ([], False)
    storage.close()


def test_one_process_has_the_folder_and_what_was_half_written_goes(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    kept = upload(storage, [b"kept"])
    lost = storage.write("lost", "batch", [b"killed before its row was written"])
    with pytest.raises(GristmillError, match="another process"):
        Storage(tmp_path)
    storage.close()
    storage = Storage(tmp_path)
    assert storage.file(kept.id, "") == kept
    assert storage.contents(kept.id).read_bytes() == b"kept"
    assert not storage.contents(lost.id).exists()
    assert tmp_path.stat().st_mode & 0o077 == 0
    storage.close()


def test_a_bug_ends_the_batch_and_not_the_server(tmp_path: Path) -> None:
    async def broken(owner: str, endpoint: str, body: bytes) -> Reply:
        raise RuntimeError("a bug")

    batch, _, _ = run(tmp_path, [line("a")], broken)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert [error.code for error in batch.errors.data] == ["internal_error"]


def test_a_line_without_an_answer_is_not_taken_for_done(tmp_path: Path) -> None:
    async def cut(scope: object, receive: object, send: object) -> None:
        """As the application does with a request that is cut off from within."""

    async def ask(owner: str, endpoint: str, body: bytes) -> Reply:
        return await call(cut, endpoint, body, {})

    batch, _, _ = run(tmp_path, [line("a")], ask)
    assert batch.status == "failed"


def test_a_batch_ends_though_the_application_takes_its_cancellation_and_answers(tmp_path: Path) -> None:
    asked = asyncio.Event()

    async def busy(scope: object, receive: object, send: Callable[[Any], Awaitable[None]]) -> None:
        asked.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await send({"type": "http.response.start", "status": 503, "headers": [(b"retry-after", b"0")]})
        await send({"type": "http.response.body", "body": b"{}"})

    async def ask(owner: str, endpoint: str, body: bytes) -> Reply:
        return await call(busy, endpoint, body, {})

    async def cancelled() -> None:
        storage = Storage(tmp_path)
        async with Batches(storage, ask) as batches:
            batch = batches.create(request(upload(storage, [line("a")])), "")
            await asked.wait()
            batches.cancel(batch.id, "")
            assert (await ended(batches, batch)).status == "cancelled"
        storage.close()

    asyncio.run(cancelled())


def serve_until_killed(directory: Path, log: Path) -> None:
    """Go on with the batches of a folder; write down what is asked, and stop before all is done."""
    left = 36

    async def ask(owner: str, endpoint: str, body: bytes) -> Reply:
        nonlocal left
        left -= 1
        await (asyncio.sleep(0.002) if left >= 0 else asyncio.Event().wait())
        with log.open("a") as handle:
            handle.write(json.loads(body)["say"] + "\n")
        return answered(200)

    async def serve() -> None:
        async with Batches(Storage(directory), ask, concurrency=3):
            await asyncio.Event().wait()

    asyncio.run(serve())


def test_a_killed_server_goes_on_where_it_stood(tmp_path: Path) -> None:
    kills, count = 3, 120
    log = tmp_path / "asked"
    log.touch()

    async def begin() -> Batch:
        storage = Storage(tmp_path / "data")
        async with Batches(storage, lambda *_: asyncio.Event().wait()) as batches:  # type: ignore[arg-type,return-value]
            batch = batches.create(request(upload(storage, [line(str(i)) for i in range(count)])), "")
        storage.close()
        return batch

    batch = asyncio.run(begin())
    for kill in range(kills):
        before = len(log.read_text())
        process = multiprocessing.get_context("fork").Process(target=serve_until_killed, args=(tmp_path / "data", log))
        process.start()
        try:
            wait_for(lambda before=before: len(log.read_text()) > before + 50, 30)
        finally:
            process.kill()
            process.join()
        assert len(set(log.read_text().split())) < count, f"done before kill {kill}: nothing was tested"

    async def end() -> None:
        storage = Storage(tmp_path / "data")
        done = storage.answered(batch)
        assert 5 < len(done) < count
        asked = []

        async def kept(owner: str, endpoint: str, body: bytes) -> Reply:
            asked.append(int(json.loads(body)["say"]))
            return await echo(owner, endpoint, body)

        async with Batches(storage, kept) as batches:
            ready = await ended(batches, batch)
        assert ready.status == "completed"
        assert sorted(asked) == sorted(set(range(count)) - {number - 1 for number in done})
        answers = read(storage, ready.output_file_id)
        assert [answer["custom_id"] for answer in answers] == [str(i) for i in range(count)]
        storage.close()

    asyncio.run(end())
    names = log.read_text().split()
    assert len(names) - len(set(names)) <= 3 * kills, "more than the lines in flight were asked twice"

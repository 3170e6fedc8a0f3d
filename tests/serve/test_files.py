"""Files and batches over HTTP, through the official client and without one."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gristmill.serve.access.keys import create_key
from serve.keeping import keeping
from serve.running import running, wait_for
from serve.scripted_engine import ScriptedEngine

openai = pytest.importorskip("openai")

pytestmark = pytest.mark.peer

CHAT = "/v1/chat/completions"


def line(name: str, **fields: Any) -> bytes:
    """A line that asks for an answer to its own name."""
    body = {"model": "scripted", "messages": [{"role": "user", "content": f"I am {name}."}], **fields}
    return json.dumps({"custom_id": name, "method": "POST", "url": CHAT, "body": body}).encode() + b"\n"


class Kept:
    """A running server, its engine, and clients."""

    def __init__(self, url: str, engine: ScriptedEngine, key: str = "none") -> None:
        self.url, self.engine = url, engine
        self.http = httpx.Client(base_url=url, timeout=20)
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=20)

    def ended(self, name: str) -> Any:
        """A batch once nothing happens to it any more."""
        wait_for(lambda: self.openai.batches.retrieve(name).status.endswith("ed"))
        return self.openai.batches.retrieve(name)

    def close(self) -> None:
        """Let the connections go."""
        self.http.close()
        self.openai.close()


@pytest.fixture(scope="module")
def _kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    engine = ScriptedEngine(lambda prompt: f"You are {prompt.rpartition('I am ')[2].partition('.')[0]}.")
    with running(keeping(engine, tmp_path_factory.mktemp("data"), max_upload_bytes=100_000)) as url:
        kept = Kept(url, engine)
        yield kept
        kept.close()


@pytest.fixture
def kept(_kept: Kept) -> Iterator[Kept]:
    """The server, whose engine runs."""
    _kept.engine.added.clear()
    yield _kept
    _kept.engine.gate.set()


def test_a_file_comes_back_as_it_was_sent(kept: Kept) -> None:
    contents = b"\x00\xff any bytes \r\n"
    name = "../../etc/pass\u00e4wd.jsonl"
    file = kept.openai.files.create(file=(name, io.BytesIO(contents)), purpose="batch")
    assert (file.object, file.bytes, file.filename, file.purpose) == ("file", len(contents), name, "batch")
    assert kept.openai.files.retrieve(file.id) == file
    assert kept.openai.files.content(file.id).read() == contents
    assert kept.openai.files.wait_for_processing(file.id).status == "processed"
    assert file.id in [each.id for each in kept.openai.files.list()]
    assert kept.openai.files.delete(file.id).deleted
    for gone in (kept.openai.files.retrieve, kept.openai.files.content, kept.openai.files.delete):
        with pytest.raises(openai.NotFoundError):
            gone(file.id)


def test_the_client_pages_through_lists(kept: Kept) -> None:
    made = [kept.openai.files.create(file=(f"{i}", b"x"), purpose="batch").id for i in range(5)]
    assert [file.id for file in kept.openai.files.list(limit=2)][:5] == made[::-1]
    batches = [
        kept.openai.batches.create(input_file_id=made[0], endpoint=CHAT, completion_window="24h").id for _ in range(3)
    ]
    assert [batch.id for batch in kept.openai.batches.list(limit=2)][:3] == batches[::-1]


def test_a_batch_gives_what_its_route_gives(kept: Kept) -> None:
    lines = [line("Ann"), line("Bob", max_tokens=3), line("Cid", temperature="warm"), line("Dan", model="other")]
    file = kept.openai.files.create(file=("in.jsonl", b"".join(lines)), purpose="batch")
    begun = kept.openai.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"job": "7"}
    )
    assert begun.metadata == {"job": "7"}
    batch = kept.ended(begun.id)
    assert batch.status == "completed"
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (4, 2, 2)
    answers = [json.loads(text) for text in kept.openai.files.content(batch.output_file_id).text.splitlines()]
    assert [answer["custom_id"] for answer in answers] == ["Ann", "Bob"]
    choices = [answer["response"]["body"]["choices"][0] for answer in answers]
    assert [choice["message"]["content"] for choice in choices] == ["You are Ann.", "You"]
    assert [choice["finish_reason"] for choice in choices] == ["stop", "length"]
    assert all(answer["response"]["request_id"].startswith("req_") for answer in answers)
    errors = [json.loads(text) for text in kept.openai.files.content(batch.error_file_id).text.splitlines()]
    assert [error["response"]["status_code"] for error in errors] == [400, 404]
    assert [error["response"]["body"]["error"]["param"] for error in errors] == ["temperature", "model"]
    for error, text in zip(errors, lines[2:], strict=True):  # to the letter what comes over HTTP
        assert error["response"]["body"] == kept.http.post(CHAT, json=json.loads(text)["body"]).json()


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [("/v1/completions", {"prompt": "I am Eve."}), ("/v1/responses", {"input": "I am Eve."})],
)
def test_other_routes_than_chat(kept: Kept, endpoint: str, body: dict[str, Any]) -> None:
    entry = {"custom_id": "1", "method": "POST", "url": endpoint, "body": {"model": "scripted", **body}}
    file = kept.openai.files.create(file=("in.jsonl", json.dumps(entry).encode()), purpose="batch")
    begun = kept.openai.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")
    batch = kept.ended(begun.id)
    (answer,) = [json.loads(text) for text in kept.openai.files.content(batch.output_file_id).text.splitlines()]
    assert "You are Eve." in json.dumps(answer["response"]["body"])
    (standing,) = [kept.engine.standings[name] for name in kept.engine.added]
    assert standing is not None
    assert standing.priority > 0


def test_a_file_in_use_stays_and_a_cancelled_batch_frees_the_engine(kept: Kept) -> None:
    kept.engine.gate.clear()
    file = kept.openai.files.create(file=("in.jsonl", line("Ann") + line("Bob")), purpose="batch")
    batch = kept.openai.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="1h")
    wait_for(lambda: len(kept.engine.live) == 2)
    with pytest.raises(openai.BadRequestError) as error:
        kept.openai.files.delete(file.id)
    assert error.value.code == "file_in_use"
    assert kept.openai.batches.cancel(batch.id).status == "cancelling"
    kept.engine.gate.set()
    assert kept.ended(batch.id).status == "cancelled"
    wait_for(lambda: not kept.engine.live)
    kept.openai.files.delete(file.id)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"completion_window": "24"}, "completion_window"),
        ({"completion_window": "\u0662h"}, "completion_window"),
        ({"input_file_id": "../server.sqlite3"}, "input_file_id"),
        ({"input_file_id": "\x00"}, "input_file_id"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3600}}, "output_expires_after"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_batches_that_cannot_begin(kept: Kept, changes: dict[str, Any], param: str) -> None:
    file = kept.openai.files.create(file=("in.jsonl", line("Ann")), purpose="batch")
    body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h", **changes}
    answer = kept.http.post("/v1/batches", json=body)
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["param"] == param


def test_uploads_that_are_refused(kept: Kept) -> None:
    file = {"file": ("a", b"x")}
    for options, status, param in (
        ({"files": file, "data": {"purpose": "vision"}}, 400, "purpose"),
        ({"files": file}, 400, "purpose"),
        ({"data": {"purpose": "batch"}}, 400, "file"),
        ({"files": file, "data": {"purpose": "batch", "expires_after[seconds]": "9"}}, 400, "expires_after[seconds]"),
        ({"files": {"file": ("a", b"x" * 100_001)}, "data": {"purpose": "batch"}}, 413, None),
        ({"json": {"file": "x", "purpose": "batch"}}, 400, None),
        ({"content": b"--", "headers": {"content-type": "multipart/form-data; boundary="}}, 400, None),
        (
            {"files": file, "data": {"purpose": "batch"}, "headers": {"sec-fetch-site": "cross-site"}},
            403,
            None,
        ),
    ):
        answer = kept.http.post("/v1/files", **options)  # type: ignore[arg-type]
        assert answer.status_code == status, (options, answer.text)
        error = answer.json()["error"]
        assert param is None or error["param"] == param, error
    for query in ("limit=0", "limit=x", "order=up", "after=nobody", "colour=red"):
        for path in ("/v1/files", "/v1/batches"):
            answer = kept.http.get(f"{path}?{query}")
            assert answer.status_code in (400, 404), (query, answer.text)
            assert "JSON" not in answer.json()["error"]["message"]
    for method, path in (("GET", "/v1/files/x"), ("DELETE", "/v1/files/%00"), ("POST", "/v1/batches/x/cancel")):
        assert kept.http.request(method, path).status_code == 404


def test_a_file_name_that_cannot_be_sent_back(kept: Kept) -> None:
    head = b"--x\r\nContent-Disposition: form-data; name="
    body = head + b'"file"; filename="\\ud800.jsonl"\r\n\r\n{}\r\n' + head + b'"purpose"\r\n\r\nbatch\r\n--x--\r\n'
    headers = {"content-type": "multipart/form-data; boundary=x; charset=unicode_escape"}
    answer = kept.http.post("/v1/files", content=body, headers=headers)
    assert (answer.status_code, answer.json()["filename"]) == (200, "?.jsonl")


def test_keys_see_their_own_files_alone_and_their_batches_are_asked_in_their_name(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    secrets = [create_key(keys, "ann"), create_key(keys, "bob", requests_per_minute=30)]
    engine = ScriptedEngine()
    with running(keeping(engine, keys=keys)) as url:
        ann, bob = (Kept(url, engine, key) for key in secrets)
        file = ann.openai.files.create(file=("in.jsonl", line("Ann")), purpose="batch")
        batch = ann.openai.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        assert ann.ended(batch.id).request_counts.completed == 1
        assert list(bob.openai.files.list()) == list(bob.openai.batches.list()) == []
        with pytest.raises(openai.NotFoundError):
            bob.openai.batches.retrieve(batch.id)
        with pytest.raises(openai.NotFoundError):
            bob.openai.files.content(batch.id)
        assert bob.http.get("/v1/files").status_code == 401
        for each in (ann, bob):
            each.close()


def test_files_outlive_the_server_in_a_directory_and_not_without(tmp_path: Path) -> None:
    for directory, stays in ((tmp_path, True), (None, False)):
        engine = ScriptedEngine()
        with running(keeping(engine, directory)) as url:
            kept = Kept(url, engine)
            name = kept.openai.files.create(file=("a", b"x"), purpose="batch").id
            kept.close()
        with running(keeping(engine, directory)) as url:
            kept = Kept(url, engine)
            assert (name in [file.id for file in kept.openai.files.list()]) is stays
            kept.close()

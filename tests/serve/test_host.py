"""Models come, change and go while the server runs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from gristmill.core import Prompt, SamplingParams
from gristmill.errors import GristmillError
from gristmill.serve.access.protection import Protection
from gristmill.serve.app import create_app
from gristmill.serve.host import ModelHost, Source
from gristmill.serve.hosted import Hosted, Servable
from gristmill.serve.routing.routed import RoutedEngine, RoutedModel
from gristmill.serve.routing.router import parse_router
from gristmill.tokens.renderer import JinjaRenderer
from serve.running import leave, running, wait_for
from serve.scripted_engine import ScriptedEngine, ScriptedLLM, byte_tokenizer
from serve.test_reasoning import HI


class Shelf:
    """A loader of scripted models: what a source says is what its model answers."""

    def __init__(self) -> None:
        self.engines: dict[str, ScriptedEngine] = {}
        self.models: dict[str, ScriptedLLM] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.version = 1
        self.waiting = 0

    def __call__(self, source: Source) -> Servable:
        say = f"{source.model} {self.version}"
        self.waiting += 1
        assert self.gate.wait(20)
        self.waiting -= 1
        if source.model == "broken":
            raise GristmillError("broken: no such model")
        engine = ScriptedEngine(lambda prompt: say)
        self.engines[source.name] = engine
        model = self.models[source.name] = ScriptedLLM(engine, source.name)
        return model


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def http(shelf: Shelf) -> Iterator[httpx.Client]:
    app = create_app([Source("one", "first")], load=shelf)
    with running(app) as url, httpx.Client(base_url=url, timeout=20) as client:
        wait_for(lambda: client.get("/ready").status_code == 200)
        yield client


def say(http: httpx.Client, model: str) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"model": model, "messages": HI})


def said(http: httpx.Client, model: str) -> Any:
    return say(http, model).json()["choices"][0]["message"]["content"]


def names(http: httpx.Client) -> list[str]:
    return [card["id"] for card in http.get("/v1/models").json()["data"]]


def hold_prompts(renderer: JinjaRenderer) -> tuple[threading.Event, threading.Event]:
    """Two events: a prompt is being rendered; it may be done."""
    rendering, rendered, encode = threading.Event(), threading.Event(), renderer.encode_prompt

    def slowly(prompt: Prompt) -> list[int]:
        rendering.set()
        assert rendered.wait(20)
        return encode(prompt)

    renderer.encode_prompt = slowly  # type: ignore[method-assign]
    return rendering, rendered


def test_while_a_model_loads_the_server_says_so(shelf: Shelf) -> None:
    shelf.gate.clear()
    with (
        running(create_app([Source("one", "first")], load=shelf)) as url,
        httpx.Client(base_url=url, timeout=20) as http,
    ):
        assert http.get("/health").status_code == 200
        assert http.get("/ready").status_code == 503
        answer = say(http, "first")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
        assert int(answer.headers["retry-after"]) > 0
        assert http.get("/v1/models").json()["data"][0]["state"] == "loading"
        shelf.gate.set()
        wait_for(lambda: http.get("/ready").status_code == 200)
        assert said(http, "first") == "one 1"


def test_a_model_is_loaded_and_unloaded(http: httpx.Client) -> None:
    card = http.post("/v1/models/load", json={"model": "two", "name": "second"}).json()
    assert (card["id"], card["state"], card["kind"]) == ("second", "ready", "generate")
    assert names(http) == ["first", "second"]
    assert (said(http, "first"), said(http, "second")) == ("one 1", "two 1")
    again = http.post("/v1/models/load", json={"model": "x", "name": "second"})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "name_in_use")
    assert http.post("/v1/models/unload", json={"model": "second"}).status_code == 200
    assert names(http) == ["first"]
    assert say(http, "second").json()["error"]["code"] == "model_not_found"
    broken = http.post("/v1/models/load", json={"model": "broken"})
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "load_failed")
    assert names(http) == ["first"]


def test_unloading_lets_running_requests_finish(http: httpx.Client, shelf: Shelf) -> None:
    engine = shelf.engines["first"]
    engine.gate.clear()
    answers: list[httpx.Response] = []
    reader = threading.Thread(target=lambda: answers.append(say(http, "first")))
    reader.start()
    wait_for(lambda: engine.added)
    unload = threading.Thread(target=lambda: http.post("/v1/models/unload", json={"model": "first"}))
    unload.start()
    wait_for(lambda: names(http) == [])
    engine.gate.set()
    reader.join(10)
    unload.join(10)
    assert answers[0].json()["choices"][0]["message"]["content"] == "one 1"


def test_a_reloaded_model_answers_and_the_old_one_finishes(http: httpx.Client, shelf: Shelf) -> None:
    old = shelf.engines["first"]
    old.gate.clear()
    answers: list[httpx.Response] = []
    reader = threading.Thread(target=lambda: answers.append(say(http, "first")))
    reader.start()
    wait_for(lambda: old.added)
    shelf.version = 2
    assert http.post("/v1/models/reload", json={"model": "first"}).json()["state"] == "ready"
    assert said(http, "first") == "one 2"
    assert not answers
    old.gate.set()
    reader.join(10)
    assert answers[0].json()["choices"][0]["message"]["content"] == "one 1"


@pytest.mark.parametrize("change", ["reload", "unload"])
def test_a_request_on_its_way_to_the_engine_gets_there(http: httpx.Client, shelf: Shelf, change: str) -> None:
    renderer = shelf.models["first"].renderer
    rendering, rendered = hold_prompts(renderer)
    answers: list[httpx.Response] = []
    reader = threading.Thread(target=lambda: answers.append(say(http, "first")))
    reader.start()
    assert rendering.wait(10)
    changing = threading.Thread(target=lambda: http.post(f"/v1/models/{change}", json={"model": "first"}))
    changing.start()
    wait_for(lambda: shelf.models["first"].renderer is not renderer or names(http) == [])
    if change == "reload":  # it waits for nobody; the one of before is closed behind it
        changing.join(10)
    rendered.set()
    reader.join(10)
    changing.join(10)
    assert answers[0].json().get("choices"), answers[0].text


def test_a_replaced_model_has_the_time_that_a_closing_server_gives(shelf: Shelf) -> None:
    async def main() -> None:
        host = ModelHost([Source("one", "first")], shelf)
        await host.start()
        await host.wait()
        old, engine = host.find("first").hosted, shelf.engines["first"]
        release = old.hold()
        assert old.engine is not None
        engine.gate.clear()
        stream = await old.engine.submit("Hi", SamplingParams())
        await host.reload("first")
        closing = asyncio.create_task(host.close(20))
        await asyncio.sleep(0.1)  # in which the old one may be cut
        engine.gate.set()
        outputs = [output async for output in stream]
        assert outputs[-1].finished
        release()
        await closing
        assert not old.is_running

    asyncio.run(main())


def test_of_two_reloads_at_once_the_later_one_counts_and_no_model_stays_behind(
    http: httpx.Client, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Hosted] = []
    close = Hosted.close
    monkeypatch.setattr(Hosted, "close", lambda self, seconds: (closed.append(self), close(self, seconds)))
    shelf.gate.clear()
    reload = partial(http.post, "/v1/models/reload", json={"model": "first"})
    both = [threading.Thread(target=reload) for _ in range(2)]
    for each in both:
        each.start()
    wait_for(lambda: shelf.waiting)
    shelf.version = 2
    shelf.gate.set()
    for each in both:
        each.join(10)
    wait_for(lambda: len(set(closed)) == 2)
    assert said(http, "first") == "one 2"


def test_a_load_that_outlasts_its_request_is_not_lost(shelf: Shelf) -> None:
    app = create_app([Source("one", "first")], load=shelf, protection=Protection(request_seconds=1))
    with running(app) as url, httpx.Client(base_url=url, timeout=20) as http:
        wait_for(lambda: http.get("/ready").status_code == 200)
        for model, left in (("two", ["first", "second"]), ("broken", ["first", "second"])):
            shelf.gate.clear()
            answer = http.post("/v1/models/load", json={"model": model, "name": "second" if model == "two" else "b"})
            assert answer.status_code == 504
            assert http.post("/v1/models/reload", json={"model": names(http)[-1]}).status_code == 503  # it loads
            shelf.gate.set()
            wait_for(lambda: "loading" not in {card["state"] for card in http.get("/v1/models").json()["data"]})
            assert names(http) == left
        assert said(http, "second") == "two 1"


def test_changes_need_json_and_a_loader(http: httpx.Client) -> None:
    assert http.post("/v1/models/unload", content=b'{"model": "first"}').status_code == 400
    elsewhere = http.post("/v1/models/unload", json={"model": "first"}, headers={"host": "evil.example"})
    assert elsewhere.status_code == 403
    with running(create_app(ScriptedLLM(ScriptedEngine()))) as url:
        for path, body in [("load", {"model": "x"}), ("reload", {"model": "scripted"})]:
            answer = httpx.post(f"{url}/v1/models/{path}", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_reloadable")


def test_files_that_change_while_they_are_loaded_are_loaded_anew(tmp_path: Path) -> None:
    weights, loading, go = tmp_path / "weights", threading.Event(), threading.Event()
    weights.write_text("1")

    def load(source: Source) -> Servable:
        read = weights.read_text()
        loading.set()
        assert go.wait(20)
        return ScriptedLLM(ScriptedEngine(lambda prompt: read), source.name)

    app = create_app([Source(str(tmp_path), "first")], load=load, watch_seconds=0.02)
    with running(app) as url, httpx.Client(base_url=url, timeout=20) as http:
        assert loading.wait(10)
        weights.write_text("22")
        go.set()
        wait_for(lambda: http.get("/ready").status_code == 200)
        wait_for(lambda: said(http, "first") == "22")


def test_files_that_change_are_loaded_anew(tmp_path: Path, shelf: Shelf) -> None:
    weights = tmp_path / "weights"
    weights.write_text("1")
    app = create_app([Source(str(tmp_path), "first")], load=shelf, watch_seconds=0.02)
    with running(app) as url, httpx.Client(base_url=url, timeout=20) as http:
        wait_for(lambda: http.get("/ready").status_code == 200)
        first = shelf.engines["first"]
        wait_for(lambda: said(http, "first").endswith(" 1"))
        threading.Event().wait(0.2)
        assert shelf.engines["first"] is first  # nothing has changed
        shelf.version = 2
        weights.write_text("22")
        wait_for(lambda: said(http, "first").endswith(" 2"))


def test_a_router_sends_easy_and_hard_requests_to_two_models(shelf: Shelf) -> None:
    router = parse_router("name=auto,small=small,large=large,threshold=0.3,by=text")
    sources = [Source("s", "small"), Source("l", "large")]
    with (
        running(create_app(sources, load=shelf, routers=[router])) as url,
        httpx.Client(base_url=url, timeout=20) as http,
    ):
        wait_for(lambda: http.get("/ready").status_code == 200)
        assert names(http) == ["small", "large", "auto"]
        hard = "Prove, step by step, that 1 + 2 + ... + n equals n(n+1)/2, and derive the formula for squares. " * 3
        found = []
        for text in ("Hi", hard):
            body = {"model": "auto", "messages": [{"role": "user", "content": text}]}
            answer = http.post("/v1/chat/completions", json=body)
            found.append(answer.json()["model"])
            assert answer.headers["x-gristmill-model"] == found[-1]
        assert found == ["small", "large"]
        for path, body, code in (
            ("unload", {"model": "small"}, "model_in_use"),
            ("load", {"model": "x", "name": "auto"}, "name_in_use"),
        ):
            answer = http.post(f"/v1/models/{path}", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, code)
        assert names(http) == ["small", "large", "auto"]
    with pytest.raises(GristmillError, match="not served"):
        create_app([Source("s", "small")], load=shelf, routers=[router])


def test_a_client_that_leaves_ends_the_probe_of_its_request() -> None:
    small, large = ScriptedEngine(), ScriptedEngine()
    router = parse_router("name=auto,small=small,large=large,threshold=0.3")
    app = create_app([ScriptedLLM(small, "small"), ScriptedLLM(large, "large")], routers=[router])
    small.gate.clear()
    with running(app) as url:
        leave(url, "/v1/chat/completions", {"model": "auto", "messages": HI}, when=lambda: small.live)
        wait_for(lambda: app.state.traffic.open == 0)
        small.gate.set()
        wait_for(lambda: small.aborted)
        assert not large.added


def test_workers_of_a_model_with_a_broken_template_are_ended() -> None:
    class Replica:
        about, is_ready, ended = SimpleNamespace(tokenizer=None, max_model_len=8, seats=1, chats=True), True, False

        def close(self) -> None:
            self.ended = True

    Replica.about.tokenizer = byte_tokenizer(template="{% broken")
    replica = Replica()
    model = RoutedModel("first", RoutedEngine([replica]))  # type: ignore[list-item]

    async def main() -> None:
        host = ModelHost([Source("x", "first")], lambda source: model)
        await host.start()
        (failed,) = await host.wait()
        assert "template" in str(failed.error)

    asyncio.run(main())
    assert replica.ended

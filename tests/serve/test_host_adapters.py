"""LoRA adapters come and go while the server runs, its models are replaced and requests are on their way."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gristmill import LLM
from gristmill.model.lora.peft import read_lora, save_lora
from gristmill.serve import host as host_module
from gristmill.serve.access.protection import Protection
from gristmill.serve.app import create_app
from gristmill.serve.host import Source
from gristmill.serve.hosted import Servable
from model.lora.adapters import lora
from serve.running import running, wait_for
from serve.test_host import hold_prompts, names, say
from serve.test_reasoning import HI
from serve.tiny import save_tiny_model


def test_adapters_answer_under_their_own_names(tmp_path: Path) -> None:
    llm = LLM(save_tiny_model(tmp_path / "base"))
    llm.model_name = "tiny"
    config = llm.model.config
    save_lora(lora(1, config), tmp_path / "lora")
    with running(create_app(llm)) as url, httpx.Client(base_url=url, timeout=60) as http:

        def answer(model: str) -> Any:
            body = {"model": model, "messages": HI, "temperature": 0, "max_tokens": 12, "return_token_ids": True}
            found = http.post("/v1/chat/completions", json=body)
            assert found.status_code == 200, found.text
            assert found.json()["model"] == model
            return found.json()["choices"][0]["token_ids"]

        plain = answer("tiny")
        assert say(http, "tiny:style").status_code == 404
        body = {"model": "tiny", "lora_name": "style", "lora_path": str(tmp_path / "lora")}
        assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert names(http) == ["tiny", "tiny:style"]
        styled = answer("tiny:style")
        assert styled != plain == answer("tiny")
        save_lora(lora(2, config), tmp_path / "lora")
        assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert answer("tiny:style") != styled  # nothing of the older one is left in the prefix cache
        wrong = http.post("/v1/load_lora_adapter", json={**body, "lora_path": str(tmp_path)})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "lora_path")
        gone = http.post("/v1/unload_lora_adapter", json={"model": "tiny", "lora_name": "style"})
        assert gone.status_code == 200
        assert names(http) == ["tiny"]
        assert say(http, "tiny:style").status_code == 404


def test_a_reload_keeps_the_adapters_of_now(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    save_lora(lora(1, LLM(base).model.config), tmp_path / "lora")
    source = Source(str(base), "tiny", {"first": str(tmp_path / "lora")})
    app = create_app([source], load=lambda source: LLM(source.model))
    with running(app) as url, httpx.Client(base_url=url, timeout=60) as http:
        wait_for(lambda: http.get("/ready").status_code == 200)
        body = {"model": "tiny", "lora_name": "second", "lora_path": str(tmp_path / "lora")}
        assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
        gone = http.post("/v1/unload_lora_adapter", json={"model": "tiny", "lora_name": "first"})
        assert gone.status_code == 200
        assert http.post("/v1/models/reload", json={"model": "tiny"}).status_code == 200
        assert names(http) == ["tiny", "tiny:second"]
        assert say(http, "tiny:second").status_code == 200


class Library:
    """A server whose one model, tiny, has the adapter style. Loading it anew waits while `gate` is clear."""

    def __init__(self, tmp_path: Path, seconds: float | None) -> None:
        self.base, self.lora = save_tiny_model(tmp_path / "base"), tmp_path / "lora"
        save_lora(lora(1, LLM(self.base).model.config), self.lora)
        self.models: list[LLM] = []
        self.gate, self.waits = threading.Event(), threading.Event()
        self.gate.set()
        source, limit = Source(str(self.base), "tiny", {"style": str(self.lora)}), Protection(request_seconds=seconds)
        self.app = create_app([source], load=self.load, protection=limit)

    def load(self, source: Source) -> Servable:
        if not self.gate.is_set():
            self.waits.set()
        assert self.gate.wait(20)
        self.models.append(LLM(source.model))
        return self.models[-1]

    def change(self, http: httpx.Client, what: str, name: str) -> httpx.Response:
        body = {"model": "tiny", "lora_name": name} | ({"lora_path": str(self.lora)} if what == "load" else {})
        return http.post(f"/v1/{what}_lora_adapter", json=body)


@pytest.fixture
def library(tmp_path: Path, request: pytest.FixtureRequest) -> Library:
    return Library(tmp_path, getattr(request, "param", None))


@pytest.fixture
def reading(library: Library) -> Iterator[httpx.Client]:
    with running(library.app) as url, httpx.Client(base_url=url, timeout=60) as http:
        wait_for(lambda: http.get("/ready").status_code == 200)
        yield http


def test_adapters_that_come_and_go_while_a_model_is_reloaded_are_not_lost(
    library: Library, reading: httpx.Client
) -> None:
    library.gate.clear()
    answers: list[int] = []

    def then(work: Callable[[], httpx.Response]) -> threading.Thread:
        thread = threading.Thread(target=lambda: answers.append(work().status_code))
        thread.start()
        return thread

    threads = [then(lambda: reading.post("/v1/models/reload", json={"model": "tiny"}))]
    assert library.waits.wait(10)
    threads += [then(lambda: library.change(reading, "load", "late"))]
    threads += [then(lambda: library.change(reading, "unload", "style"))]
    wait_for(lambda: library.app.state.traffic.open == 3 or len(answers) == 2)
    library.gate.set()
    for thread in threads:
        thread.join(20)
    assert answers == [200, 200, 200]
    assert names(reading) == ["tiny", "tiny:late"]
    assert say(reading, "tiny:late").status_code == 200


def test_an_adapter_stays_for_a_request_on_its_way_to_the_engine(library: Library, reading: httpx.Client) -> None:
    rendering, rendered = hold_prompts(library.models[0].renderer)
    answers: list[httpx.Response] = []
    reader = threading.Thread(target=lambda: answers.append(say(reading, "tiny:style")))
    reader.start()
    assert rendering.wait(10)
    refused = library.change(reading, "unload", "style")
    rendered.set()
    reader.join(20)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "adapter_in_use")
    assert answers[0].status_code == 200, answers[0].text
    assert library.change(reading, "unload", "style").status_code == 200


def test_a_model_whose_adapter_is_gone_leaves_no_engine_behind(library: Library, reading: httpx.Client) -> None:
    before = set(threading.enumerate())
    shutil.rmtree(library.lora)
    failed = reading.post("/v1/models/reload", json={"model": "tiny"})
    assert (failed.status_code, failed.json()["error"]["code"]) == (400, "load_failed")
    assert not [each for each in threading.enumerate() if each.name == "engine" and each not in before]
    assert say(reading, "tiny:style").status_code == 200


def test_an_adapter_for_a_model_that_leaves_meanwhile(
    library: Library, reading: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, go = threading.Event(), threading.Event()

    def slowly(path: Path, config: Any) -> Any:
        read.set()
        assert go.wait(20)
        return read_lora(path, config)

    monkeypatch.setattr(host_module, "read_lora", slowly)
    answers: list[httpx.Response] = []
    loading = threading.Thread(target=lambda: answers.append(library.change(reading, "load", "late")))
    loading.start()
    assert read.wait(10)
    assert reading.post("/v1/models/unload", json={"model": "tiny"}).status_code == 200
    go.set()
    loading.join(20)
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "server_closing")


@pytest.mark.parametrize("library", [1.0], indirect=True)
def test_a_change_of_adapters_that_outlasts_its_request_is_made(library: Library, reading: httpx.Client) -> None:
    engine, go = library.models[0].engine, threading.Event()
    unload = engine.unload_adapter
    engine.unload_adapter = lambda name: (unload(name), go.wait(20))[0]  # type: ignore[method-assign]
    assert library.change(reading, "unload", "style").status_code == 504
    go.set()
    wait_for(lambda: names(reading) == ["tiny"])

"""A server whose model runs in workers: clients of a killed one get an error they can read, the others their answers;
and a router's name is answered by one of its two models, which the answer names."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gristmill.engine.llm import LLM
from gristmill.serve.app import create_app
from gristmill.serve.routing.routed import RoutedModel
from gristmill.serve.routing.router import RequestRouter, Route
from gristmill.serve.routing.start import start_workers
from serve.routing.test_process import pid
from serve.running import running, wait_for
from serve.tiny import save_tiny_model

PATH = "/v1/chat/completions"
OPTIONS = {"fast_kernels": False}


def body(model: str, **fields: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}], **fields}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def served(directory: Path) -> Iterator[tuple[RoutedModel, httpx.Client]]:
    model = start_workers(str(directory), OPTIONS, workers=2, name="tiny", threads=1)
    with running(create_app(model)) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield model, http


def test_answers_are_those_without_workers(directory: Path, served: tuple[RoutedModel, httpx.Client]) -> None:
    fields = {"max_tokens": 12, "seed": 5, "temperature": 1, "ignore_eos": True}
    alone = LLM(directory, **OPTIONS)  # type: ignore[arg-type]
    alone.model_name = "alone"
    with running(create_app(alone)) as url:
        here = httpx.post(f"{url}{PATH}", json=body("alone", **fields), timeout=60).json()
    there = served[1].post(PATH, json=body("tiny", **fields)).json()
    assert there["choices"] == here["choices"]
    assert there["usage"] == here["usage"]
    refused = served[1].post(PATH, json=body("tiny", max_tokens=500))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")


def test_a_killed_worker_ends_its_streams_with_an_error_event_and_is_replaced(
    served: tuple[RoutedModel, httpx.Client],
) -> None:
    model, http = served
    long = body("tiny", stream=True, n=4, max_tokens=180, ignore_eos=True)
    before = pid(model, 0)
    with http.stream("POST", PATH, json=long) as lost:
        lines = lost.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["object"] == "chat.completion.chunk"
        os.kill(before, signal.SIGSTOP)
        with http.stream("POST", PATH, json=long) as kept:
            os.kill(before, signal.SIGKILL)
            end = [line for line in lines if line][-1]
            error = json.loads(end.removeprefix("data: "))["error"]
            assert (error["code"], error["type"]) == ("worker_died", "server_error")
            assert [line for line in kept.iter_lines() if line][-1] == "data: [DONE]"
    assert http.post(PATH, json=body("tiny", max_tokens=4)).status_code == 200
    wait_for(lambda: model.engine.replicas[0].is_ready and pid(model, 0) != before, 60)
    assert http.post(PATH, json=body("tiny", max_tokens=4)).status_code == 200


def test_without_a_worker_clients_are_told_to_come_again(served: tuple[RoutedModel, httpx.Client]) -> None:
    model, http = served
    for number in range(2):
        os.kill(pid(model, number), signal.SIGKILL)
    wait_for(lambda: not model.engine.is_ready)
    answer = http.post(PATH, json=body("tiny", max_tokens=4))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "worker_died")
    assert answer.headers["retry-after"] == "1"
    wait_for(lambda: model.engine.is_ready, 60)
    assert http.post(PATH, json=body("tiny", max_tokens=4)).status_code == 200


def test_adapters_are_refused_by_name(served: tuple[RoutedModel, httpx.Client]) -> None:
    assert served[1].post(PATH, json=body("tiny:lora")).status_code == 404


@pytest.mark.parametrize(("threshold", "chosen"), [(0.0, "large"), (1.0, "small")])
def test_a_routers_name_is_answered_by_one_of_its_models(directory: Path, threshold: float, chosen: str) -> None:
    models = [LLM(directory, **OPTIONS) for _ in range(2)]  # type: ignore[arg-type]
    models[0].model_name, models[1].model_name = "small", "large"
    router = RequestRouter(name="auto", small=Route("small"), large=Route("large"), threshold=threshold)
    with running(create_app(models, routers=[router])) as url:
        answer = httpx.post(f"{url}{PATH}", json=body("auto", max_tokens=4, ignore_eos=True), timeout=60)
        assert answer.status_code == 200
        assert answer.json()["model"] == answer.headers["x-gristmill-model"] == chosen
        assert 0 <= float(answer.headers["x-gristmill-difficulty"]) <= 1
        assert answer.json()["usage"]["completion_tokens"] == 4

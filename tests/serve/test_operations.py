"""Health, readiness, metrics and the log."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from gristmill import LLM, SamplingParams, __version__
from gristmill.engine.metrics.counters import EngineMetrics
from gristmill.serve.access.logs import JsonFormatter
from gristmill.serve.access.note import Note
from gristmill.serve.access.protection import Protection
from gristmill.serve.access.traffic import Traffic
from gristmill.serve.host import Source
from serve.guarded import guarded, key_file, served
from serve.running import wait_for
from serve.scripted_engine import ScriptedEngine, ScriptedLLM
from serve.tiny import save_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    llm = LLM(str(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")))
    llm.model_name = "tiny"
    return llm


def scrape(http: httpx.Client) -> dict[str, list[Sample]]:
    """Samples by name."""
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(response.text):
        assert family.documentation
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def value(found: dict[str, list[Sample]], name: str, **labels: str) -> float:
    (sample,) = [sample for sample in found[name] if labels.items() <= sample.labels.items()]
    return sample.value


def test_what_prometheus_reads_is_what_happened(tiny: LLM) -> None:
    with served(guarded(Protection(), [tiny, ScriptedLLM(ScriptedEngine())])) as http:
        for stream in (True, False, False):
            assert http.post("/say/tiny", params={"stream": stream}).status_code == 200
        http.post("/say/scripted")
        http.get("/nowhere")
        http.post("/say/none")
        # the last byte of an answer may be here before its request is over there
        wait_for(lambda: value(scrape(http), "gristmill_requests_open") == 1)
        wait_for(lambda: value(scrape(http), "gristmill_engine_running", model="tiny") == 0)
        found = scrape(http)
    counts = EngineMetrics.snapshot(tiny.engine.metrics)
    assert value(found, "gristmill_build_info", version=__version__) == 1
    assert value(found, "gristmill_requests_total", method="POST", route="/say/{model}", status="200") == 4
    assert value(found, "gristmill_requests_total", route="/say/{model}", status="404") == 1
    assert value(found, "gristmill_requests_total", route="", status="404", method="GET") == 1
    assert value(found, "gristmill_request_seconds_count", route="/say/{model}") == 5
    assert value(found, "gristmill_requests_open") == 1  # the scrape itself
    assert value(found, "gristmill_model_requests", model="tiny") == 0
    assert {sample.labels["model"]: sample.value for sample in found["gristmill_model_ready"]} == {
        "tiny": 1,
        "scripted": 1,
    }
    assert value(found, "gristmill_tokens_total", model="tiny", kind="prompt") == 3 * 2
    generated = value(found, "gristmill_tokens_total", model="tiny", kind="completion")
    assert generated == counts["generated_tokens"] == value(found, "gristmill_engine_generated_tokens_total")
    assert value(found, "gristmill_tokens_total", model="scripted", kind="completion") == 8
    assert value(found, "gristmill_time_to_first_token_seconds_count", model="tiny") == 3
    assert value(found, "gristmill_inter_token_seconds_count", model="tiny") <= generated - 3
    # tokens that come together with the first one have no gap before them
    assert value(found, "gristmill_inter_token_seconds_count", model="scripted") <= 7
    for name in ("prompt_tokens", "cached_prompt_tokens", "finished_requests", "steps", "drafted_tokens"):
        assert value(found, f"gristmill_engine_{name}_total", model="tiny") == counts[name]
    assert counts["finished_requests"] == 3
    blocks = [value(found, "gristmill_engine_blocks", state=state) for state in ("used", "cached", "free")]
    assert blocks[0] == 0
    assert sum(blocks) == tiny.engine.pool.num_blocks
    assert value(found, "gristmill_engine_queue_seconds_count", model="tiny") == 3
    assert value(found, "gristmill_engine_forward_seconds_count", model="tiny") == counts["steps"]
    assert value(found, "process_resident_memory_bytes") > 1e6


def test_buckets_of_a_histogram_add_up(tiny: LLM) -> None:
    with served(guarded(Protection(), [tiny])) as http:
        http.post("/say/tiny")
        found = scrape(http)
    for name in [name for name in found if name.endswith("_bucket")]:
        series: dict[str, list[Sample]] = {}
        for sample in found[name]:
            labels = {key: label for key, label in sample.labels.items() if key != "le"}
            series.setdefault(json.dumps(labels), []).append(sample)
        for samples in series.values():
            counts = [sample.value for sample in sorted(samples, key=lambda each: float(each.labels["le"]))]
            assert counts == sorted(counts)
            assert samples[-1].labels["le"] == "+Inf"


def test_strangers_cannot_make_series(tiny: LLM) -> None:
    """Paths, methods and model names that clients think up leave no label behind."""
    with served(guarded(Protection(), [tiny])) as http:
        for number in range(5):
            http.get(f"/{number}")
            http.request(f"X{number}", "/metrics")
            http.post(f"/say/m{number}")
        samples = [sample for family in scrape(http).values() for sample in family]
    assert {sample.labels.get("route", "") for sample in samples} <= {"", "/metrics", "/say/{model}"}
    assert {sample.labels.get("method", "") for sample in samples} <= {"", "GET", "POST"}
    assert {sample.labels.get("model", "") for sample in samples} <= {"", "tiny"}


def test_an_abort_is_counted_and_frees_the_gauges(tiny: LLM) -> None:
    with served(guarded(Protection(), [tiny])) as http, http.stream("POST", "/say/tiny?stream=1") as response:
        next(response.iter_lines())
    engine = tiny.engine
    engine.add("a long one", SamplingParams(max_tokens=100))
    engine.step()
    assert (engine.metrics.running, engine.metrics.blocks_used) == (1, 1)
    for request_id in list(engine._requests):
        engine.abort(request_id)
    assert (engine.metrics.running, engine.metrics.blocks_used) == (0, 0)


def test_those_who_have_a_seat_do_not_wait(tiny: LLM) -> None:
    app = guarded(Protection(max_waiting=3), [tiny])
    with served(app) as http:
        for running, status in ((64 + 2, 200), (64 + 3, 429)):
            app.state.traffic.running["tiny"] = running
            assert http.post("/say/tiny").status_code == status


def test_the_live_view_shows_the_engines_that_the_key_may_use(tiny: LLM, tmp_path: Path) -> None:
    path, secret = key_file(tmp_path, models=["tiny"])
    app = guarded(Protection(keys=path), [tiny])
    with served(app, secret) as http:
        view = http.get("/v1/engine").json()
        assert [engine["model"] for engine in view["engines"]] == ["tiny"]
        assert view["open_requests"] == 1
        assert view["engines"][0]["blocks_free"] + view["engines"][0]["blocks_cached"] == tiny.engine.pool.num_blocks
    path, secret = key_file(tmp_path / "other", models=["none"])
    with served(guarded(Protection(keys=path), [tiny]), secret) as http:
        assert http.get("/v1/engine").json()["engines"] == []


def test_ready_names_what_still_loads() -> None:
    gates = {"first": threading.Event(), "second": threading.Event()}

    def load(source: Source) -> ScriptedLLM:
        assert gates[source.name].wait(60)
        return ScriptedLLM(ScriptedEngine(), source.name)

    with served(guarded(Protection(), [Source("x", "first"), Source("y", "second")], load)) as http:
        early = http.get("/ready")
        assert (early.status_code, early.headers["retry-after"]) == (503, "5")
        assert early.json()["error"]["message"] == "not ready: first (loading), second (loading)"
        assert http.get("/health").json() == {"status": "ok"}
        gates["first"].set()
        wait_for(lambda: "first" not in http.get("/ready").text)
        assert http.get("/ready").json()["error"]["message"] == "not ready: second (loading)"
        assert [value(scrape(http), "gristmill_model_ready", model=name) for name in gates] == [1, 0]
        gates["second"].set()
        wait_for(lambda: http.get("/ready").status_code == 200)
        assert http.get("/ready").json() == {"status": "ready", "models": ["first", "second"]}
        assert http.get("/version").json() == {"version": __version__}


def test_health_ends_when_the_server_closes() -> None:
    app = guarded(Protection())
    with served(app) as http:
        asyncio.run(app.state.host.close(0))
        assert [http.get(place).status_code for place in ("/health", "/ready")] == [503, 503]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[dict[str, object]]]:
    """The log as JSON, and as it is written."""
    caplog.set_level(logging.INFO, "gristmill.serve.connection")
    found: list[dict[str, object]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(json.loads(JsonFormatter().format(record)))

    logger, handler = logging.getLogger("gristmill.serve.connection"), Keep()
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def test_the_log_tells_who_asked_what_and_never_a_secret(lines: list[dict[str, object]], tmp_path: Path) -> None:
    path, secret = key_file(tmp_path)
    with served(guarded(Protection(keys=path)), secret) as http:
        answer = http.post("/say/scripted?token=hidden", content=b'{"prompt": "private"}')
        http.get("/a%0ab%22", headers={"authorization": "Bearer nobody"})
    wait_for(lambda: len(lines) == 2)
    said, refused = lines
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", str(said.pop("time")))
    assert isinstance(said.pop("seconds"), float)
    assert "scripted 2+8 tokens length key ann" in str(said.pop("message"))
    assert said == {
        "level": "INFO",
        "request_id": answer.headers["x-request-id"],
        "method": "POST",
        "path": "/say/scripted",
        "status": 200,
        "key": "ann",
        "model": "scripted",
        "prompt_tokens": 2,
        "completion_tokens": 8,
        "finish_reason": "length",
    }
    assert (refused["status"], refused["key"], refused["path"]) == (401, None, '/a\nb"')
    assert "\n" not in str(refused["message"])
    for word in (secret, "hidden", "private", "nobody", answer.text):
        assert word not in json.dumps([said, lines])


def test_bodies_are_logged_when_asked_for(lines: list[dict[str, object]]) -> None:
    with served(guarded(Protection(log_bodies=True))) as http:
        answer = http.post("/say/scripted?stream=1", content=b'{"prompt": "private"}')
    wait_for(lambda: lines)
    assert lines[0]["request"] == '{"prompt": "private"}'
    assert lines[0]["answer"] == answer.text


def test_a_bug_is_logged_with_its_traceback_and_told_without(lines: list[dict[str, object]]) -> None:
    with served(guarded(Protection())) as http:
        answer = http.get("/fail")
    assert answer.status_code == 500
    assert "a bug" not in answer.text
    wait_for(lambda: len(lines) == 2)
    assert "RuntimeError: a bug" in str(lines[0]["traceback"])
    assert lines[1]["status"] == 500


def test_a_note_counts_every_choice_of_every_prompt() -> None:
    """The totals of a note are those of the engine's outputs, however they were cut into steps."""
    engine, traffic = ScriptedEngine(lambda prompt: prompt * 3), Traffic()
    note = Note(traffic)
    note.serve("m")
    for number, prompt in enumerate(("ab", "cdefg")):
        engine.add(prompt, SamplingParams(n=2, max_tokens=6 - number), request_id=str(number))
    final = {}
    while engine.has_unfinished():
        for output in engine.step():
            note.progress(output)
            final[output.request_id] = output
    note.close()
    prompts = sum(len(output.prompt_token_ids) for output in final.values())
    assert note.prompt_tokens == prompts == 7
    assert note.completion_tokens == sum(len(c.token_ids) for output in final.values() for c in output.outputs) == 22
    assert note.finish_reason == "length"
    assert traffic.tokens == {("m", "prompt"): 7, ("m", "completion"): 22}
    assert (traffic.first_token["m"].number, traffic.between_tokens["m"].number) == (1, 22 - 4)
    assert traffic.running["m"] == 0

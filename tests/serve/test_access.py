"""The gate and the limits, over HTTP."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import ssl
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import Request

from gristmill.errors import DataError, GristmillError, MissingExtra
from gristmill.serve.access.gate import require_admin
from gristmill.serve.access.keys import create_key, revoke_key
from gristmill.serve.access.protection import Protection
from gristmill.serve.app import create_app
from gristmill.serve.batch.batches import call
from gristmill.serve.errors import ApiError
from gristmill.serve.server import Tls
from serve.guarded import guarded, key_file, served
from serve.running import wait_for
from serve.scripted_engine import ScriptedEngine, ScriptedLLM


def error_of(response: httpx.Response) -> tuple[int, str | None]:
    return response.status_code, response.json()["error"]["code"]


def test_without_a_valid_key_nobody_gets_in(tmp_path: Path) -> None:
    path, secret = key_file(tmp_path)
    with served(guarded(Protection(keys=path))) as http:
        for header in ("", "Bearer", "Bearer wrong", f"Basic {secret}", secret, f"Bearer {secret} x"):
            for method, place in (
                ("POST", "/say/scripted"),
                ("GET", "/v1/engine"),
                ("GET", "/metrics"),
                ("PUT", "/no"),
            ):
                response = http.request(method, place, headers={"authorization": header})
                assert error_of(response) == (401, "invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
                assert "x-request-id" in response.headers
                assert secret not in response.text
        for place in ("/health", "/ready", "/version", "/static/page.css"):
            assert http.get(place).status_code == 200
        for near in ("/health/", "/healthy", "/static", "/%2e/metrics", "/metrics?/health", "/v1/engine#/health"):
            assert http.get(near).status_code == 401
        assert http.get("/static/%2e%2e/metrics").status_code == 404
        for scheme in ("Bearer", "bearer"):
            answer = http.post("/say/scripted", headers={"authorization": f"{scheme} {secret}"})
            assert answer.text == "data: Hello th\n\n"


def test_a_revoked_key_is_out_at_once_and_a_broken_file_keeps_all_out(tmp_path: Path) -> None:
    path, secret = key_file(tmp_path)
    with served(guarded(Protection(keys=path)), secret) as http:
        other = create_key(path, "bob")
        assert http.get("/v1/engine").status_code == 200
        revoke_key(path, "ann")
        assert error_of(http.get("/v1/engine")) == (401, "invalid_api_key")
        http.headers["authorization"] = f"Bearer {other}"
        assert http.get("/v1/engine").status_code == 200
        path.write_text("{")
        assert error_of(http.get("/v1/engine")) == (503, "keys_unavailable")
        assert http.get("/health").status_code == 200


def test_a_server_does_not_begin_with_a_bad_key_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        guarded(Protection(keys=tmp_path / "none.json"))


def test_metrics_can_be_opened(tmp_path: Path) -> None:
    path, _ = key_file(tmp_path)
    with served(guarded(Protection(keys=path, metrics_open=True))) as http:
        assert http.get("/metrics").status_code == 200
        assert http.get("/v1/engine").status_code == 401


def test_a_key_sees_its_models_only(tmp_path: Path) -> None:
    path, secret = key_file(tmp_path, models=["second"])
    models = [ScriptedLLM(ScriptedEngine(), name) for name in ("scripted", "second")]
    with served(guarded(Protection(keys=path), models), secret) as http:
        assert http.post("/say/second").status_code == 200
        assert error_of(http.post("/say/scripted")) == (404, "model_not_found")
    with served(create_app(models, protection=Protection(keys=path)), secret) as http:
        assert [card["id"] for card in http.get("/v1/models").json()["data"]] == ["second"]
        assert http.get("/v1/models/second").status_code == 200
        assert error_of(http.get("/v1/models/scripted")) == (404, "model_not_found")


def test_a_package_that_the_server_lacks_is_named(tmp_path: Path) -> None:
    app = guarded(Protection())

    @app.get("/lacking")
    async def lacking() -> None:
        raise MissingExtra("millstone", "constrain")

    with served(app) as http:
        answer = http.get("/lacking")
    assert error_of(answer) == (501, "package_missing")
    assert "millstone" in answer.text
    assert answer.headers["x-should-retry"] == "false"


def test_tokens_are_reserved_and_settled_with_what_was_used(tmp_path: Path) -> None:
    path, secret = key_file(tmp_path, tokens_per_day=100, requests_per_minute=1000)
    with served(guarded(Protection(keys=path)), secret) as http:
        for stream in (False, True, False):  # 90 are reserved, 10 used: 2 of the prompt and 8 generated
            answer = http.post("/say/scripted", params={"reserve": 70, "stream": stream})
            assert answer.status_code == 200
        engine = http.get("/v1/engine").headers
        assert engine["x-ratelimit-limit-tokens"] == "100"
        assert engine["x-ratelimit-remaining-tokens"] == "70"
        assert engine["x-ratelimit-limit-requests"] == "1000"
        assert int(engine["x-ratelimit-remaining-requests"]) >= 997
        busy = http.post("/say/scripted", params={"reserve": 95})
        assert error_of(busy) == (429, "rate_limit_exceeded")
        assert 20_000 < int(busy.headers["retry-after"]) <= 25 / 100 * 86_400
        assert error_of(http.post("/say/scripted", params={"reserve": 101})) == (413, "request_too_large")


def test_requests_above_the_rate_are_refused_and_looking_is_free(tmp_path: Path) -> None:
    path, secret = key_file(tmp_path, requests_per_minute=2)
    with served(guarded(Protection(keys=path)), secret) as http:
        assert [http.post("/say/scripted").status_code for _ in range(3)] == [200, 200, 429]
        assert http.get("/v1/engine").status_code == 200


def test_a_client_that_leaves_pays_for_what_it_got(tmp_path: Path) -> None:
    path, secret = key_file(tmp_path, tokens_per_day=100)
    engine = ScriptedEngine()
    app = guarded(Protection(keys=path), [ScriptedLLM(engine)])
    with served(app, secret) as http:
        engine.step_seconds = 0.2
        with http.stream("POST", "/say/scripted", params={"reserve": 90, "stream": True}) as response:
            next(response.iter_lines())
        wait_for(lambda: engine.aborted)
        wait_for(lambda: app.state.traffic.open == 0)
        left = int(http.get("/v1/engine").headers["x-ratelimit-remaining-tokens"])
        assert 90 <= left < 100
        assert app.state.traffic.left == {"scripted": 1}


def test_batches_use_their_owners_key(tmp_path: Path) -> None:
    """A request from within names its owner in its state, which no client can do, and counts against that key."""
    path, _ = key_file(tmp_path, tokens_per_minute=100)
    app = guarded(Protection(keys=path))

    async def ask(owner: str) -> int:
        return (await call(app, "/say/scripted", b"{}", {"owner": owner})).status

    async def run() -> list[int]:
        await app.state.host.start()
        statuses = [await ask("ann"), await ask("bob")]
        revoke_key(path, "ann")
        statuses.append(await ask("ann"))
        await app.state.host.close(0)
        return statuses

    assert asyncio.run(run()) == [200, 401, 401]


def test_requests_beyond_the_queue_are_told_to_come_again() -> None:
    engine = ScriptedEngine()
    app = guarded(Protection(max_waiting=3), [ScriptedLLM(engine)])
    statuses: list[int] = []
    with served(app) as http:
        engine.gate.clear()

        def ask() -> None:
            statuses.append(http.post("/say/scripted").status_code)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_for(lambda: app.state.traffic.running["scripted"] == 3)
        refused = http.post("/say/scripted")
        engine.gate.set()
        for thread in threads:
            thread.join()
        assert error_of(refused) == (429, "server_busy")
        assert refused.headers["retry-after"] == "1"
        assert statuses == [200] * 3
        assert http.post("/say/scripted").status_code == 200


@pytest.mark.parametrize(
    ("client", "host", "admin", "allowed"),
    [
        ("127.0.0.1", "localhost:8000", None, True),
        ("::1", "[::1]:8000", None, True),
        ("127.0.0.1", "example.org", None, False),  # a page that lets its own name point here
        ("192.168.1.5", "localhost", None, False),
        ("192.168.1.5", "example.org", True, True),
        ("127.0.0.1", "localhost", False, False),
    ],
)
def test_who_may_change_what_is_served(client: str, host: str, admin: bool | None, allowed: bool) -> None:
    key = None if admin is None else SimpleNamespace(admin=admin, name="ann")
    scope: dict[str, Any] = {"type": "http", "client": (client, 1), "scheme": "http", "path": "/", "server": ("s", 1)}
    scope |= {"headers": [(b"host", host.encode())], "state": {"caller": SimpleNamespace(key=key)}, "query_string": b""}
    if allowed:
        require_admin(Request(scope))
    else:
        with pytest.raises(ApiError) as refused:
            require_admin(Request(scope))
        assert (refused.value.status_code, refused.value.code) == (403, "admin_required")


def test_admin_rights_over_http(tmp_path: Path) -> None:
    path, secret = key_file(tmp_path)
    admin = create_key(path, "root", admin=True)
    with served(guarded(Protection(keys=path)), secret) as http:
        assert error_of(http.post("/admin")) == (403, "admin_required")
        assert http.post("/admin", headers={"authorization": f"Bearer {admin}"}).status_code == 200
    with served(guarded(Protection())) as http:
        assert http.post("/admin").status_code == 200


def test_a_request_that_takes_too_long_ends() -> None:
    engine = ScriptedEngine()
    with served(guarded(Protection(request_seconds=1), [ScriptedLLM(engine)])) as http:
        late = http.get("/wait")
        assert error_of(late) == (504, "request_timeout")
        assert late.headers["x-should-retry"] == "false"
        engine.step_seconds = 0.3
        answer = http.post("/say/scripted", params={"stream": True})
        assert answer.status_code == 200
        lines = [line for line in answer.text.split("\n\n") if line]
        assert lines[0] == "data: H"
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "request_timeout"
        wait_for(lambda: engine.aborted)
        assert not engine.live
        engine.step_seconds = 0
        assert http.post("/say/scripted", params={"stream": True}).text.endswith("data: Hello th\n\n")


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    with (
        served(guarded(Protection(body_seconds=0.2))) as http,
        socket.create_connection((http.base_url.host, http.base_url.port or 0), timeout=10) as client,
    ):
        client.sendall(b"POST /say/scripted HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{")
        answer = b""
        while piece := client.recv(4096):  # until the server closes
            answer += piece
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"body_timeout" in answer


@pytest.mark.parametrize("declared", [True, False])
def test_bodies_above_the_limit_are_refused(declared: bool) -> None:
    with served(guarded(Protection(max_body_bytes=1000))) as http:
        content = b"x" * 2000 if declared else iter([b"x" * 2000])
        assert error_of(http.post("/say/scripted", content=content)) == (413, "request_too_large")
        assert http.post("/say/scripted", content=b"x" * 1000).status_code == 200


def test_other_origins_are_let_in_by_name_only(tmp_path: Path) -> None:
    path, secret = key_file(tmp_path)
    ask = {"origin": "https://example.org", "access-control-request-method": "POST"}
    ask["access-control-request-headers"] = "authorization,content-type"
    with served(guarded(Protection(keys=path, cors_origins=("https://example.org",)))) as http:
        fine = http.options("/say/scripted", headers=ask)
        assert (fine.status_code, fine.headers["access-control-allow-origin"]) == (200, "https://example.org")
        assert http.options("/say/scripted", headers=ask | {"origin": "https://evil.org"}).status_code == 400
        refused = http.post("/say/scripted", headers={"origin": "https://example.org"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://example.org"  # or a page could not read it
    with served(guarded(Protection(keys=path))) as http:
        closed = http.options("/say/scripted", headers=ask | {"authorization": f"Bearer {secret}"})
        assert "access-control-allow-origin" not in closed.headers


@pytest.mark.parametrize(
    "wrong",
    [{"cors_origins": ("example.org",)}, {"cors_origins": ("https://a.b/",)}, {"max_waiting": 0}, {"body_seconds": -1}],
)
def test_options_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(GristmillError, match=next(iter(wrong))):
        Protection(**wrong)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes a certificate, is not installed")
    place = tmp_path_factory.mktemp("tls")
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run([*make.split(), *names], cwd=place, check=True, capture_output=True)
    return Tls(place / "cert.pem", place / "key.pem")


def test_tls_is_spoken(certificate: Tls) -> None:
    trusted = ssl.create_default_context(cafile=certificate.certificate)
    with served(guarded(Protection()), tls=certificate) as http:
        assert httpx.get(f"{http.base_url}/health", verify=trusted).json() == {"status": "ok"}
        plain = str(http.base_url).replace("https", "http")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{plain}/health")


def test_tls_files_that_are_no_good_are_told_at_once(certificate: Tls, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("")
    for pair in ((tmp_path / "none", certificate.key), (certificate.certificate, tmp_path / "empty.pem")):
        with pytest.raises(GristmillError, match="TLS with"):
            Tls(*pair)

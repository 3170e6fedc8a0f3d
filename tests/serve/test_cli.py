"""gristmill serve: the command from its start to Ctrl-C."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from gristmill.cli import serve
from gristmill.cli.options import parse
from gristmill.errors import GristmillError, MissingExtra
from gristmill.serve.loading import parse_sources
from serve.running import wait_for
from serve.tiny import save_tiny_model


def listens(url: str) -> bool:
    """Whether there is somebody."""
    place = httpx.URL(url)
    with socket.socket() as client:
        return client.connect_ex((place.host, place.port or 0)) == 0


@pytest.mark.parametrize(("drain_seconds", "presses"), [("1", 1), ("600", 2)])
def test_it_serves_until_ctrl_c_and_tells_open_streams_so(tmp_path: Path, drain_seconds: str, presses: int) -> None:
    model = save_tiny_model(tmp_path / "model")
    command = [
        sys.executable,
        "-m",
        "gristmill",
        "serve",
        f"tiny={model}",
        "--port",
        "0",
        "--drain_seconds",
        drain_seconds,
        "--threads",
        "1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        head = ""
        while "client.chat" not in head:
            line = process.stdout.readline()
            assert line, process.communicate()
            head += line
        url = re.search(r"serving tiny at (http://127\.0\.0\.1:\d+) ", head)
        assert url, head
        assert "WARNING" not in head
        body = {"model": "tiny", "messages": [{"role": "user", "content": "secret"}], "stream": True, "n": 128}
        lines: list[str] = []

        def read() -> None:
            with httpx.stream("POST", f"{url[1]}/v1/chat/completions", json=body | {"ignore_eos": True}) as response:
                lines.extend(response.iter_lines())

        reader = threading.Thread(target=read)
        reader.start()
        wait_for(lambda: lines, 30)
    finally:
        process.send_signal(signal.SIGINT)
        for _ in range(presses - 1):  # a second one does not wait
            wait_for(lambda: not listens(url[1]))
            process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    reader.join(10)
    assert process.returncode == 0
    assert out.endswith("stopped\n")
    assert "Traceback" not in errors
    assert "secret" not in errors
    ending = [line for line in lines if line][-1]
    assert ending == "data: [DONE]" or "server_closing" in ending


def test_a_taken_port_is_told_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_serve", lambda config, listener: pytest.fail("loaded"))
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(GristmillError, match=r"cannot listen .*--port 0"),
    ):
        serve.run(serve.Config(models=["none"], port=taken.getsockname()[1]))


@pytest.mark.parametrize(
    ("host", "port"), [("no.such.host.invalid", 0), ("a" * 70, 0), ("127.0.0.1", 70_000), ("127.0.0.1", -1)]
)
def test_an_impossible_address_is_an_error_of_ours(host: str, port: int) -> None:
    with pytest.raises(GristmillError, match="cannot listen"):
        serve.run(serve.Config(models=["none"], host=host, port=port))


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "myhost"])
def test_other_addresses_than_loopback_are_warned_of(host: str) -> None:
    assert "no authentication" in serve._welcome(serve.Config(models=["m"], host=host), 80, ["m"], chats="m")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_is_not(host: str) -> None:
    assert "no authentication" not in serve._welcome(serve.Config(models=["m"], host=host), 80, ["m"], chats="m")
    assert parse(serve.Config, "gristmill serve", ["m"]).host == "127.0.0.1"


def test_keys_end_the_warning_and_logged_prompts_bring_one() -> None:
    config = serve.Config(models=["m"], host="0.0.0.0", keys=Path("keys.json"), log_bodies=True)
    told = serve._welcome(config, 80, ["m"], chats="m")
    assert "no authentication" not in told
    assert "written into the log" in told
    assert "authorization: Bearer" in told


def test_the_example_fits_the_models() -> None:
    config = serve.Config(models=["e"])
    assert "/v1/score" in serve._welcome(config, 80, ["e"], chats=None)
    assert "completions" not in serve._welcome(config, 80, ["e"], chats=None)
    assert "create(model='m'" in serve._welcome(config, 80, ["e", "m"], chats="m")


def test_several_models_and_adapters_are_words() -> None:
    config = parse(serve.Config, "gristmill serve", ["a", "--port", "0", "b=c", "--adapters", '["b:x=d", "a:y=e"]'])
    sources = parse_sources(config.models, config.adapters)
    assert [(s.name, s.model, dict(s.adapters)) for s in sources] == [("a", "a", {"y": "e"}), ("b", "c", {"x": "d"})]
    assert dict(parse_sources(["only"], ["x=d"])[0].adapters) == {"x": "d"}
    for models, adapters in [(["a", "a"], []), (["a", "b"], ["x=d"]), (["a"], ["b:x=d"]), (["a"], ["x"])]:
        with pytest.raises(GristmillError):
            parse_sources(models, adapters)


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    with pytest.raises(GristmillError, match=r"nothing.*here"):
        serve.run(serve.Config(models=[str(tmp_path / "nothing-here")], port=0))


@pytest.mark.parametrize("option", ["threads", "max_body_mb", "max_num_seqs"])
def test_options_out_of_range_are_named(option: str) -> None:
    with pytest.raises(GristmillError, match=f"--{option} must be at least 1"):
        serve.run(parse(serve.Config, "gristmill serve", ["m", f"--{option}", "0"]))


def test_options_that_cannot_be_applied_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for options, message in [
        (["--watch_seconds", "0"], "--watch_seconds must be above 0"),
        (["--workers", "1", "--adapters", "[a=b]"], "workers take no adapters"),
        (["--data_dir", str(tmp_path / "file")], "file: cannot be used"),
    ]:
        with pytest.raises(GristmillError, match=message):
            serve.run(parse(serve.Config, "gristmill serve", ["m", "--port", "0", *options]))


def test_a_missing_extra_names_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda package: None)
    with pytest.raises(MissingExtra, match=r'pip install "gristmill\[serve\]"'):
        serve.run(serve.Config(models=["none"]))

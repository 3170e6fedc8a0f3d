"""gristmill serve: a model behind the OpenAI HTTP interface, with a chat page."""

from __future__ import annotations

import ipaddress
import json
import logging
import socket
from dataclasses import dataclass
from importlib.util import find_spec

from gristmill.cli.loading import Loading
from gristmill.errors import GristmillError, MissingExtra


@dataclass(frozen=True)
class Config(Loading):
    """Serve a model over the OpenAI HTTP interface, with a chat page at /."""

    model: str
    """An asset name, a Hugging Face directory, a GGUF file or a run directory."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback lets others use the model: there is no authentication yet."""
    port: int = 8000
    """Port to listen on; 0 takes a free one and prints it."""
    name: str | None = None
    """The model's name in requests; by default what you call it here."""
    seed: int = 0
    """Seed of requests that bring none."""
    threads: int | None = None
    """Threads for one forward; by default PyTorch's own choice."""
    max_body_mb: int = 4
    """Largest request body in megabytes; a larger one is answered with 413."""


def run(config: Config) -> int:
    """Serve until interrupted.

    Raises MissingExtra without fastapi or uvicorn, GristmillError when the address cannot be had, and what loading
    the model raises.
    """
    for package in ("fastapi", "uvicorn"):
        if find_spec(package) is None:
            raise MissingExtra(package, "serve")
    for name in ("max_body_mb", "threads"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise GristmillError(f"--{name} must be at least 1, got {value}")
    listener = _listen(config.host, config.port)  # before the model is loaded: a taken port is told at once
    with listener:
        return _serve(config, listener)


def _serve(config: Config, listener: socket.socket) -> int:
    import torch

    from gristmill import LLM
    from gristmill.serve.app import create_app
    from gristmill.serve.server import Server

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    print(f"loading {config.model} ...", flush=True)
    llm = LLM(config.model, **config.loading, seed=config.seed)
    if config.name is not None:
        llm.model_name = config.name
    app = create_app(llm, max_body_bytes=config.max_body_mb * 1_000_000)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("gristmill").setLevel(logging.INFO)
    welcome = _welcome(config.host, listener.getsockname()[1], llm.model_name)
    try:
        Server(app, on_started=lambda: print(welcome, flush=True)).run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn raises it again once it has shut down
        print("stopped")
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet, so that nobody waits for a model that is still loading."""
    if not 0 <= port <= 65_535:  # the resolver would take it modulo 65,536
        raise GristmillError(f"cannot listen on port {port}: ports go from 0 (any free one) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise GristmillError(f"cannot listen on {host!r}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise GristmillError(
            f"cannot listen on {host} port {port}: {error.strerror}. Use --port 0 for a free one."
        ) from error
    return listener


def _welcome(host: str, port: int, name: str) -> str:
    url = f"http://{_reachable(host)}:{port}"
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}]})
    lines = [
        f"serving {name} at {url}   (chat page: {url}/   stop with Ctrl-C)",
        "",
        f"  curl {url}/v1/chat/completions -H 'content-type: application/json' \\",
        f"    -d '{body}'",
        "",
        "  from openai import OpenAI",
        f'  client = OpenAI(base_url="{url}/v1", api_key="none")',
        f"  client.chat.completions.create(model={name!r}, messages=[dict(role='user', content='Hello')])",
        "",
    ]
    if not _is_loopback(host):
        lines.append(f"WARNING: {host} can be reached from other machines, and there is no authentication yet:")
        lines.append("         everyone who reaches the port can use the model. --host 127.0.0.1 keeps it to yourself.")
    return "\n".join(lines)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reachable(host: str) -> str:
    """The host as a client on this machine writes it in a URL."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host

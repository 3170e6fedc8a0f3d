"""gristmill serve: models behind the OpenAI HTTP interface, with a page."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import socket
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from gristmill.cli.loading import Loading
from gristmill.errors import GristmillError, MissingExtra
from gristmill.files import exclusive


@dataclass(frozen=True)
class Config(Loading):
    """Serve models over the OpenAI HTTP interface, with a page at /."""

    models: list[str]
    """Asset names, Hugging Face directories, GGUF files or run directories, of any kinds; NAME=MODEL sets the name in
    requests."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback lets others use the models: give --keys then."""
    port: int = 8000
    """Port to listen on; 0 takes a free one and prints it."""
    adapters: list[str] = dataclasses.field(default_factory=list)
    """LoRA adapters, NAME=DIRECTORY, or MODEL:NAME=DIRECTORY where there are several models; requests ask for
    MODEL:NAME."""
    router: str | None = None
    """A name that sends easy requests to one model and hard ones to another:
    name=auto,small=A,large=B,threshold=0.3[,by=text]; MODEL@BUDGET limits the thinking."""
    workers: int = 0
    """Compute each model that generates in so many processes, which are started again when they die; 0 computes in
    this one."""
    ray: bool = False
    """Let Ray Serve run the workers, on the cluster that RAY_ADDRESS names or on this machine."""
    watch_seconds: float | None = None
    """Look every so many seconds whether a model's files have changed, and load it anew then."""
    max_model_len: int | None = None
    """Most tokens of a prompt and its answer; when not given, the model's context."""
    max_num_seqs: int = 64
    """Most answers that are computed at once; others wait."""
    kv_cache_tokens: int | None = None
    """Tokens whose keys and values fit in memory, over all requests."""
    seed: int = 0
    """Seed of requests that bring none."""
    threads: int | None = None
    """Threads for one forward; by default PyTorch's own choice."""
    keys: Path | None = None
    """File of API keys, as `gristmill keys` writes it; without it everybody may use the server."""
    metrics_open: bool = False
    """Let /metrics be read without a key."""
    max_body_mb: int = 4
    """Largest request body in megabytes; a larger one is answered with 413."""
    max_waiting: int | None = None
    """Most requests that wait for a model; more are answered with 429."""
    request_seconds: float | None = None
    """Longest time for a request; when not given, as long as it takes."""
    cors_origins: list[str] = dataclasses.field(default_factory=list)
    """Origins (https://example.org) whose pages may use the server."""
    content_filter: Path | None = None
    """File of phrases, one a line, that end an answer with the finish reason content_filter."""
    data_dir: Path | None = None
    """Folder of files and batches, which then survive the server."""
    tls_cert: Path | None = None
    """Certificate in PEM, to serve over https; needs --tls_key."""
    tls_key: Path | None = None
    """Private key of the certificate."""
    log_format: Literal["text", "json"] = "text"
    """Form of the log on stderr."""
    log_bodies: bool = False
    """Write prompts and answers into the log too."""
    drain_seconds: int = 30
    """How long running requests may go on after Ctrl-C or SIGTERM; a second one ends them at once."""


def run(config: Config) -> int:
    """Serve until interrupted.

    Raises MissingExtra without a package of the extra, GristmillError when the address cannot be had, and what loading
    the models raises.
    """
    for package in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
        if find_spec(package) is None:
            raise MissingExtra(package, "serve")
    for name in ("max_body_mb", "threads", "max_num_seqs"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise GristmillError(f"--{name} must be at least 1, got {value}")
    for name in ("workers", "drain_seconds"):
        if getattr(config, name) < 0:
            raise GristmillError(f"--{name} must be 0 or more, got {getattr(config, name)}")
    if config.watch_seconds is not None and not config.watch_seconds > 0:
        raise GristmillError(f"--watch_seconds must be above 0, got {config.watch_seconds}")
    if config.adapters and (config.workers or config.ray):
        raise GristmillError("--adapters: workers take no adapters; leave --workers and --ray out")
    if (config.tls_cert is None) != (config.tls_key is None):
        raise GristmillError("--tls_cert and --tls_key belong together")
    listener = _listen(config.host, config.port)  # before a model is loaded: a taken port is told at once
    with listener:
        return _serve(config, listener)


def _serve(config: Config, listener: socket.socket) -> int:
    import torch

    from gristmill.serve.access.logs import configure_logs
    from gristmill.serve.access.protection import Protection
    from gristmill.serve.app import create_app
    from gristmill.serve.loading import Loader, parse_sources
    from gristmill.serve.routing.router import parse_router
    from gristmill.serve.server import Server, Tls

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    sources = parse_sources(config.models, config.adapters)
    limits = {"max_model_len": config.max_model_len, "kv_cache_tokens": config.kv_cache_tokens}
    loader = Loader(
        dtype=config.dtype,
        generation={**config.loading, **limits, "max_num_seqs": config.max_num_seqs, "seed": config.seed},
        sources=sources,
        workers=max(config.workers, 1 if config.ray else 0),
        ray=config.ray,
        threads=config.threads,
    )
    protection = Protection(
        keys=config.keys,
        metrics_open=config.metrics_open,
        max_body_bytes=config.max_body_mb * 1_000_000,
        max_waiting=config.max_waiting,
        request_seconds=config.request_seconds,
        cors_origins=tuple(config.cors_origins),
        log_bodies=config.log_bodies,
    )
    app = create_app(
        sources,
        load=loader,
        protection=protection,
        forbidden=_phrases(config.content_filter),
        data_dir=config.data_dir,
        routers=[] if config.router is None else [parse_router(config.router)],
        watch_seconds=config.watch_seconds,
    )
    if config.data_dir is not None:
        with exclusive(config.data_dir):  # as the app will hold it; from within it this would be a traceback
            pass
    tls = None if config.tls_cert is None or config.tls_key is None else Tls(config.tls_cert, config.tls_key)
    configure_logs(config.log_format)
    port = listener.getsockname()[1]
    names = [source.name for source in sources]
    server = Server(
        app,
        drain_seconds=config.drain_seconds,
        tls=tls,
        on_ready=lambda: print(_welcome(config, port, names, chats=_generating(app)), flush=True),
    )
    print(f"loading {', '.join(source.model for source in sources)} ...", flush=True)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn raises it again once it has shut down
        print("stopped")
    if server.failure is not None:
        raise server.failure
    return 0


def _phrases(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GristmillError(f"--content_filter {path}: {error}") from error
    return [line for line in lines if line.strip()]


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet."""
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


def _generating(app: Any) -> str | None:
    """The first model that generates."""
    slots = app.state.host.slots.items()
    return next((name for name, slot in slots if slot.hosted is not None and slot.hosted.kind == "generate"), None)


def _welcome(config: Config, port: int, names: list[str], *, chats: str | None) -> str:
    """What is told once the models are there. chats: one of them that generates, for the examples."""
    scheme = "http" if config.tls_cert is None else "https"
    url = f"{scheme}://{_reachable(config.host)}:{port}"
    path, asked = "chat/completions", {"model": chats, "messages": [{"role": "user", "content": "Hello"}]}
    program = f"client.chat.completions.create(model={chats!r}, messages=[dict(role='user', content='Hello')])"
    if chats is None:  # encoders and classifiers score pairs, each in its way
        path, asked = "score", {"model": names[0], "text_1": "a mill grinds grain", "text_2": "flour is ground"}
        program = "client.models.list()"
    key = "none" if config.keys is None else "YOUR KEY"
    lines = [
        f"serving {', '.join(names)} at {url}   (page: {url}/   stop with Ctrl-C)",
        "",
        f"  curl {url}/v1/{path} -H 'content-type: application/json' \\",
        *([] if config.keys is None else ["    -H 'authorization: Bearer YOUR KEY' \\"]),
        f"    -d '{json.dumps(asked)}'",
        "",
        "  from openai import OpenAI",
        f'  client = OpenAI(base_url="{url}/v1", api_key="{key}")',
        f"  {program}",
        "",
    ]
    if not _is_loopback(config.host) and config.keys is None:
        lines.append(f"WARNING: {config.host} can be reached from other machines, and there is no authentication:")
        lines.append("         everyone who reaches the port can use the models. Give --keys, or --host 127.0.0.1.")
    if config.log_bodies:
        lines.append("WARNING: prompts and answers are written into the log (--log_bodies).")
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

"""A server under load: many clients at once, some that leave, some that send nonsense, some that read slowly.

    python bench/load.py [--model smollm2-135m] [--streams 200] [--seconds 180] [--tokens 96] [--seed 0]
                         [-- OPTIONS OF gristmill serve]

Starts `gristmill serve` and --streams clients that ask one thing after the other until the time is over: streams and
whole answers of many lengths, a tenth of them left in the middle, a tenth refused. In the last two thirds some clients
read slowly answers that are larger than the buffers between them and the server. The last line is JSON: how the
requests ended, `problems` (must be empty: an unexpected status, a stream without its end, blocks that did not come
back), the gaps between tokens that the ordinary clients saw before and after the slow ones came, and how the memory of
the server grew over the second half.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import finish

QUIET = 1 / 3
"""Of the time, before slow readers come."""
KINDS = {"stream": 55, "whole": 15, "leave stream": 10, "leave whole": 5, "refused": 10, "slow": 5}
PATIENCE = 120.0
WORDS = ("mill", "grain", "flour", "stone", "water", "wheel", "wind")
REFUSED: list[tuple[str, bytes | dict[str, Any], int]] = [
    ("/v1/chat/completions", b"{", 400),
    ("/v1/chat/completions", b"[" * 5000, 400),
    ("/v1/chat/completions", {"messages": []}, 400),
    ("/v1/chat/completions", {"temperature": "hot"}, 400),
    ("/v1/chat/completions", {"temprature": 1}, 400),
    ("/v1/chat/completions", {"max_tokens": 10**12}, 400),
    ("/v1/chat/completions", {"model": "nobody"}, 404),
    ("/v1/completions", {"prompt": [-1]}, 400),
    ("/v1/nothing", {}, 404),
]


@dataclass
class Seen:
    """What the clients saw."""

    ended: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    gaps: dict[str, list[float]] = field(default_factory=lambda: {"without slow": [], "with slow": []})
    tokens: int = 0


class Load:
    """Clients of one server until a time of the monotonic clock."""

    def __init__(self, port: int, model: str, tokens: int, seconds: float, seed: int) -> None:
        self.port, self.model, self.tokens = port, model, tokens
        self.draw, self.seen = random.Random(seed), Seen()
        self.begun = time.monotonic()
        self.slow_from, self.end = self.begun + QUIET * seconds, self.begun + seconds

    async def client(self) -> None:
        """One request after the other."""
        while time.monotonic() < self.end:
            kind = self.draw.choices(list(KINDS), list(KINDS.values()))[0]
            if kind == "slow" and time.monotonic() < self.slow_from:
                kind = "stream"
            try:
                await asyncio.wait_for(self.request(kind), PATIENCE)
                self.seen.ended[kind] += 1
            except (TimeoutError, AssertionError, OSError, EOFError, ValueError) as error:
                self.seen.problems.append(f"{kind}: {type(error).__name__} {str(error)[:200]}")
                await asyncio.sleep(1)

    async def request(self, kind: str) -> None:
        """One request of a kind. Raises AssertionError for an answer that is not the expected one."""
        path, content, expected = self.body(kind)
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        end = socket.socket()
        end.setblocking(False)
        if kind == "slow":
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await asyncio.get_running_loop().sock_connect(end, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=end, limit=4096 if kind == "slow" else 2**16)
        try:
            head = f"POST {path} HTTP/1.1\r\nHost: load\r\nContent-Type: application/json\r\nConnection: close\r\n"
            writer.write(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
            if kind == "leave whole":
                await asyncio.sleep(self.draw.uniform(0, 1))
                return
            headers = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            status = int(headers.split()[1])
            if status != expected:
                raise AssertionError(f"{path} answered {status}: {(await reader.read())[:300]!r}")
            if "event-stream" in headers:
                await self.read_events(reader, kind)
            else:
                answer = json.loads(await reader.read())
                assert ("error" in answer) == (kind == "refused"), answer
        finally:
            writer.transport.abort()  # a client that has what it wants, or leaves, does not wait

    async def read_events(self, reader: asyncio.StreamReader, kind: str) -> None:
        """Read a stream as its kind of client does, and check its end."""
        leave_after = self.draw.randint(0, self.tokens) if kind == "leave stream" else None
        events, last, before = 0, b"", None
        while size := int((await reader.readline()).strip() or b"0", 16):
            last = (await reader.readexactly(size + 2))[:-2]
            events += 1
            now = time.monotonic()
            if kind == "slow":
                await asyncio.sleep(0.05)
            elif before is not None and b'"content":"' in last:
                self.seen.gaps["with slow" if now > self.slow_from else "without slow"].append(now - before)
            before = now
            if events == leave_after:
                return
        self.seen.tokens += events
        if leave_after is None:
            assert last.endswith(b"data: [DONE]\n\n"), f"the stream ended with {last[-200:]!r}"

    def body(self, kind: str) -> tuple[str, bytes | dict[str, Any], int]:
        """Path, body and the status it must get."""
        draw = self.draw
        whole = {"model": self.model, "messages": [{"role": "user", "content": "Hi"}]}
        if kind == "refused":
            path, content, status = draw.choice(REFUSED)
            return path, content if isinstance(content, bytes) else whole | content, status
        text = " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
        fields: dict[str, Any] = {"model": self.model, "max_tokens": int(self.tokens ** draw.random()) + 1}
        fields["stream"] = kind not in ("whole", "leave whole")
        fields["temperature"] = draw.choice([0, 0.7, 1])
        if kind == "slow":
            fields |= {"max_tokens": self.tokens, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}
        elif draw.random() < 0.2:
            return "/v1/completions", fields | {"prompt": text, "n": draw.randint(1, 2)}, 200
        return "/v1/chat/completions", whole | fields | {"messages": [{"role": "user", "content": text}]}, 200


def resident_mib(pid: int) -> float:
    """Memory of a process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    own = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    return own / 1024 + sum(resident_mib(int(child)) for child in children)


def started(model: str, words: list[str]) -> tuple[subprocess.Popen[bytes], int]:
    """The server's process and port, once it answers. Raises RuntimeError when it does not."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "gristmill", "serve", model, "--port", str(port), *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                return process, port
        except OSError:
            time.sleep(0.2)
    process.kill()
    raise RuntimeError(f"{' '.join(command)} did not get ready")


async def run(load: Load, pid: int, streams: int) -> list[tuple[float, float]]:
    """All clients to their ends; (seconds, MiB) of the server, meanwhile."""
    memory = []

    async def watch() -> None:
        while True:
            memory.append((time.monotonic() - load.begun, resident_mib(pid)))
            await asyncio.sleep(0.5)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(load.client() for _ in range(streams)))
    watching.cancel()
    return memory


def slope(points: list[tuple[float, float]]) -> float:
    """MiB per minute over the second half of the time, by least squares."""
    late = [point for point in points if point[0] > points[-1][0] / 2]
    return 60 * statistics.linear_regression(*zip(*late, strict=True)).slope


def quantiles(gaps: list[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(gaps) or [0.0]
    marks = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: round(1000 * ordered[min(int(q * len(ordered)), len(ordered) - 1)], 1) for name, q in marks.items()}


def blocks_lost(port: int, before: dict[str, int], seconds: float = 30) -> list[str]:
    """What is wrong when, after so long, not as few blocks are used as before."""
    deadline = time.monotonic() + seconds
    while (now := used_blocks(port)) != before:
        if time.monotonic() > deadline:
            return [f"{before} blocks were used and {now} are"]
        time.sleep(0.1)
    return []


def used_blocks(port: int) -> dict[str, int]:
    """By model, what the server says of its engines."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/engine", timeout=30) as answer:
        return {engine["model"]: engine["blocks_used"] for engine in json.load(answer)["engines"]}


def main() -> None:
    """Parse the options, load the server, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    for name, value in {"streams": 200, "seconds": 180, "tokens": 96, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("serve", nargs="*", help="options of gristmill serve, after --")
    options = parser.parse_args()
    process, port = started(options.model, options.serve)
    try:
        before = used_blocks(port)
        used, load = os.times(), Load(port, options.model, options.tokens, options.seconds, options.seed)
        memory = asyncio.run(run(load, process.pid, options.streams))
        took, after, seen = time.monotonic() - load.begun, os.times(), load.seen
        problems = seen.problems + blocks_lost(port, before)
    finally:
        process.terminate()
        process.wait(30)
    finish(
        {
            "model": options.model,
            "streams": options.streams,
            "seconds": round(took, 1),
            "ended": dict(seen.ended),
            "problems": problems[:20],
            "problem_count": len(problems),
            "events_per_second": round(seen.tokens / took, 1),
            "gap_ms": {phase: quantiles(gaps) for phase, gaps in seen.gaps.items()},
            "rss_mib": {"first": round(memory[0][1], 1), "last": round(memory[-1][1], 1)},
            "rss_slope_mib_per_minute": round(slope(memory), 2),
            "client_cpu": round((after.user + after.system - used.user - used.system) / took, 3),
            "exit_status": process.returncode,
        }
    )


if __name__ == "__main__":
    main()

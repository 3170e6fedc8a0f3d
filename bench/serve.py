"""What HTTP costs: streams through the server against the same requests in the engine's own loop, in turns.

    python bench/serve.py [--model smollm2-135m] [--quantization w8a8] [--streams 32] [--prompt 64] [--new 128]
                          [--rounds 7] [--first 30]

Both sides use one engine in one process: a turn renders the same conversations, with fresh random text, and generates
--new greedy tokens of each; over HTTP each is a stream, read by a client in another process (bench/serve_client.py).
Then --first turns of one request each measure the time to the first token. The last line is JSON: tokens per second as
medians of turns and their ratio (target: at least 0.95), milliseconds to the first token as medians (target: at most
3 more over HTTP); processor time of the server's event loop per event, which hardly depends on what else
the machine does, and the share of a core that the client took.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import finish

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as `gristmill serve` does, before torch loads

from gristmill import LLM, SamplingParams
from gristmill.serve.app import create_app
from gristmill.serve.server import Server

WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he")
PATH = "/v1/chat/completions"
TARGETS = {"throughput_ratio": 0.95, "extra_first_ms": 3.0}


class Client:
    """bench/serve_client.py in a process of its own."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("serve_client.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, port: int, bodies: list[dict[str, Any]], *, watch: bool) -> dict[str, Any]:
        """The client's answer to a job. Raises RuntimeError when a stream did not end as it should."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        job = {"port": port, "path": PATH, "bodies": bodies, "watch": watch}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        for tail in answer["tails"]:
            if "[DONE]" not in tail or f'"completion_tokens":{bodies[0]["max_tokens"]}' not in tail:
                raise RuntimeError(f"a stream ended with {tail!r}")
        return answer


@contextmanager
def serving(llm: LLM) -> Iterator[tuple[int, int]]:
    """The server around the model, in threads of this process: its port, and the clock of its event loop's thread."""
    ready = threading.Event()
    server = Server(create_app(llm), on_ready=ready.set)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        ready.wait()
        try:
            yield listener.getsockname()[1], time.pthread_getcpuclockid(thread.ident or 0)
        finally:
            server.should_exit = True
            thread.join()


def conversation(draw: random.Random, words: int) -> list[dict[str, str]]:
    """A user's message of random words, about a token each."""
    return [{"role": "user", "content": " ".join(draw.choices(WORDS, k=words))}]


def direct(llm: LLM, conversations: list[list[dict[str, str]]], new: int) -> tuple[float, float]:
    """Seconds to the first token and to the last in the engine's own loop."""
    engine = llm.engine
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    started = time.perf_counter()
    for messages in conversations:
        engine.add(llm.renderer.render_prompt(messages), params)  # type: ignore[arg-type]
    first = None
    while engine.has_unfinished():
        outputs = engine.step()
        if first is None and any(choice.text for output in outputs for choice in output.outputs):
            first = time.perf_counter() - started
    assert first is not None
    return first, time.perf_counter() - started


def over_http(
    client: Client, port: int, llm: LLM, conversations: list[list[dict[str, str]]], new: int, *, watch: bool
) -> dict[str, Any]:
    """The same requests as streams."""
    fields = {"model": llm.model_name, "stream": True, "stream_options": {"include_usage": True}}
    fields |= {"temperature": 0, "max_tokens": new, "ignore_eos": True}
    return client.run(port, [{**fields, "messages": messages} for messages in conversations], watch=watch)


def measure(llm: LLM, options: argparse.Namespace) -> dict[str, Any]:
    """Turns of both sides; each turn has text of its own, as the prefix cache would know it otherwise."""
    draw, client = random.Random(0), Client()
    seconds: dict[str, list[float]] = {"direct": [], "http": []}
    firsts: dict[str, list[float]] = {"direct": [], "http": []}
    cpu, loop = [], []
    for turn in range(options.rounds + 1):
        batches = [[conversation(draw, options.prompt) for _ in range(options.streams)] for _ in range(2)]
        took = direct(llm, batches[0], options.new)[1]
        with serving(llm) as (port, clock):
            used = time.clock_gettime(clock)
            answer = over_http(client, port, llm, batches[1], options.new, watch=False)
            used = time.clock_gettime(clock) - used
        if turn:  # the first warms up
            seconds["direct"].append(took)
            seconds["http"].append(answer["seconds"])
            cpu.append(answer["cpu_seconds"] / answer["seconds"])
            loop.append(1e6 * used / answer["events"])
    for turn in range(options.first + 1):
        pair = [[conversation(draw, options.prompt)] for _ in range(2)]
        took = direct(llm, pair[0], 4)[0]
        with serving(llm) as (port, _):
            over_http(client, port, llm, [conversation(draw, 2)], 1, watch=True)  # the server's own first request
            answer = over_http(client, port, llm, pair[1], 4, watch=True)
        if turn:
            firsts["direct"].append(took)
            firsts["http"].append(answer["first"])
    client.process.kill()
    rest = {"loop_us_per_event": statistics.median(loop), "client_cpu": statistics.median(cpu)}
    figure = figures(seconds, firsts, options.streams * options.new)
    return figure | {name: round(value, 3) for name, value in rest.items()}


def figures(seconds: dict[str, list[float]], firsts: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    """Medians, and the two that have targets."""
    middle = statistics.median
    rates = {side: tokens / middle(values) for side, values in seconds.items()}
    milliseconds = {side: 1000 * middle(values) for side, values in firsts.items()}
    return {
        "tokens_per_second": {side: round(rate, 1) for side, rate in rates.items()},
        "throughput_ratio": round(rates["http"] / rates["direct"], 4),
        "pair_ratios": [round(a / b, 3) for a, b in zip(seconds["direct"], seconds["http"], strict=True)],
        "first_ms": {side: round(value, 2) for side, value in milliseconds.items()},
        "extra_first_ms": round(milliseconds["http"] - milliseconds["direct"], 2),
        "targets": TARGETS,
    }


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quantization")
    for name, value in {"streams": 32, "prompt": 64, "new": 128, "rounds": 7, "first": 30}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    llm = LLM(options.model, quantization=options.quantization)
    finish({"model": options.model, "quantization": options.quantization, **measure(llm, options)})


if __name__ == "__main__":
    main()

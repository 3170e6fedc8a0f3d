"""The figures of bench/engine.py that concern our engine alone, each part in a process of its own.

    python bench/engine_own.py PART WEIGHTS KIND

roofline: decode of one request beside the read bandwidth, measured in turns. startup: from the start of a process to
the first token. prefix: time to the first token, a shared prefix of 1000 tokens cold and warm. stretch: the gap between
tokens of 8 running requests, before and while a prompt of 4096 tokens arrives, for itl_stretch off and 2. overhead:
what scheduling and sampling take of a step of 32 sequences. speculation: n-gram drafts where the text repeats itself,
and where it does not.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import finish
from engine_models import weights

BYTES = {"float32": 4.0, "bfloat16": 2.0, "w8a8": 1.0, "int4": 0.5 + 2 / 32}
"""Of a weight of a matrix, scales of groups among them."""
WARM = 16


def own_figures(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every part for a model, in 8 bits; the roofline in all kinds."""
    quick = ["--quick"] if options.quick else []
    binding = {"OMP_NUM_THREADS": str(options.threads), "OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}

    def part(name: str, kind: str) -> Any:
        path = weights(model, f"gristmill:{kind}", options.directory)
        command = [sys.executable, __file__, name, str(path), kind, *quick]
        started = time.time()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **binding})
        found = json.loads(done.stdout.splitlines()[-1])
        if name == "startup":
            found = {"seconds": round(found["first_token"] - started, 2)}
        print(f"  {name} {kind}: {found}", file=sys.stderr)
        return found

    found = {name: part(name, "w8a8") for name in PARTS if name not in ("roofline", "startup")}
    part("startup", "w8a8")  # fills the caches
    found["startup"] = [part("startup", "w8a8") for _ in range(1 if quick else 3)]
    return found | {f"roofline {kind}": part("roofline", kind) for kind in (["w8a8"] if quick else BYTES)}


def load(path: Path, kind: str, **options: Any) -> Any:
    """The engine with weights of a kind."""
    from gristmill import LLM

    floating = kind in ("float32", "bfloat16")
    return LLM(path, **({"dtype": kind} if floating else {"quantization": kind}), **options)


def roofline(path: Path, kind: str, quick: bool) -> dict[str, Any]:
    """Weight bytes read in a second of decoding, over what reading alone reaches."""
    import torch

    from gristmill.model.accounting import matrix_parameters

    llm, buffer = load(path, kind), torch.ones(1 << 26)
    count, rounds = (4, 1) if quick else (32, 7)
    size = BYTES[kind] * matrix_parameters(llm.engine.config)
    reading, decoding = [], []
    for _ in range(rounds):
        reading.append(buffer.nbytes / min(_seconds(buffer.sum) for _ in range(5)))
        [ids] = _prompts(llm, 1, WARM)
        llm.engine.add(ids, _greedy(count + 2))
        llm.engine.step()
        decoding.append(statistics.median(_seconds(llm.engine.step) for _ in range(count)))
        _finish(llm)
    bandwidth, step = max(reading), statistics.median(decoding)
    return {
        "read_gb_per_s": round(bandwidth / 1e9, 1),
        "weights_mb": round(size / 1e6, 1),
        "tokens_per_s": round(1 / step, 1),
        "share": round(size / step / bandwidth, 3),
    }


def startup(path: Path, kind: str, quick: bool) -> dict[str, Any]:
    """When the first token came, on the system's clock."""
    llm = load(path, kind)
    llm.generate(_prompts(llm, 1, WARM), _greedy(1))
    return {"first_token": time.time()}


def prefix(path: Path, kind: str, quick: bool) -> dict[str, Any]:
    """Milliseconds to the first token after 1000 tokens that are new or known, and 8 new ones."""
    llm = load(path, kind)
    llm.generate(_prompts(llm, 1, 1008), _greedy(1))
    cold, warm = [], []
    for _ in range(1 if quick else 9):
        [shared] = _prompts(llm, 1, 1000)
        for seconds in (cold, warm):
            ids = shared + _prompts(llm, 1, 8)[0]
            seconds.append(_seconds(lambda ids=ids: llm.generate([ids], _greedy(1))))  # type: ignore[misc]
    cold_ms, warm_ms = (round(1e3 * statistics.median(seconds), 2) for seconds in (cold, warm))
    return {"cold_ms": cold_ms, "warm_ms": warm_ms, "ratio": round(cold_ms / warm_ms, 1)}


def stretch(path: Path, kind: str, quick: bool) -> dict[str, Any]:
    """Milliseconds of the gaps between tokens, and the highest and 95th percentile over the idle median."""
    long = 256 if quick else 4096
    found = {}
    for bound in (None, 2.0):
        llm = load(path, kind, itl_stretch=bound, prefix_caching=False, kv_cache_tokens=16_384)
        for ids in _prompts(llm, 8, 128):
            llm.engine.add(ids, _greedy(1800))
        for _ in range(WARM):
            llm.engine.step()
        idle = statistics.median(_seconds(llm.engine.step) for _ in range(4 if quick else 48))
        worst, high = [], []
        for number in range(1 if quick else 4):
            gaps = []
            last = llm.engine.add(_prompts(llm, 1, long)[0], _greedy(1))
            while last in llm.engine._requests:
                gaps.append(_seconds(llm.engine.step))
            if number or quick:  # the first one teaches the pacing what a prompt's token costs
                worst.append(max(gaps))
                high.append(sorted(gaps)[int(0.95 * (len(gaps) - 1))])
        found[f"itl_stretch {bound}"] = {
            "idle_ms": round(1e3 * idle, 2),
            "steps": len(gaps),
            "median": round(statistics.median(gaps) / idle, 2),
            "p95": round(statistics.median(high) / idle, 2),
            "highest": round(statistics.median(worst) / idle, 2),
            "prompt_ms": round(1e3 * sum(gaps), 1),
        }
    return found


def overhead(path: Path, kind: str, quick: bool) -> dict[str, Any]:
    """Share of 32 sequences' steps that scheduling and sampling take, in percent."""
    from gristmill import SamplingParams
    from gristmill.engine.metrics.counters import EngineMetrics

    found = {}
    for name, options in (("greedy", {"temperature": 0.0}), ("top_p", {"temperature": 0.8, "top_p": 0.95, "seed": 1})):
        llm = load(path, kind)
        # text, for a model is sure of its next token there as it never is after random ones: top_p then keeps few
        text = llm.tokenizer.encode(Path(__file__).read_text() * 4)
        for start in range(0, 32 * 64, 64):
            ids = text[start : start + 128]
            llm.engine.add(ids, SamplingParams(max_tokens=128, ignore_eos=True, **options))  # type: ignore[arg-type]
        for _ in range(WARM):
            llm.engine.step()
        llm.engine.metrics = EngineMetrics()
        seconds = [_seconds(llm.engine.step) for _ in range(4 if quick else 96)]
        metrics = llm.engine.metrics
        inside = metrics.forward_seconds.total
        found[name] = {
            "step_ms": round(1e3 * statistics.median(seconds), 2),
            "schedule_percent": round(100 * metrics.schedule_seconds.total / sum(seconds), 2),
            "sample_percent": round(100 * metrics.sample_seconds.total / sum(seconds), 2),
            "outside_forward_percent": round(100 * (1 - inside / sum(seconds)), 2),
        }
    return found


def speculation(path: Path, kind: str, quick: bool) -> dict[str, Any]:
    """Tokens per second of one request with drafts from its own text over without, taking turns."""
    from gristmill import SamplingParams
    from gristmill.engine.metrics.counters import EngineMetrics

    llms = [load(path, kind), load(path, kind, speculation="ngram")]
    phrase = _prompts(llms[0], 1, 24)[0]
    found = {}
    # greedy text of a repeated phrase goes on with it; sampling without a filter never repeats itself
    for name, ids, params in (
        ("repetitive", phrase * 8, {"temperature": 0.0}),
        ("not", _prompts(llms[0], 1, 192)[0], {"temperature": 1.5, "seed": 7}),
    ):
        options = SamplingParams(max_tokens=8 if quick else 128, ignore_eos=True, **params)  # type: ignore[arg-type]
        seconds: list[list[float]] = [[], []]
        texts = [[], []]  # type: ignore[var-annotated]
        llms[1].engine.metrics = EngineMetrics()
        for number in range(2 if quick else 6):
            for side, llm in enumerate(llms):
                started = time.perf_counter()
                texts[side] = llm.generate([ids], options)[0].outputs[0].token_ids
                if number:
                    seconds[side].append(time.perf_counter() - started)
        plain, drafted = map(statistics.median, seconds)
        metrics = llms[1].engine.metrics
        found[name] = {
            "tokens_per_s": round((options.max_tokens or 0) / plain, 1),
            "speedup": round(plain / drafted, 2),
            "same_tokens": list(texts[0]) == list(texts[1]),
            "drafted": metrics.drafted_tokens,
            "acceptance": round(metrics.acceptance or 0.0, 3),
        }
    return found


PARTS: dict[str, Callable[[Path, str, bool], dict[str, Any]]] = {
    part.__name__: part for part in (roofline, startup, prefix, stretch, overhead, speculation)
}
_DRAW = random.Random(0)


def _prompts(llm: Any, number: int, tokens: int) -> list[list[int]]:
    return [[_DRAW.randrange(llm.engine.config.vocab_size) for _ in range(tokens)] for _ in range(number)]


def _greedy(tokens: int) -> Any:
    from gristmill import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def _finish(llm: Any) -> None:
    while llm.engine.has_unfinished():
        llm.engine.step()


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    finish(PARTS[sys.argv[1]](Path(sys.argv[2]), sys.argv[3], "--quick" in sys.argv))

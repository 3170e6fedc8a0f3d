"""Generation speed: our engine against llama.cpp, vLLM, OpenVINO GenAI, CTranslate2 and transformers, same weights.

    python bench/engine.py [--models smollm2-135m llama-1.1b] [--sides gristmill:w8a8 llama:q8_0 ...] [--rounds 5]
                           [--cases 1x128 1x1024 16x128] [--new 128] [--threads 2] [--quick] [--own]

A side is LIBRARY:KIND. Each runs in a process of its own, loads once, and computes only when it is its turn: the
others are stopped. A case is REQUESTS x PROMPT tokens; a turn generates one token after fresh random prompts, then
`--new` of them, so prefill and decode can be told apart. Libraries other than ours and transformers are found through
GRISTMILL_{LLAMA,VLLM,OPENVINO,CTRANSLATE2}_PYTHON, the Python of a virtual environment that has them; one that is not
there is named and left out. --own adds the figures of bench/engine_own.py; --quick is for a look whether all works.
The last line is JSON: tokens per second as medians over rounds, and ratios beside the targets.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import finish
from engine_models import DIRECTORY, MODELS, interpreter, weights
from engine_own import own_figures

SIDES = (
    *("gristmill:float32", "gristmill:bfloat16", "gristmill:w8a8", "gristmill:int4", "transformers:float32"),
    *("llama:f32", "llama:bf16", "llama:q8_0", "llama:q4_0"),
    *("vllm:bfloat16", "openvino:int8", "openvino:int4", "ctranslate2:int8"),
)
EIGHT = "gristmill:w8a8"
BATCHED = [side for side in SIDES if side.partition(":")[0] in ("llama", "vllm", "openvino", "ctranslate2")]
TARGETS = (  # ours, figure, case, theirs (the best of them), at least
    (EIGHT, "decode", "1x128", ["llama:q8_0"], 1.0),
    ("gristmill:int4", "decode", "1x128", ["llama:q4_0"], 0.85),
    ("gristmill:float32", "decode", "1x128", ["llama:f32"], 0.95),
    (EIGHT, "prefill", "1x1024", ["llama:q8_0"], 3.0),
    (EIGHT, "prefill", "1x1024", ["vllm:bfloat16"], 1.5),
    (EIGHT, "throughput", "16x128", BATCHED, 2.0),
    ("gristmill:bfloat16", "throughput", "16x128", ["vllm:bfloat16"], 1.2),
    (EIGHT, "throughput", "1x128", ["transformers:float32"], 6.0),
    ("gristmill:float32", "throughput", "16x128", ["transformers:float32"], 3.0),
)


class Side:
    """A loaded library in a process of its own, stopped but for its turns."""

    def __init__(self, name: str, model: str, threads: int, context: int, directory: Path) -> None:
        self.name, python = name, interpreter(name.partition(":")[0])
        assert python is not None, name
        script = Path(__file__).with_name("engine_sides.py")
        # threads bound to cores of their own, for every library that listens
        binding = {"OMP_NUM_THREADS": str(threads), "OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
        self.log = Path(directory / f"{name.replace(':', '-')}.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, str(script), name, str(weights(model, name, directory)), str(context)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **binding},
                start_new_session=True,
            )
        self._answer()
        self._signal(signal.SIGSTOP)

    def run(self, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        """Seconds as the side measures them, and the tokens. Raises RuntimeError when they are not `new` each."""
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps({"prompts": prompts, "new": new}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self._answer())
        self._signal(signal.SIGSTOP)
        counts = [len(tokens) for tokens in answer["tokens"]]
        if counts != [new] * len(prompts):
            raise RuntimeError(f"{self.name} gave {counts} tokens, not {new} each")
        return answer["seconds"], answer["tokens"]

    def close(self) -> None:
        """End the process and those it started."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"{self.name} has died: {self.log.read_text()[-1500:]}")
        return line

    def _signal(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


@dataclass
class Times:
    """Seconds to one token and to all of them, turn by turn, and the tokens of the last turn."""

    first: list[float] = field(default_factory=list)
    all: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)

    def rates(self, batch: int, prompt: int, new: int) -> dict[str, float]:
        """Tokens per second: of prompts, after the first token, and in all; the spread is (max - min) / median."""
        middle = statistics.median
        found = {"prefill": batch * prompt / middle(self.first), "throughput": batch * new / middle(self.all)}
        gaps = [whole - first for first, whole in zip(self.first, self.all, strict=True)]
        if new > 1:
            found["decode"] = batch * (new - 1) / max(middle(gaps), 1e-9)
        spread = (max(self.all) - min(self.all)) / middle(self.all)
        return {name: round(value, 1) for name, value in found.items()} | {"spread": round(spread, 2)}


@contextmanager
def loaded(model: str, names: list[str], threads: int, context: int, directory: Path) -> Iterator[list[Side]]:
    """The sides that can be had; what is missing or fails is said and left out."""
    sides: list[Side] = []
    try:
        for name in names:
            if interpreter(name.partition(":")[0]) is None:
                variable = f"GRISTMILL_{name.partition(':')[0].upper()}_PYTHON"
                print(f"{name} is left out: {variable} names no Python that has it", file=sys.stderr)
                continue
            started = time.perf_counter()
            try:
                sides.append(Side(name, model, threads, context, directory))
                print(f"{name} is ready after {time.perf_counter() - started:.1f} s", file=sys.stderr)
            except RuntimeError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
        yield sides
    finally:
        for side in sides:
            side.close()


def measure(sides: list[Side], batch: int, prompt: int, new: int, rounds: int, vocabulary: int) -> dict[str, Any]:
    """Rates by side. The sides take turns, each round with prompts of its own, after one unmeasured round; a side that
    fails is taken off the list."""
    draw = random.Random(0)
    times = {side.name: Times() for side in sides}
    for number in range(rounds + 1):
        prompts = [[[draw.randrange(vocabulary) for _ in range(prompt)] for _ in range(batch)] for _ in range(2)]
        for side in list(sides):
            try:
                first, _ = side.run(prompts[0], 1)
                whole, tokens = side.run(prompts[1], new if number else min(new, 8))
            except (RuntimeError, OSError) as error:
                print(f"{side.name} is left out from here: {error}", file=sys.stderr)
                sides.remove(side)
                side.close()
                times.pop(side.name)
                continue
            if number:
                times[side.name].first.append(first)
                times[side.name].all.append(whole)
                times[side.name].tokens = tokens
    found: dict[str, Any] = {}
    for name, taken in times.items():
        found[name] = taken.rates(batch, prompt, new)
        # tokens before a side parts from the first one that computes in float32, of all prompts in the mean
        exact = next((side for side in times if side.endswith((":float32", ":f32"))), next(iter(times)))
        found[name]["agree"] = statistics.mean(map(_common, times[exact].tokens, taken.tokens))
        print(f"  {batch}x{prompt} {name:22} {found[name]}", file=sys.stderr)
    return found


def _common(one: list[int], other: list[int]) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def targets(cases: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[dict[str, Any]]:
    """What was asked for and what was found, where both sides were measured."""
    found = []
    for ours, figure, case, peers, least in TARGETS:
        rates = {side: values[figure] for side, values in cases.get(case, {}).items() if figure in values}
        theirs = {side: rates[side] for side in peers if side in rates}
        if ours in rates and theirs:
            best = max(theirs, key=lambda side: theirs[side])
            ratio = round(rates[ours] / theirs[best], 2)
            found.append({"target": f"{ours} {figure} {case} / {best}", "ratio": ratio, "least": least})
    return found


def compare(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """All cases of a model."""
    cases = [tuple(map(int, case.split("x"))) for case in options.cases]
    context = max(prompt for _, prompt in cases) + options.new + 32
    base = weights(model, "gristmill:float32", options.directory)
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    with loaded(model, options.sides, options.threads, context, options.directory) as sides:
        found = {
            f"{batch}x{prompt}": measure(sides, batch, prompt, options.new, options.rounds, vocabulary)
            for batch, prompt in cases
        }
    for target in (reached := targets(found)):
        print(f"  {target['target']}: {target['ratio']} (target {target['least']})", file=sys.stderr)
    return {"cases": found, "targets": reached}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="of the two, or Hugging Face directories")
    parser.add_argument("--sides", nargs="*", default=list(SIDES))
    parser.add_argument("--cases", nargs="+", default=["1x128", "1x1024", "16x128"])
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="where the models' forms are kept")
    parser.add_argument("--quick", action="store_true", help="one round of small cases")
    parser.add_argument("--own", action="store_true", help="also what concerns our engine alone")
    chosen = parser.parse_args()
    chosen.directory.mkdir(parents=True, exist_ok=True)
    if chosen.quick:
        chosen.cases, chosen.new, chosen.rounds = ["1x8", "2x8"], 4, 1
    results: dict[str, Any] = {}
    for model_name in chosen.models:
        print(model_name, file=sys.stderr)
        results[model_name] = compare(model_name, chosen) if chosen.sides else {}
        if chosen.own:
            results[model_name]["own"] = own_figures(model_name, chosen)
    finish({"bench": "engine", "unit": "tokens/s", "threads": chosen.threads, **results})

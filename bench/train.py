"""Training speed and memory: our loop against transformers' Trainer, a plain transformers loop and a compiled GPT.

A Llama of 15M and a GPT-2 of 124M parameters, 8 x 512 tokens a step, float32 and bfloat16, all four sides taking turns
in one run. Ours is `gristmill.train.loop.train` as users call it, metrics, guards and clipping included. Then the peak
memory of a 15M model with a vocabulary of 49,152, each side in a process of its own.

    python bench/train.py [--models 15M 124M] [--dtypes float32 bfloat16] [--rounds 5] [--compile] [--device cuda]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import finish, paired_seconds, rates
from forward import LENGTH, ROWS, SHAPES, both
from peers_train import SmallGPT, TrainerSteps, compiled_loop, plain_loop

from gristmill.model.config import ModelConfig
from gristmill.model.transformer import Transformer
from gristmill.objectives.causal import CausalLM
from gristmill.tokens.batch import PackedBatch
from gristmill.train.callbacks import Callback, Run
from gristmill.train.config import TrainConfig
from gristmill.train.loop import train

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class OurSteps:
    """`train`, one step at a call: it runs in a thread that waits before every step."""

    def __init__(self, model: Transformer, rows: torch.Tensor, dtype: str, compiled: bool) -> None:
        self._go, self._done, self._over = threading.Semaphore(0), threading.Semaphore(0), False
        batch = PackedBatch.from_segments([(row.cpu().numpy(), None) for row in rows])
        steps = self

        class Turn(Callback):
            def before_step(self, run: Run) -> None:
                steps._go.acquire()

            def after_step(self, run: Run) -> None:
                steps._done.release()
                if steps._over:
                    run.stop("measured")

        class Same:
            batches_per_epoch = 1

            def batch(self, number: int) -> PackedBatch:
                return batch

        config = TrainConfig(steps=1_000_000, precision=dtype, compile=compiled, checkpoint_every=1_000_000)
        self._directory = tempfile.TemporaryDirectory()
        self._thread = threading.Thread(
            target=train,
            args=(model, CausalLM(), Same(), config, Path(self._directory.name)),
            kwargs={"callbacks": [Turn()]},
            daemon=True,
        )
        self._thread.start()

    def __call__(self) -> None:
        self._go.release()
        while not self._done.acquire(timeout=5):
            if not self._thread.is_alive():
                raise RuntimeError("the training thread has died")

    def close(self) -> None:
        """End the thread."""
        self._over = True
        self()
        self._thread.join(timeout=60)
        self._directory.cleanup()


def measure(model: str, dtype: str, rounds: int, compiled: bool, device: str) -> dict[str, Any]:
    """Tokens per second of all sides, and ours over the best of the others."""
    torch._dynamo.reset()
    config = SHAPES[model]()
    rows = torch.randint(config.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    ours, theirs = (side.to(device).train() for side in both(config, torch.float32))
    gpt = small_gpt(config).to(device)
    steps, trainer = (
        OurSteps(ours, rows, dtype, compiled),
        TrainerSteps(both(config, torch.float32)[1], rows, DTYPES[dtype]),
    )
    sides: dict[str, Callable[[], object]] = {
        "gristmill": steps,
        "trainer": trainer,
        "plain_loop": plain_loop(theirs, rows, DTYPES[dtype]),
        "compiled_gpt": compiled_loop(gpt, rows, DTYPES[dtype]),
    }
    speed = rates(paired_seconds(sides, rounds=rounds), ROWS * LENGTH)
    steps.close()
    trainer.close()
    best = max(value for name, value in speed.items() if name != "gristmill")
    result = {**speed, "ratio": round(speed["gristmill"] / best, 3)}
    print(f"{model} {dtype}: {result}", file=sys.stderr)
    return result


def small_gpt(config: ModelConfig) -> SmallGPT:
    """As wide and deep as `config`, with as many feed-forward weights."""
    wide = config.intermediate_size * 3 // 2 if config.feed_forward.gated else config.intermediate_size
    size, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    return SmallGPT(config.vocab_size, size, layers, heads, wide, LENGTH)


def peak_megabytes(side: str) -> float:
    """How far the resident memory of this process grows over three steps, weights left out. Linux only."""
    config = replace(SHAPES["15M"](), vocab_size=49_152, tie_word_embeddings=True)
    ours, theirs = both(config, torch.float32)
    rows = torch.randint(config.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident("VmRSS")
    step = OurSteps(ours, rows, "float32", False) if side == "gristmill" else plain_loop(theirs, rows, torch.float32)
    for _ in range(3):
        step()
    return (_resident("VmHWM") - before) / 1024


def _resident(name: str) -> int:
    """A figure of /proc/self/status in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def memory() -> dict[str, float]:
    """Peak memory of both sides and the ratio."""
    found = {}
    for side in ("gristmill", "transformers"):
        command = [sys.executable, __file__, "--peak", side]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[side] = json.loads(done.stdout.splitlines()[-1])["megabytes"]
    return {**found, "ratio": round(found["gristmill"] / found["transformers"], 3)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compile our blocks, too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak", choices=["gristmill", "transformers"], help="only the peak memory of one side")
    options = parser.parse_args()
    if options.peak:
        finish({"megabytes": round(peak_megabytes(options.peak), 1)})
        sys.exit()
    results: dict[str, Any] = {
        f"{model} {dtype}": measure(model, dtype, options.rounds, options.compile, options.device)
        for model in options.models
        for dtype in options.dtypes
    }
    results["peak_megabytes_49k_vocabulary"] = memory()
    finish({"bench": "train", "unit": "tokens/s", "threads": torch.get_num_threads(), **results})

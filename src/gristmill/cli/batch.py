"""gristmill batch: answer a file of prompts."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from gristmill.cli.loading import Loading
from gristmill.cli.sampling import Sampling


@dataclass(frozen=True)
class Config(Loading, Sampling):
    """Answer every line of a JSONL file (prompt or messages, perhaps an id and sampling parameters) with a line of
    another, in the same order. Stopped and started again, it goes on where it stood."""

    input: str
    """JSONL file of requests."""
    output: str
    """JSONL file of answers; what is there already is kept."""
    model: str
    """Asset name, Hugging Face directory, GGUF file or run directory."""
    in_flight: int = 256
    """Most lines read ahead of the oldest unfinished one."""


def run(config: Config) -> int:
    """Write the answers. Returns 0, 1 when a line could not be served, or 130 when stopped."""
    from gristmill.engine.llm import LLM
    from gristmill.engine.offline import run_batch

    llm = LLM(config.model, **config.loading)
    output = Path(config.output)
    try:
        counts = run_batch(
            llm,
            Path(config.input),
            output,
            config.params(room=llm.max_model_len),
            in_flight=config.in_flight,
            show_progress=True,
        )
    except KeyboardInterrupt:
        print(f"\nStopped. The same command goes on from here ({output}).", file=sys.stderr)
        return 130
    told = f"{counts.lines} lines in {output}, {counts.kept} of them from before"
    print(f"{told}, {counts.errors} with an error" if counts.errors else told)
    return 1 if counts.errors else 0

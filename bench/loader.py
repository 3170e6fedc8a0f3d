"""Speed of the loader: ours against the usual random crops of one memory-mapped stream of tokens.

Both read the same shard of a real corpus (the Wikipedia summaries, eight times over, about 12 million tokens in the
page cache) in one process and one thread, 16,384 tokens a batch. Theirs draws crops of the row length and copies
inputs and targets out; it sees documents through each other and misses some tokens. Ours packs documents, whole and
each once an epoch, and also makes their positions and boundaries. Then the share of a training step of the `tiny`
preset that a batch takes, and the same batches from one worker process.

    python bench/loader.py [rounds]
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import finish, paired_seconds, rates

from gristmill import assets
from gristmill.corpus.loader import PackedLoader
from gristmill.corpus.shards import TokenDataset, write_shards
from gristmill.corpus.sources import read_wikipedia_summaries
from gristmill.corpus.workers import Prefetched
from gristmill.model.presets import preset
from gristmill.model.transformer import Transformer
from gristmill.objectives.causal import CausalLM
from gristmill.tokens.train import train_bpe
from gristmill.train.loop import loss_and_gradients
from gristmill.train.optimisers import make_optimiser

TOKENS, BATCHES, REPEATS = 16_384, 200, 8


def write_corpus(directory: Path) -> TokenDataset:
    """One shard of real documents, of the tiny preset's vocabulary."""
    texts = [document.text for document in read_wikipedia_summaries(assets.get("wikipedia-summaries"))]
    tokenizer = train_bpe(texts[::10], preset("tiny").vocab_size)
    ids = tokenizer.encode_batch(texts, special_tokens=False) * REPEATS
    return write_shards(
        ((item, None) for item in ids if item),
        directory,
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash="bench",
        eos_token_id=tokenizer.eos_token_id,
    )


def random_crops(file: Path, row: int) -> Callable[[], object]:
    """The common reader: open, draw starts, copy each crop twice."""

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        data = np.memmap(file, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - row, (TOKENS // row,))
        inputs = torch.stack([torch.from_numpy(data[i : i + row].astype(np.int64)) for i in starts])
        targets = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + row].astype(np.int64)) for i in starts])
        return inputs, targets

    return batch


def many(batch: Callable[[], object]) -> Callable[[], None]:
    """`BATCHES` calls, because one alone is too short to time."""

    def work() -> None:
        for _ in range(BATCHES):
            batch()

    return work


def next_batch(loader: PackedLoader | Prefetched) -> Callable[[], object]:
    """The batches of a loader, one a call."""
    numbers = count()
    return lambda: loader.batch(next(numbers))


def measure(source: TokenDataset, row: int, rounds: int) -> dict[str, Any]:
    """Tokens per second of both sides at one row length."""
    loader = PackedLoader(source, row_length=row, rows_per_batch=TOKENS // row, seed=0)
    with Prefetched(loader, workers=1) as ahead:
        sides = {
            "gristmill": many(next_batch(loader)),
            "gristmill, one worker": many(next_batch(ahead)),
            "random crops": many(random_crops(source.directory / "shard-00000.bin", row)),
        }
        speed = rates(paired_seconds(sides, rounds=rounds), BATCHES * TOKENS)
    speed = {name: round(value * (loader.utilisation if "grist" in name else 1.0)) for name, value in speed.items()}
    print(f"rows of {row}: {speed}", file=sys.stderr)
    ratio = round(speed["gristmill"] / speed["random crops"], 2)
    return {**speed, "ratio": ratio, "utilisation": round(loader.utilisation, 4)}


def share_of_a_step(source: TokenDataset, rounds: int) -> float:
    """Seconds of a batch over seconds of a training step on it."""
    loader = PackedLoader(source, row_length=512, rows_per_batch=TOKENS // 512, seed=0)
    model = Transformer(preset("tiny", vocab_size=source.vocab_size))
    model.initialise(0)
    optimiser = make_optimiser(model, "adamw", learning_rate=1e-3)
    load, batch = next_batch(loader), loader.batch(0)

    def step() -> None:
        loss_and_gradients(model, CausalLM(), [batch], "float32")
        optimiser.step()
        optimiser.zero_grad()

    seconds = paired_seconds({"load": load, "step": step}, rounds=rounds)
    return statistics.median(seconds["load"]) / statistics.median(seconds["step"])


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as folder:
        source = write_corpus(Path(folder) / "shards")
        result: dict[str, Any] = {f"rows of {row}": measure(source, row, rounds) for row in (512, 2048)}
        result["share of a tiny step"] = round(share_of_a_step(source, rounds), 6)
    finish({"bench": "loader", "unit": "tokens/s", "tokens": source.tokens, "documents": len(source), **result})

"""Training speed of the quickstart's model: ours against a plain transformers + AdamW loop of the same shape.

Both sides train a decoder of the `tiny` preset on the same documents, 4096 tokens a step, with fused AdamW. Ours packs
documents without letting them see each other; theirs, as usual, cuts the same token stream into rows of 512.

    python bench/train_small.py [rounds]
"""

import sys

import numpy as np
import torch
from common import finish, paired_seconds, rates
from transformers import LlamaConfig, LlamaForCausalLM

from gristmill.model.presets import preset
from gristmill.model.transformer import Transformer
from gristmill.objectives.causal import CausalLM
from gristmill.tokens.batch import PackedBatch
from gristmill.train.loop import loss_and_gradients
from gristmill.train.optimisers import make_optimiser

TOKENS, ROW = 4096, 512


def documents(vocab_size: int) -> list[np.ndarray]:
    """Random tokens in documents as long as encyclopedia summaries are (median 130), 4096 tokens in all."""
    random = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < TOKENS:
        lengths.append(min(int(random.lognormal(4.87, 0.55)), ROW, TOKENS - sum(lengths)))
    return [random.integers(0, vocab_size, max(length, 1)) for length in lengths]


def measure(precision: str, rounds: int) -> dict[str, float]:
    """Tokens per second of both sides."""
    config = preset("tiny")
    texts = documents(config.vocab_size)
    batch = PackedBatch.from_segments([(text, None) for text in texts])
    ours = Transformer(config)
    ours.initialise(0)
    our_optimiser = make_optimiser(ours, "adamw", learning_rate=1e-3)

    def our_step() -> None:
        loss_and_gradients(ours, CausalLM(), [batch], precision)
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        our_optimiser.step()
        our_optimiser.zero_grad()

    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            tie_word_embeddings=True,
        )
    )
    their_optimiser = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    rows = torch.from_numpy(np.concatenate(texts)).view(-1, ROW)

    def their_step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = theirs(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        their_optimiser.step()
        their_optimiser.zero_grad()

    seconds = paired_seconds({"gristmill": our_step, "transformers": their_step}, rounds=rounds)
    speed = rates(seconds, TOKENS)
    print(f"{precision}: {speed}", file=sys.stderr)
    return {**speed, "ratio": round(speed["gristmill"] / speed["transformers"], 3)}


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    result = {precision: measure(precision, rounds) for precision in ("float32", "bfloat16")}
    finish({"bench": "train_small", "unit": "tokens/s", "threads": torch.get_num_threads(), **result})

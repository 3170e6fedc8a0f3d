"""One small model, one, two, four and eight languages: what each more of them costs the first.

    python examples/languages.py                 # about a minute on two cores

The languages are made up: each is its own chain of which token follows which, over one shared vocabulary, and a
document begins with the token of its language. Prints a Markdown table and writes the figures as JSON.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from gristmill.files import write_json
from gristmill.model.config import ModelConfig
from gristmill.model.transformer import Transformer
from gristmill.objectives.causal import CausalLM
from gristmill.train.language_sweep import Language, language_sweep, sweep_markdown

WORDS, MOST = 48, 8
"""Words of the shared vocabulary, and languages; the language tokens follow the words."""
LENGTH = 24
COUNTS, SEEDS, STEPS = (1, 2, 4, 8), (0, 1, 2), 400


def make_language(number: int, seed: int = 0, documents: int = 1000) -> Language:
    """A chain in which every word is mostly followed by a few others of its own."""
    draw = np.random.default_rng([seed, number])
    follows = draw.dirichlet(np.full(WORDS, 0.05), size=WORDS)
    rows = np.empty((documents, LENGTH), dtype=np.int64)
    rows[:, 0] = WORDS + number
    rows[:, 1] = draw.integers(WORDS, size=documents)
    for place in range(2, LENGTH):
        reached = follows.cumsum(axis=1)[rows[:, place - 1]] < draw.random((documents, 1))
        rows[:, place] = np.minimum(reached.sum(axis=1), WORDS - 1)
    held_out = documents // 10
    return Language(f"language {number + 1}", list(rows[held_out:]), list(rows[:held_out]))


def build(seed: int) -> Transformer:
    """The model, the same size for any number of languages."""
    model = Transformer(
        ModelConfig(
            vocab_size=WORDS + MOST,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=64,
            max_position_embeddings=LENGTH,
        )
    )
    model.initialise(seed)
    return model


def main() -> None:
    """Run the sweep, print and write it."""
    torch.set_num_threads(1)  # products this small are slower on more
    languages = [make_language(number) for number in range(MOST)]
    results = language_sweep(build, CausalLM(), languages, COUNTS, steps=STEPS, seeds=SEEDS)
    out = Path("languages.json")
    write_json(out, {"results": [dataclasses.asdict(result) for result in results]})
    print(sweep_markdown(results))
    print(f"\nNats per held-out token, mean and standard error over seeds. {out}")


if __name__ == "__main__":
    main()

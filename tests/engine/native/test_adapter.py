"""Adapters in the native step against the PyTorch runner over the same packed weights, and their rows' independence."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill.engine.memory.paged_cache import Chunk
from gristmill.engine.native import build
from gristmill.engine.native.runner import NativeRunner
from gristmill.engine.runner import AdaptingRunner, TorchRunner
from gristmill.model.config import AttentionConfig, FeedForwardConfig, LayerConfig
from gristmill.model.lora.low_rank import Lora
from model import tiny
from model.lora import adapters

pytestmark = [
    pytest.mark.peer,  # needs a C++ compiler
    pytest.mark.skipif(build.native_refusal() is not None, reason=str(build.native_refusal())),
]
KINDS = ["float32", "bfloat16", "int8", "int8_weights", "int4"]
BLOCKS, SIZE = 24, 16


def run(
    runner: AdaptingRunner, loras: Sequence[Lora | None], lengths: Sequence[int], sizes: Sequence[int], seed: int = 0
) -> list[Tensor]:
    """Logits of random sequences, each with its adapter, which are computed in chunks of random sizes together."""
    forms = [None if lora is None else runner.adapt(lora) for lora in loras]
    draw, done = random.Random(seed), [0] * len(lengths)
    rows: list[list[Tensor]] = [[] for _ in lengths]
    while done != list(lengths):
        ids, chunks, places = [], [], []
        for place, length in enumerate(lengths):
            count = min(draw.choice(sizes), length - done[place])
            if count:
                ids += tiny.ids(length, 10 + length, 200)[done[place] : done[place] + count].tolist()
                table = range(place * 5, place * 5 + 5)
                chunks.append(Chunk(table, done[place], count, adapter=forms[place]))
                places.append((place, count))
                done[place] += count
        logits = runner.logits(runner.hidden_states(ids, chunks)).clone()
        for (place, _), part in zip(places, logits.split([count for _, count in places]), strict=True):
            rows[place].append(part)
    return [torch.cat(parts) for parts in rows]


def native(kind: Any = "float32", threads: int = 2, release: bool = False, **changes: Any) -> NativeRunner:
    return NativeRunner(
        tiny.model(**changes), kind, num_blocks=BLOCKS, block_size=SIZE, threads=threads, release=release
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_is_that_of_the_pytorch_runner_for_all_weights(kind: str) -> None:
    runner = native(kind, release=True)
    reference = TorchRunner(runner.model, num_blocks=BLOCKS, block_size=SIZE, kv_dtype=torch.float32)
    loras = [adapters.lora(0, ranks=(1, 4, 9, 17)), None, adapters.lora(1, names=["k_proj", "up_proj"]), None]
    found, expected = (run(one, loras, [70, 9, 33, 1], [1, 2, 50]) for one in (runner, reference))
    # rounded activations may fall to the other side of a half
    bound = 1e-5 if kind in ("float32", "int8_weights") else 0.03
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < bound
    plain = run(runner, [None] * 4, [70, 9, 33, 1], [50])
    changed = [float((ours - other).norm() / other.norm()) > 0.2 for ours, other in zip(found, plain, strict=True)]
    assert changed == [lora is not None for lora in loras]


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": AttentionConfig(qkv_bias=True, output_bias=True, qk_norm="head")},
        {"feed_forward": FeedForwardConfig(activation="gelu", bias=True)},
        {"layers": (LayerConfig(), LayerConfig(weights_from=0), LayerConfig())},
        {
            "hidden_size": 40,
            "intermediate_size": 33,
            "head_dim": 10,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
        },
    ],
    ids=["biases and norms", "gelu", "shared layers", "odd sizes"],
)
def test_architectures(changes: dict[str, Any]) -> None:
    runner = native(**changes)
    config = runner.config
    loras = [adapters.lora(0, config, ranks=(5, 2)), adapters.lora(3, config)]
    if "layers" in changes:  # a shared block is adapted wherever it stands; our modules are two
        loras = [Lora(config, {k: v for k, v in lora.parts.items() if "layers.2" not in k}) for lora in loras]
    reference = TorchRunner(runner.model, num_blocks=BLOCKS, block_size=SIZE, kv_dtype=torch.float32)
    for ours, theirs in zip(*(run(one, loras, [40, 20], [3, 30]) for one in (runner, reference)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.integers(1, 79), st.sampled_from([None, 0, 1])), min_size=1, max_size=4),
    st.sampled_from(KINDS), st.integers(0, 99),
)  # fmt: skip
def test_a_token_does_not_depend_on_others_adapters_chunks_or_threads(
    batch: list[tuple[int, int | None]], kind: str, seed: int
) -> None:
    loras = [adapters.lora(0, ranks=(8, 3)), adapters.lora(1, ranks=(2,), names=["q_proj", "down_proj"])]
    chosen = [None if which is None else loras[which] for _, which in batch]
    mixed = run(native(kind), chosen, [length for length, _ in batch], [1, 3, 60], seed)
    alone = native(kind, threads=1)
    for (length, _), lora, found in zip(batch, chosen, mixed, strict=True):
        assert torch.equal(found, run(alone, [lora], [length], [length])[0])


def test_a_step_after_one_with_adapters_has_none() -> None:
    runner = native()
    before = run(runner, [None], [20], [20])[0]
    run(runner, [adapters.lora(0)], [20], [20])
    assert torch.equal(run(runner, [None], [20], [20])[0], before)

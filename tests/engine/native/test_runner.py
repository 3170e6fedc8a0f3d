"""The native step against TorchRunner and the model itself: every kind of weights and cache, over ragged batches."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill.engine.memory.paged_cache import Chunk
from gristmill.engine.native import build
from gristmill.engine.native.decoder import native_refusal
from gristmill.engine.native.linear import NativeLinear
from gristmill.engine.native.runner import NativeRunner
from gristmill.engine.runner import Runner, TorchRunner
from gristmill.errors import RequestError
from gristmill.model.config import (
    AttentionConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    LayerConfig,
    NormConfig,
    PositionConfig,
    RopeConfig,
)
from gristmill.model.positions.scaling import DynamicNTKScaling, Llama3Scaling
from gristmill.model.quantised.linear import Int4Linear
from gristmill.model.quantised.quantise import quantise_model
from gristmill.model.transformer import Transformer
from model import tiny

pytestmark = [
    pytest.mark.peer,  # needs a C++ compiler
    pytest.mark.skipif(build.native_refusal() is not None, reason=str(build.native_refusal())),
]
TOKENS = 160
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied, head bias": {"tie_word_embeddings": False, "head_bias": True, "vocab_size": 211},
    "biases, qk norm": {
        "attention": AttentionConfig(qkv_bias=True, output_bias=True, qk_norm="head", scale=0.4),
        "feed_forward": FeedForwardConfig(activation="gelu", bias=True),
    },
    "gemma": {
        "norm": NormConfig(unit_offset=True, eps=1e-6),
        "feed_forward": FeedForwardConfig(activation="gelu_tanh"),
        "embedding": EmbeddingConfig(scale=6.9),
        "logit_softcap": 8.0,
        "logit_scale": 0.5,
    },
    "windows, local rotation, none": {
        "num_hidden_layers": 4,
        "layers": (
            LayerConfig(rotary="none", input_norm=False),
            LayerConfig(window=20, rotary="local"),
            LayerConfig(),
            LayerConfig(window=1),
        ),
        "positions": PositionConfig(rope=RopeConfig(theta=5000.0), local_rope=RopeConfig(theta=50.0, dim=8)),
    },
    "shared layers": {"layers": (LayerConfig(), LayerConfig(weights_from=0), LayerConfig())},
    "heads of 64": {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64},
    "heads of 128": {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 128, "hidden_size": 40},
    "scaled rotation": {
        "positions": PositionConfig(
            rope=RopeConfig(scaling=Llama3Scaling(
                factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64,
            ))
        )
    },
    "rotation by length": {
        "positions": PositionConfig(
            rope=RopeConfig(scaling=DynamicNTKScaling(factor=4.0, original_max_position_embeddings=32))
        )
    },
}  # fmt: skip


def make(name: str) -> Transformer:
    return tiny.model(**{"max_position_embeddings": 512, **SHAPES[name]})


def ragged(runners: list[Runner], lengths: list[int], block_size: int, seed: int, sizes: list[int]) -> list[Tensor]:
    """Logits of all tokens of random sequences for each runner, computed in the same random batches."""
    draw = random.Random(seed)
    sequences = [tiny.ids(length, seed + place, 200).tolist() for place, length in enumerate(lengths)]
    free = draw.sample(range(blocks_for(block_size)), blocks_for(block_size))
    tables = [[free.pop() for _ in range(-(-length // block_size))] for length in lengths]
    found: list[list[Tensor]] = [[torch.empty(0)] * sum(lengths) for _ in runners]
    done = [0] * len(lengths)
    while done != lengths:
        ids, chunks, places = [], [], []
        for place, sequence in enumerate(sequences):
            start = done[place]
            count = min(draw.choice(sizes), lengths[place] - start)
            if count:
                ids += sequence[start : start + count]
                chunks.append(Chunk(tables[place], start, count))
                places += [sum(lengths[:place]) + p for p in range(start, start + count)]
                done[place] = start + count
        for runner, rows in zip(runners, found, strict=True):
            hidden = runner.hidden_states(ids, chunks).clone()
            for place, row in zip(places, runner.logits(hidden).clone(), strict=True):
                rows[place] = row
    return [torch.stack(rows) for rows in found]


def blocks_for(block_size: int) -> int:
    return 3 * (TOKENS // block_size + 1)


def native(model: Transformer, kind: Any, block_size: int = 16, **options: Any) -> NativeRunner:
    return NativeRunner(model, kind, num_blocks=blocks_for(block_size), block_size=block_size, **options)


def reference(model: Transformer, block_size: int = 16, kv_dtype: torch.dtype = torch.float32) -> TorchRunner:
    return TorchRunner(model, num_blocks=blocks_for(block_size), block_size=block_size, kv_dtype=kv_dtype)


@pytest.mark.parametrize("name", SHAPES)
def test_float32_equals_the_model_in_any_batch(name: str) -> None:
    model, block_size = make(name), {"plain": 1, "gemma": 3}.get(name, 16)
    assert native_refusal(model) is None
    expected, found = ragged(
        [reference(model, block_size), native(model, "float32", block_size)], [150, 7, 61], block_size, 1, [1, 2, 9, 70]
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_long_prompt_and_what_follows_equal_the_model() -> None:
    """Beyond the first table of rotations, and many tiles of keys."""
    model, ids = tiny.model(num_hidden_layers=1, max_position_embeddings=2048), tiny.ids(1300)
    runner = NativeRunner(model, "float32", num_blocks=90, block_size=16)
    parts = []
    for begin, end in ((0, 40), (40, 1000), (1000, 1299), (1299, 1300)):
        hidden = runner.hidden_states(ids[begin:end].tolist(), [Chunk(range(5, 90), begin, end - begin)])
        parts.append(runner.logits(hidden).clone())
    torch.testing.assert_close(torch.cat(parts), model(ids), rtol=1e-4, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, TOKENS), min_size=1, max_size=3), st.sampled_from([1, 3, 16]), st.integers(0, 99),
    st.sampled_from(["float32", "bfloat16", "int8", "int8_weights", "int4"]), st.sampled_from([0, 1, 2]),
)  # fmt: skip
def test_a_token_does_not_depend_on_batch_chunks_blocks_or_threads(
    lengths: list[int], block_size: int, seed: int, kind: str, cache: int
) -> None:
    kv_dtype = (torch.float32, torch.bfloat16, torch.int8)[cache]
    runners: list[Runner] = [native(make("plain"), kind, block_size, kv_dtype=kv_dtype, threads=2, group_size=32)]
    (mixed,) = ragged(runners, lengths, block_size, seed, [1, 1, 3, 40])
    alone = native(make("plain"), kind, kv_dtype=kv_dtype, threads=1, group_size=32)
    row = 0
    for place, length in enumerate(lengths):
        ids = tiny.ids(length, seed + place, 200).tolist()
        logits = alone.logits(alone.hidden_states(ids, [Chunk(range(11), 0, length)]))
        assert torch.equal(mixed[row : row + length], logits)
        row += length


def test_threads_that_take_rows_of_their_own_change_nothing() -> None:
    ids = tiny.ids(TOKENS).tolist()
    few, many = (native(make("plain"), "int8", threads=threads) for threads in (7, 2))
    states = [runner.hidden_states(ids, [Chunk(range(10), 0, TOKENS)]) for runner in (few, many)]
    assert torch.equal(*states)


@pytest.mark.parametrize(("kv_dtype", "bound"), [(torch.bfloat16, 0.02), (torch.int8, 0.03)])
def test_small_caches_stay_close(kv_dtype: torch.dtype, bound: float) -> None:
    """Relative to the logits' size, against the same cache in PyTorch, which rounds keys and values but not queries."""
    model = make("heads of 64")
    expected, found = ragged(
        [reference(model, kv_dtype=kv_dtype), native(model, "float32", kv_dtype=kv_dtype)], [90, 33], 16, 2, [1, 40]
    )
    assert float((found - expected).norm() / expected.norm()) < bound


def test_int8_is_the_w8a8_of_the_model() -> None:
    model = make("untied, head bias")
    runner = native(model, "int8")
    quantise_model(model, "w8a8")
    expected, found = ragged([reference(model), runner], [60, 9], 16, 3, [1, 30])
    # an activation that lies between two whole numbers may be rounded to the other one
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_bfloat16_rounds_weights_and_activations() -> None:
    model = make("heads of 64")
    exact, found = ragged([reference(model), native(model, "bfloat16")], [60, 9], 16, 3, [1, 30])
    assert 1e-4 < float((found - exact).norm() / exact.norm()) < 0.03


def test_int4_is_close_to_its_own_weights_in_float() -> None:
    """The layers that groups divide have four bits, the others eight; activations are rounded per group of a row."""
    model = tiny.model(hidden_size=64, intermediate_size=96, num_attention_heads=5, head_dim=16, num_key_value_heads=1)
    quantise_model(model, "int4", group_size=32)
    layers = [layer for layer in model.modules() if isinstance(layer, Int4Linear)]
    assert len(layers) == 9  # not o_proj, of 80 inputs
    expected, found = ragged([reference(model), native(model, "int4")], [60, 9], 16, 3, [1, 30])
    assert float((found - expected).norm() / expected.norm()) < 0.12


def test_int8_weights_are_not_told_from_the_model_that_has_them() -> None:
    """w8a8 rounds activations and is far outside this tolerance."""
    model = tiny.model()
    quantise_model(model, "int8")
    expected, found = ragged(
        [reference(copy.deepcopy(model)), native(model, "int8_weights", release=True)], [9], 16, 1, [1, 8]
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert {layer.kind for layer in model.modules() if isinstance(layer, NativeLinear)} == {"int8_weights"}


def test_released_weights_leave_a_model_that_works() -> None:
    model, ids = make("plain"), tiny.ids(40)
    expected = model(ids)
    before = [type(layer) for layer in model.modules()]
    runner = native(model, "float32", release=True)
    assert torch.nn.Linear in before
    assert not any(isinstance(layer, torch.nn.Linear) for layer in model.modules())
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)
    found = runner.logits(runner.hidden_states(ids.tolist(), [Chunk([4, 2, 7], 0, 40)]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    packed = sum(layer.packed.memory.nbytes for layer in model.modules() if isinstance(layer, NativeLinear))
    assert runner.decoder.weight_bytes == packed


def test_greedy_is_the_best_of_the_logits_and_marks_what_is_no_number() -> None:
    runner = native(make("plain"), "float32")
    hidden = runner.hidden_states(tiny.ids(20).tolist(), [Chunk([1, 2], 0, 20)]).clone()
    best = runner.logits(hidden).argmax(-1).tolist()
    hidden[3], hidden[5, 0] = float("nan"), float("inf")
    assert runner.greedy(hidden) == [-1 if row in (3, 5) else token for row, token in enumerate(best)]


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8])
def test_blocks_can_be_copied_and_carried_to_another_runner(kv_dtype: torch.dtype) -> None:
    ids = tiny.ids(9).tolist()
    first, second = (native(make("plain"), "float32", 4, kv_dtype=kv_dtype) for _ in range(2))
    first.hidden_states(ids[:8], [Chunk([5, 3], 0, 8)])
    expected = first.hidden_states(ids[8:], [Chunk([5, 3, 1], 8, 1)]).clone()
    first.copy_blocks([(5, 3), (3, 5), (5, 7), (3, 8)])  # sources are read before targets are written
    assert torch.equal(first.hidden_states(ids[8:], [Chunk([3, 5, 0], 8, 1)]), expected)
    assert torch.equal(first.hidden_states(ids[8:], [Chunk([7, 8, 0], 8, 1)]), expected)
    second.write_blocks([2, 0], first.read_blocks([7, 8]))
    assert torch.equal(second.hidden_states(ids[8:], [Chunk([2, 0, 9], 8, 1)]), expected)
    per_head = 16 * 4 if kv_dtype == torch.float32 else 16 + 4
    assert first.kv_bytes_per_token == 3 * 2 * 2 * per_head


def test_what_is_not_covered_is_refused_by_name() -> None:
    for changes, word in (
        ({"norm": NormConfig(kind="layer")}, "norm"),
        ({"norm": NormConfig(placement="sandwich")}, "sandwich"),
        ({"parallel": "one_norm"}, "parallel"),
        ({"attention": AttentionConfig(softcap=5.0)}, "softcap"),
        ({"attention": AttentionConfig(sinks=True)}, "sinks"),
        ({"attention": AttentionConfig(qk_norm="full")}, "qk_norm"),
        ({"feed_forward": FeedForwardConfig(gated=False)}, "gated"),
        ({"feed_forward": FeedForwardConfig(activation="relu")}, "relu"),
        ({"positions": PositionConfig(bias="alibi")}, "alibi"),
        ({"positions": PositionConfig(rope=RopeConfig(interleaved=True))}, "interleaved"),
        ({"layers": (LayerConfig(), LayerConfig(keys_from=0), LayerConfig())}, "keys_from"),
    ):
        model = tiny.model(**changes)
        assert word in str(native_refusal(model))
        with pytest.raises(RequestError, match=word):
            native(model, "float32")
    model = make("plain")
    with pytest.raises(RequestError, match="kv_dtype"):
        native(model, "float32", kv_dtype=torch.float16)
    with pytest.raises(RequestError, match="int9"):
        native(model, "int9")
    with pytest.raises(RequestError, match="threads"):
        native(model, "float32", threads=0)


def test_a_chunk_outside_its_blocks_is_refused_before_anything_is_written() -> None:
    runner = native(make("plain"), "float32")
    for table, start, length in (([0], 10, 7), ([-1], 0, 3), ([blocks_for(16)], 0, 3), ([0], -1, 3)):
        with pytest.raises(ValueError, match="chunk 0"):
            runner.hidden_states([1] * length, [Chunk(table, start, length)])
    with pytest.raises(ValueError, match="2 ids"):
        runner.hidden_states([1, 2], [Chunk([0], 0, 3)])
    with pytest.raises(IndexError):
        runner.hidden_states([300], [Chunk([0], 0, 1)])


@pytest.mark.asset
def test_smollm2_says_the_same_tokens_as_in_pytorch() -> None:
    from gristmill.model.load import load_model

    model, tokenizer = load_model("smollm2-135m")[:2]
    prompts = [tokenizer.encode(text) for text in ("The capital of France is", "def add(a, b):", "Once upon a time")]
    said = []
    for runner in (
        TorchRunner(model, num_blocks=48, block_size=16, kv_dtype=torch.float32),
        NativeRunner(model, "float32", num_blocks=48, block_size=16),
    ):
        sequences = [list(prompt) for prompt in prompts]
        computed = [0] * len(prompts)
        for _ in range(32):
            chunks = [
                Chunk(range(16 * i, 16 * i + 16), done, len(sequences[i]) - done) for i, done in enumerate(computed)
            ]
            ids = [token for i, done in enumerate(computed) for token in sequences[i][done:]]
            computed = [len(sequence) for sequence in sequences]
            hidden = runner.hidden_states(ids, chunks)
            last = torch.tensor([chunk.length for chunk in chunks]).cumsum(0) - 1
            for sequence, token in zip(sequences, runner.greedy(hidden[last]), strict=True):
                sequence.append(token)
        said.append(sequences)
    assert said[0] == said[1]

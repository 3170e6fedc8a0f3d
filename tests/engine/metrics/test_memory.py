"""Formulas of memory against tensors and against what the process took."""

from __future__ import annotations

import pytest
import torch

from gristmill.engine.metrics.memory import PeakMemory, cache_bytes, weight_bytes
from gristmill.model.config import ModelConfig
from gristmill.model.memory import SequenceCache
from gristmill.model.transformer import Transformer
from model import tiny


def llama(kv_heads: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=32_000,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=kv_heads,
        head_dim=128,
        intermediate_size=11_008,
    )


@pytest.mark.parametrize(("kv_heads", "per_token", "tokens"), [(32, 524_288, 2048), (8, 131_072, 8192)])
def test_keys_and_values_of_llama(kv_heads: int, per_token: int, tokens: int) -> None:
    assert cache_bytes(llama(kv_heads), 1, bytes_per_value=2) == per_token
    assert cache_bytes(llama(kv_heads), tokens, bytes_per_value=2) == 1 << 30
    assert cache_bytes(llama(kv_heads), tokens, 3, bytes_per_value=4) == 6 << 30


@torch.inference_mode()
def test_the_formulas_are_the_bytes_of_the_tensors() -> None:
    model = tiny.model()
    cache = SequenceCache(model.config, rows=3)
    ids = tiny.ids(3 * 10).view(3, 10)
    model(ids, position_ids=cache.extend(10), cache=cache)
    held = [x for x in (*cache.keys, *cache.values) if x is not None]
    assert cache_bytes(model.config, 10, 3) == sum(x.nbytes for x in held)
    assert weight_bytes(model.config) == sum(x.nbytes for x in model.parameters())
    assert weight_bytes(model.config, 0.5) * 8 == weight_bytes(model.config)


def test_the_peak_of_the_process_is_what_the_formulas_say() -> None:
    config = tiny.config(hidden_size=512, num_key_value_heads=4, head_dim=128, intermediate_size=8192, vocab_size=2048)
    Transformer(tiny.config())  # what is imported on first use is no memory of the model
    torch.ones(1 << 20).sum()
    peak = PeakMemory()
    if peak.peak() is None:
        pytest.skip("this system does not tell")
    model = Transformer(config)
    tokens = 4096
    held = [torch.ones(tokens, 4, 128) for _ in range(2 * config.num_hidden_layers)]
    expected = weight_bytes(config) + cache_bytes(config, tokens)
    assert sum(x.nbytes for x in (*model.parameters(), *held)) == expected
    assert peak.peak() == pytest.approx(expected, rel=0.1)

"""Formulas of memory against tensors and against what the process took."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gristmill.engine.metrics.memory import _status, cache_bytes, give_back_freed, weight_bytes
from gristmill.model.config import ModelConfig
from gristmill.model.memory import SequenceCache
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


PEAK = """
import json
import torch
from gristmill.engine.metrics.memory import PeakMemory, cache_bytes, weight_bytes
from gristmill.model.transformer import Transformer
from model import tiny

config = tiny.config(hidden_size=512, num_key_value_heads=4, head_dim=128, intermediate_size=8192, vocab_size=2048)
tokens = 4096
# the formulas and a first model come before: what they import is no memory of the model
expected = weight_bytes(config) + cache_bytes(config, tokens)
Transformer(tiny.config())
peak = PeakMemory()
before = peak.peak()
model = Transformer(config)
held = [torch.ones(tokens, 4, 128) for _ in range(2 * config.num_hidden_layers)]
print(json.dumps([before, sum(x.nbytes for x in (*model.parameters(), *held)), expected, peak.peak()]))
"""


def test_the_peak_of_the_process_is_what_the_formulas_say() -> None:
    """In a process of its own, which has no freed memory to use again."""
    tests = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", PEAK],
        env={**os.environ, "PYTHONPATH": tests},
        capture_output=True,
        text=True,
        check=True,
    )
    before, held, expected, peak = json.loads(done.stdout.splitlines()[-1])
    if before is None:
        pytest.skip("this system does not tell")
    assert held == expected
    assert peak == pytest.approx(expected, rel=0.1)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has its own ways")
def test_freed_memory_goes_back_to_the_system() -> None:
    kept = [bytearray(50_000) for _ in range(2_000)]  # 100 MB
    del kept[:-1]  # the last one keeps glibc from returning what lies below it
    before = _status("VmRSS")
    give_back_freed()
    after = _status("VmRSS")
    assert before is not None
    assert after is not None
    assert before - after > 50_000_000

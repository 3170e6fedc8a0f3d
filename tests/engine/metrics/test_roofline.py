"""What forwards compute and read, and what binds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gristmill.engine.metrics.roofline import Machine, decode_work, forward_work, measure_machine, place, prefill_work
from gristmill.errors import RequestError
from gristmill.model.accounting import kv_bytes, matrix_parameters
from gristmill.model.config import ModelConfig
from model import tiny

LONG = tiny.config(max_position_embeddings=1024)
LLAMA_7B = ModelConfig(
    vocab_size=32_000,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    intermediate_size=11_008,
)


def test_decoding_computes_as_much_as_prefill_and_reads_the_weights_for_every_token() -> None:
    prefill, decode = prefill_work(LONG, 512), decode_work(LONG, 512)
    assert decode.linear_flops == prefill.linear_flops
    assert decode.attention_flops == pytest.approx(prefill.attention_flops)
    assert decode.weight_bytes == 512 * prefill.weight_bytes == 512 * 4 * matrix_parameters(LONG)


def test_linear_operations_are_those_that_torch_counts() -> None:
    model = tiny.model()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(tiny.ids(20))
    products = sum(count for name, count in counter.get_flop_counts()["Global"].items() if "mm" in str(name))
    assert prefill_work(model.config, 20).linear_flops == products


def test_a_decode_step_reads_more_with_every_token_of_context() -> None:
    near, far = (decode_work(LONG, 1, context=context) for context in (10, 500))
    assert near.weight_bytes == far.weight_bytes
    assert far.kv_bytes - near.kv_bytes == kv_bytes(LONG, 490)
    assert far.attention_flops > near.attention_flops
    machine = Machine(1e12, 1e10)
    assert place(far, machine).seconds > place(near, machine).seconds


@pytest.mark.parametrize("tokens", [1, 16, 400])
def test_the_intensity_of_16_bit_linear_layers_is_the_tokens_of_the_forward(tokens: int) -> None:
    work = forward_work(LLAMA_7B, [(0, 1)] * tokens, bytes_per_weight=2)
    assert work.linear_flops / work.weight_bytes == pytest.approx(tokens)


def test_prefill_is_bound_by_computing_and_decoding_by_memory_until_the_batch_is_large() -> None:
    machine = Machine(flops=312e12, bandwidth=2e12)  # a ridge of 156 operations per byte
    bound = {
        batch: place(decode_work(LLAMA_7B, 1, batch=batch, bytes_per_weight=2, bytes_per_kv=2), machine).bound
        for batch in (1, 64, 512)
    }
    assert bound == {1: "memory", 64: "memory", 512: "compute"}
    assert place(prefill_work(LLAMA_7B, 512, bytes_per_weight=2), machine).bound == "compute"
    long = decode_work(LLAMA_7B, 1, batch=512, context=2000, bytes_per_weight=2, bytes_per_kv=2)
    assert place(long, machine).bound == "memory", "every sequence reads keys and values of its own"


def test_the_least_time_is_that_of_the_slower_of_reading_and_computing() -> None:
    work = prefill_work(LONG, 64)
    for machine in (Machine(1e9, 1e15), Machine(1e15, 1e6)):
        placed = place(work, machine)
        assert placed.seconds == pytest.approx(max(work.flops / machine.flops, work.bytes / machine.bandwidth))
        assert placed.bound == ("compute" if machine.flops == 1e9 else "memory")


def test_only_tokens_that_are_chosen_from_need_the_head() -> None:
    config = replace(LONG, tie_word_embeddings=False)
    all_tokens, last = prefill_work(config, 64), prefill_work(config, 64, logits=1)
    assert all_tokens.linear_flops - last.linear_flops == 2 * 63 * config.vocab_size * config.hidden_size
    assert all_tokens.weight_bytes == last.weight_bytes


def test_the_probe_measures_this_machine() -> None:
    found = measure_machine(megabytes=4, size=64, rounds=2)
    assert found.flops > 1e6
    assert found.bandwidth > 1e6
    assert found.ridge == found.flops / found.bandwidth
    with pytest.raises(RequestError):
        measure_machine(rounds=0)

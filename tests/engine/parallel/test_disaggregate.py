"""A request that moves between engines has the tokens of one engine, and nothing is computed twice."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

import processes
from engine import helpers
from gristmill.core import RequestOutput, SamplingParams
from gristmill.engine.engine import Engine
from gristmill.engine.handover import Blocks, Handover
from gristmill.engine.parallel.disaggregate import decode, prefill, receive, send, transfer_seconds
from gristmill.engine.parallel.prefix import export_prefix, import_prefix
from gristmill.engine.request import Standing
from gristmill.engine.speculation.ngram import NgramProposer
from gristmill.errors import GristmillError, RequestError
from gristmill.model.accounting import kv_bytes_per_token
from gristmill.model.config import ModelConfig

GREEDY = helpers.greedy(max_tokens=12)
REQUESTS: list[tuple[Any, SamplingParams]] = [
    ("The river", GREEDY),
    (helpers.prompt(40, 1), SamplingParams(temperature=1.0, max_tokens=9, ignore_eos=True)),
    (helpers.prompt(16, 2), SamplingParams(temperature=1.0, seed=5, max_tokens=20, logprobs=2, prompt_logprobs=1)),
    (helpers.prompt(7, 3), helpers.greedy(max_tokens=1)),
    (helpers.prompt(33, 4), SamplingParams(presence_penalty=1.0, temperature=0.7, seed=1, max_tokens=15, stop=["e"])),
]


def told(outputs: list[RequestOutput]) -> list[Any]:
    """Everything but the log-probabilities, whose last digit depends on who else was in the batch."""
    return [
        (o.prompt, o.prompt_token_ids, c.token_ids, c.text, c.finish_reason, c.stop_reason)
        for o in outputs
        for c in o.outputs
    ]


def logprobs(outputs: list[RequestOutput]) -> list[float]:
    entries = [entry for o in outputs for part in (o.prompt_logprobs, o.outputs[0].logprobs) for entry in part or ()]
    return [found.logprob for entry in entries if entry for found in entry.values()]


def hand_over(first: Engine, second: Engine, prompt: Any, params: SamplingParams) -> tuple[Handover, RequestOutput]:
    """One request through both; what travelled, and the answer."""
    name = first.add(prompt, params)
    while not any(output.request_id == name for output in first.step()):
        pass
    handover = first.export(name)
    first.check_integrity()
    assert not first.has_unfinished()
    second.adopt(handover)
    second.check_integrity()
    while second.has_unfinished():
        done = second.step()
        second.check_integrity()
    return handover, done[0]


def prefiller(sink: Connection, block_size: int) -> int:
    sent = prefill(helpers.engine(max_num_batched_tokens=24, block_size=block_size), REQUESTS, sink)
    sink.send(sent)
    return 0


@pytest.mark.parametrize("block_size", [4, 16])
def test_two_processes_give_the_tokens_of_one_engine(tmp_path: Path, block_size: int) -> None:
    source, sink = multiprocessing.Pipe(duplex=False)
    child = processes.start(prefiller, sink, block_size, log=tmp_path / "log")
    sink.close()
    # fewer seats than requests: some wait on the way; the seeds are those of the first engine
    engine = helpers.engine(max_num_seqs=2, block_size=block_size, seed=99)
    outputs = decode(engine, source)
    expected = helpers.run(helpers.engine(block_size=block_size), REQUESTS)
    assert told(outputs) == told(expected)
    assert logprobs(outputs) == pytest.approx(logprobs(expected), abs=1e-5)
    assert len(logprobs(expected)) > 60
    handed_over = [output for output in outputs if len(output.outputs[0].token_ids) > 1]
    assert len(handed_over) == 4
    blocks = sum(-(-len(output.prompt_token_ids) // block_size) for output in handed_over)
    formula = kv_bytes_per_token(helpers.model().config) * block_size * blocks
    assert source.recv() == formula, "bytes that travelled"
    assert processes.finish(child) == 0
    assert engine.metrics.scheduled_tokens == sum(len(o.outputs[0].token_ids) - 1 for o in handed_over)
    engine.check_integrity()


def test_transfer_time_is_bytes_over_bandwidth() -> None:
    llama2_7b = ModelConfig(
        vocab_size=32_000,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        intermediate_size=11_008,
    )
    per_token = kv_bytes_per_token(llama2_7b, 2)
    assert per_token == 512 * 1024
    assert 2048 * per_token == 1 << 30
    assert transfer_seconds(2048, per_token, 12.5 * (1 << 30)) == pytest.approx(0.080)


@pytest.mark.parametrize("kind", ["int8", "speculating", "constrained", "longer"])
def test_any_engine_goes_on_as_it_would_have(kind: str) -> None:
    options: dict[str, Any] = {"kv_cache_dtype": torch.int8} if kind == "int8" else {}
    if kind == "speculating":
        options["proposer"] = NgramProposer(min_n=1)
    params = SamplingParams(temperature=1.0, seed=2, max_tokens=30, ignore_eos=True)
    if kind == "constrained":
        params = SamplingParams(temperature=1.0, seed=2, max_tokens=12, bad_words=["e", "a"], no_repeat_ngram_size=2)
    prompt = helpers.prompt(21, 6) * 2
    expected = helpers.run(helpers.engine(**options), [(prompt, params)])
    first = helpers.engine(**options)
    name = first.add(prompt, params)
    for _ in range(5 if kind == "longer" else 1):
        first.step()
    second = helpers.engine(**options)
    second.adopt(first.export(name))
    done: list[RequestOutput] = []
    while second.has_unfinished():
        done = second.step()
    assert told(done) == told(expected)


def test_an_adopted_request_survives_preemption_and_shares_its_prompt() -> None:
    prompt = helpers.prompt(24, 7)
    first, second = helpers.engine(block_size=4), helpers.engine(block_size=4, kv_cache_tokens=64, max_model_len=60)
    handover, _ = hand_over(first, helpers.engine(block_size=4), prompt, GREEDY)
    second.adopt(handover)
    second.add(prompt, helpers.greedy(max_tokens=30))
    second.add(helpers.prompt(20, 8), helpers.greedy(max_tokens=30))
    finished = {}
    while second.has_unfinished():
        finished |= {output.request_id: output for output in second.step() if output.finished}
        second.check_integrity()
    assert second.scheduler.num_preempted > 0
    assert finished[handover.request_id].outputs[0].token_ids == helpers.plain_greedy(prompt, 12)
    assert second.metrics.cached_prompt_tokens >= 20, "what arrived can be found by others"


def test_the_way_keeps_every_bit_and_the_standing() -> None:
    engine = helpers.engine(kv_cache_dtype=torch.bfloat16)
    standing = Standing(priority=3, user="u", deadline=engine.clock() + 50, cache_salt="s")
    name = engine.add(helpers.prompt(20), GREEDY, standing=standing)
    engine.step()
    handover = engine.export(name)
    source, sink = multiprocessing.Pipe(duplex=False)
    assert send(sink, handover) == handover.blocks.num_bytes == handover.blocks.num_blocks * 16 * 3 * 2 * 2 * 16 * 2
    arrived = receive(source)
    assert isinstance(arrived, Handover)
    for got, sent in zip(arrived.blocks.data, handover.blocks.data, strict=True):
        assert got.dtype == sent.dtype
        assert torch.equal(got, sent)
        assert not got[:, 20:].any(), "what lay behind the request stays at home"
    there = helpers.engine(kv_cache_dtype=torch.bfloat16)
    there.adopt(arrived)
    there.step()
    unsalted = there.add(helpers.prompt(20), GREEDY)
    (output,) = [output for output in there.step() if output.request_id == unsalted]
    assert output.num_cached_tokens == 0, "another tenant's blocks"
    here = arrived.standing_here(now=100.0)
    assert (here.priority, here.user) == (3, "u")
    assert here.deadline == pytest.approx(150, abs=5)


def test_time_is_counted_from_the_beginning() -> None:
    now = [0.0]
    first, second = (helpers.engine(clock=lambda: now[0]) for _ in range(2))
    name = first.add(helpers.prompt(5), helpers.greedy(max_tokens=50, max_time=10.0))
    first.step()
    now[0] = 9.0
    second.adopt(first.export(name))
    now[0] = 11.0
    (output,) = second.step()
    assert output.outputs[0].stop_reason == "max_time"


def test_what_cannot_go_is_refused() -> None:
    engine = helpers.engine()
    with pytest.raises(RequestError, match="not here"):
        engine.export("nobody")
    several = engine.add(helpers.prompt(5), helpers.greedy(n=2))
    with pytest.raises(RequestError, match="first token"):
        engine.export(engine.add(helpers.prompt(5), GREEDY))
    engine.step()
    with pytest.raises(RequestError, match="several completions"):
        engine.export(several)
    name = engine.add(helpers.prompt(20), GREEDY)
    engine.step()
    handover = engine.export(name)
    assert len(handover.blocks.data) == 2
    for other, field in (
        (helpers.engine(block_size=4), "block_size"),
        (helpers.engine(kv_cache_dtype=torch.int8), "kv_cache_dtype"),
        (helpers.engine(max_model_len=20), "prompt"),
        (helpers.engine(kv_cache_tokens=30), "max_tokens"),
        (helpers.engine(kv_cache_tokens=16), "blocks"),
    ):
        with pytest.raises(RequestError) as refused:
            other.adopt(handover)
        assert refused.value.field == field
        other.check_integrity()
        assert not other.has_unfinished()
    with pytest.raises(RequestError, match="do not fill"):
        Blocks.of_payload(20, 16, handover.blocks.like, handover.blocks.payload()[:-1])


def leaver(sink: Connection) -> int:
    sink.send(["one", "two"])
    return 0


def test_a_prefill_process_that_is_gone_or_silent_is_an_error(tmp_path: Path) -> None:
    source, sink = multiprocessing.Pipe(duplex=False)
    child = processes.start(leaver, sink, log=tmp_path / "log")
    sink.close()
    with pytest.raises(GristmillError, match="gone"):
        decode(helpers.engine(), source)
    processes.finish(child)
    source, sink = multiprocessing.Pipe(duplex=False)
    began = time.monotonic()
    with pytest.raises(GristmillError, match="said nothing"):
        decode(helpers.engine(), source, timeout=0.1)
    assert time.monotonic() - began < 60
    source.close()
    with pytest.raises(GristmillError, match="decode process is gone"):
        prefill(helpers.engine(), REQUESTS, sink)


def test_an_engine_starts_warm_with_the_prefix_of_another() -> None:
    prompt = helpers.prompt(40, 11)
    first = helpers.engine(block_size=8)
    helpers.run(first, [(prompt, GREEDY)])
    prefix = export_prefix(first, prompt)
    assert prefix.token_ids == prompt[:40]
    assert prefix.blocks.num_bytes == kv_bytes_per_token(helpers.model().config) * 40
    second = helpers.engine(block_size=8)
    assert import_prefix(second, prefix) == 40
    second.check_integrity()
    assert import_prefix(second, prefix) == 40, "again: it is all there"
    output = helpers.run(second, [(prompt, GREEDY)])[0]
    assert output.num_cached_tokens == 32, "all but the block of the last token"
    assert output.outputs[0].token_ids == helpers.plain_greedy(prompt, 12)
    assert export_prefix(helpers.engine(block_size=8), prompt).blocks.num_blocks == 0
    assert export_prefix(first, prompt, cache_salt="another tenant").blocks.num_blocks == 0


def test_a_prefix_takes_what_room_there_is() -> None:
    prompt = helpers.prompt(40, 11)
    first = helpers.engine(block_size=8)
    helpers.run(first, [(prompt, GREEDY)])
    small = helpers.engine(block_size=8, kv_cache_tokens=32)
    small.add(helpers.prompt(9, 12), helpers.greedy(max_tokens=2))
    small.step()
    assert import_prefix(small, export_prefix(first, prompt)) == 16
    small.check_integrity()
    with pytest.raises(RequestError) as refused:
        import_prefix(helpers.engine(block_size=8, prefix_caching=False), export_prefix(first, prompt))
    assert refused.value.field == "prefix_caching"

"""The first layers draft as a model of only those layers would, in the memory of the whole one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from engine.speculation.models import BLOCK_SIZE, BLOCKS, CountingRunner, continued, request, target
from gristmill.engine.memory.paged_cache import Chunk
from gristmill.engine.native.decoder import native_refusal
from gristmill.engine.native.runner import NativeRunner
from gristmill.engine.runner import Runner
from gristmill.engine.speculation.early_exit import EarlyExitProposer, exit_runner
from gristmill.engine.speculation.proposer import Draft
from gristmill.engine.speculation.verify import verify_greedy
from gristmill.errors import RequestError
from gristmill.model.transformer import Transformer
from model import tiny

TABLES = [7, 3, 11, 0, 20], [5, 6, 1, 2, 22]
PROMPTS = tiny.ids(9).tolist(), tiny.ids(6, seed=4).tolist()


def first_layers(count: int) -> Transformer:
    """The target without its later layers."""
    short = tiny.model(num_hidden_layers=count)
    short.load_state_dict(target().state_dict(), strict=False)
    return short


def native(model: Transformer) -> Runner:
    """The same in C++, where there is a compiler."""
    if (refusal := native_refusal(model)) is not None:
        pytest.skip(refusal)
    return NativeRunner(model, "float32", num_blocks=BLOCKS, block_size=BLOCK_SIZE)


@pytest.mark.parametrize("make", [CountingRunner, pytest.param(native, marks=pytest.mark.peer)])
@pytest.mark.parametrize("layers", [1, 2])
def test_drafts_and_verifies_in_one_memory(layers: int, make: Callable[[Transformer], Runner]) -> None:
    runner, short = make(target()), first_layers(layers)
    proposer = EarlyExitProposer(runner, layers=layers, max_tokens=3)
    sequences = [list(prompt) for prompt in PROMPTS]
    for ids, table in zip(sequences, TABLES, strict=True):
        runner.hidden_states(ids[:-1], [Chunk(table, 0, len(ids) - 1)])
    stood = 0
    for _ in range(3):
        requests = [
            request(ids, table, slot=slot) for slot, (ids, table) in enumerate(zip(sequences, TABLES, strict=True))
        ]
        drafts = proposer.propose(requests)
        assert drafts == [Draft(continued(short, ids, 3)) for ids in sequences]
        for ids, table, draft in zip(sequences, TABLES, drafts, strict=True):
            read = [ids[-1], *draft.token_ids]
            logits = runner.logits(runner.hidden_states(read, [Chunk(table, len(ids) - 1, len(read))]))
            whole = target()(torch.tensor([*ids, *draft.token_ids]))[len(ids) - 1 :]
            torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-4)
            emitted, accepted = verify_greedy(logits.argmax(-1).tolist(), draft.token_ids)
            stood += accepted
            ids += emitted
    assert [ids[len(prompt) :] for ids, prompt in zip(sequences, PROMPTS, strict=True)] == [
        continued(target(), prompt, len(ids) - len(prompt)) for ids, prompt in zip(sequences, PROMPTS, strict=True)
    ]


def test_one_forward_of_one_token_per_drafted_token() -> None:
    runner = CountingRunner(target())
    proposer = EarlyExitProposer(runner, layers=1, max_tokens=4)
    seen: list[int] = []
    original = proposer.runner.hidden_states
    proposer.runner.hidden_states = lambda ids, chunks: (seen.append(len(ids)), original(ids, chunks))[1]  # type: ignore[method-assign]
    runner.hidden_states(PROMPTS[0][:-1], [Chunk(TABLES[0], 0, 8)])
    (draft,) = proposer.propose([request(PROMPTS[0], TABLES[0], temperature=1.0)])
    assert seen == [1, 1, 1, 1]
    assert draft.probs is not None
    assert draft.probs.shape == (4, tiny.CONFIG.vocab_size)


def test_room_in_blocks_bounds_the_draft() -> None:
    runner = CountingRunner(target())
    runner.hidden_states(PROMPTS[0][:-1], [Chunk(TABLES[0], 0, 8)])
    proposer = EarlyExitProposer(runner, layers=1, max_tokens=9)
    for blocks, length in ((2, 0), (3, 4), (4, 8)):
        (draft,) = proposer.propose([request(PROMPTS[0], TABLES[0][:blocks], limit=9)])
        assert len(draft.token_ids) == length == max(0, blocks * BLOCK_SIZE - 9 + 1)


def test_the_exit_must_leave_layers_out() -> None:
    runner = CountingRunner(target())
    for layers in (0, 3, -1):
        with pytest.raises(RequestError) as refused:
            exit_runner(runner, layers)
        assert refused.value.field == "layers"
    with pytest.raises(RequestError):
        EarlyExitProposer(runner, layers=1, max_tokens=0)
    with pytest.raises(RequestError, match="cannot leave"):
        exit_runner(cast(Any, SimpleNamespace(model=target())), 1)

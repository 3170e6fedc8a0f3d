"""Every position with every attention: fast paths equal plain softmax, nothing leaks, memories agree."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gristmill.engine.memory.paged_cache import Chunk, PagedKVCache
from gristmill.model.attention.packed import PackedAttention
from gristmill.model.encoder import Encoder
from gristmill.model.memory import SequenceCache
from gristmill.model.transformer import Stack, Transformer
from model.parts import ATTENTIONS, BASE, LENGTH_DEPENDENT, POSITIONS, config, decoder, randomised
from model.reference import ReferenceAttention
from model.tiny import ids

LENGTHS = [5, 21, 1, 18]  # documents; one longer than a block of the paged memory
BLOCK_SIZE = 16
TOKENS = sum(LENGTHS)
ATOL = 1e-4
PAIRS = [(position, attention) for position in POSITIONS for attention in ATTENTIONS]
pairs = pytest.mark.parametrize(("position", "attention"), PAIRS, ids=[f"{p}, {a}" for p, a in PAIRS])


def packed(model: Stack, tokens: Tensor, lengths: list[int]) -> Tensor:
    positions = torch.cat([torch.arange(length) for length in lengths])
    return model.hidden_states(tokens, positions, PackedAttention(lengths))


def by_reference(model: Stack, tokens: Tensor, lengths: list[int]) -> Tensor:
    parts = [
        model.hidden_states(
            part, torch.arange(len(part)), ReferenceAttention(known=torch.full((len(part),), len(part)))
        )
        for part in tokens.split(lengths)
    ]
    return torch.cat(parts)


@pairs
@torch.inference_mode()
def test_a_decoder_equals_the_reference_and_its_memories_equal_one_pass(position: str, attention: str) -> None:
    model, tokens = decoder(position, attention), ids(TOKENS, vocab_size=61)
    found = packed(model, tokens, LENGTHS)
    assert found.isfinite().all()
    assert (found - by_reference(model, tokens, LENGTHS)).abs().max() < ATOL
    longest = tokens.split(LENGTHS)[1]
    counts = [3, 1, 14, 1, 2]
    assert sum(counts) == len(longest) > BLOCK_SIZE
    plain = SequenceCache(model.config)
    paged = PagedKVCache(model.config, -(-len(longest) // BLOCK_SIZE), BLOCK_SIZE, torch.float32, torch.device("cpu"))
    table, begin = list(range(-(-len(longest) // BLOCK_SIZE)))[::-1], 0
    expected = packed(model, longest, [len(longest)])
    if position in LENGTH_DEPENDENT:
        expected = _with_lengths_of_steps(model, longest, counts)
    for count in counts:
        part, end = longest[begin : begin + count], begin + count
        positions = plain.extend(count)
        paged.plan([Chunk(table, begin, count)])
        for cache in (plain, paged):
            assert (model.hidden_states(part, positions, cache) - expected[begin:end]).abs().max() < ATOL
        begin = end


def _with_lengths_of_steps(model: Transformer, tokens: Tensor, counts: list[int]) -> Tensor:
    """One pass in which each token is turned as its own step turned it."""
    ends = torch.tensor(counts).cumsum(0).repeat_interleave(torch.tensor(counts))
    cache = ReferenceAttention(known=ends)
    return model.hidden_states(tokens, torch.arange(len(tokens)), cache)


@pairs
@torch.inference_mode()
def test_nothing_leaks_back_in_time_or_into_another_document(position: str, attention: str) -> None:
    model, tokens = decoder(position, attention), ids(TOKENS, vocab_size=61)
    before = packed(model, tokens, LENGTHS)
    changed = 5 + 9  # in the second document
    other = tokens.clone()
    other[changed] = (other[changed] + 1) % 61
    after = packed(model, other, LENGTHS)
    assert torch.equal(after[:changed], before[:changed])
    assert torch.equal(after[5 + 21 :], before[5 + 21 :])
    assert (after[changed] - before[changed]).abs().max() > 1e-4


@pairs
@torch.inference_mode()
def test_an_encoder_equals_the_reference_and_padding_changes_nothing(position: str, attention: str) -> None:
    model: Encoder = randomised(Encoder(config(position, attention, causal=False)))
    tokens = ids(TOKENS, vocab_size=61)
    found = packed(model, tokens, LENGTHS)
    assert (found - by_reference(model, tokens, LENGTHS)).abs().max() < ATOL
    rows, mask = torch.zeros(len(LENGTHS), 24, dtype=torch.long), torch.zeros(len(LENGTHS), 24, dtype=torch.long)
    for row, part in enumerate(tokens.split(LENGTHS)):
        shift = 3 * (row % 2)  # padding at the end, and at both ends
        rows[row, shift : shift + len(part)] = part
        mask[row, shift : shift + len(part)] = 1
    states = model(rows, mask)
    assert (states[mask.bool()] - found).abs().max() < ATOL
    assert (states[~mask.bool()] == 0).all()
    assert torch.equal(model(rows.where(mask.bool(), 7), mask), states)


GRADIENTS = [
    *((position, "all of them") for position in POSITIONS),
    *(("t5", attention) for attention in ATTENTIONS),
    *(("rope", attention) for attention in ATTENTIONS),
]


@pytest.mark.parametrize(("position", "attention"), GRADIENTS, ids=[f"{p}, {a}" for p, a in GRADIENTS])
def test_gradients_equal_those_of_the_reference(position: str, attention: str) -> None:
    model, tokens = decoder(position, attention), ids(TOKENS, vocab_size=61)
    weights = torch.randn(TOKENS, BASE.hidden_size, generator=torch.Generator().manual_seed(2))

    def gradients(run: Callable[[Stack, Tensor, list[int]], Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        (run(model, tokens, LENGTHS) * weights).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    fast, plain = gradients(packed), gradients(by_reference)
    assert fast.keys() == plain.keys()
    for name, gradient in fast.items():
        assert gradient.isfinite().all()
        assert (gradient - plain[name]).abs().max() < 1e-3 * max(1.0, float(plain[name].abs().max())), name

"""What an adapter adds: the product of its two matrices, to the tokens of its span and to no others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.errors import CheckpointError
from gristmill.model.attention.packed import PackedAttention, segment_positions
from gristmill.model.lora.low_rank import Lora, applied, merge
from gristmill.model.quantised.quantise import quantise_model
from gristmill.model.transformer import Transformer
from model import tiny
from model.lora import adapters


def merged(lora: Lora | None) -> Transformer:
    model = tiny.model()
    if lora is not None:
        merge(model, lora)
    return model


def test_merged_weights_are_the_sum_by_its_formula() -> None:
    plain, lora = tiny.model(), adapters.lora(1, ranks=(1, 2, 5))
    model = merged(lora)
    for module, parts in lora.parts.items():
        expected = plain.get_parameter(f"{module}.weight").clone()
        for part in parts:
            expected[part.begin : part.begin + len(part.up)] += part.scale * (part.up @ part.down)
        assert torch.allclose(model.get_parameter(f"{module}.weight"), expected, atol=1e-5)
    untouched = set(dict(plain.named_parameters())) - {f"{module}.weight" for module in lora.parts}
    assert all(torch.equal(plain.get_parameter(name), model.get_parameter(name)) for name in untouched)


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(-1, 2)), min_size=1, max_size=5),
    st.sampled_from([(3,), (1, 4), (8, 2, 1)]),
)
@torch.no_grad()
def test_each_sequence_of_a_batch_is_computed_with_its_own_adapter(
    batch: list[tuple[int, int]], ranks: tuple[int, ...]
) -> None:
    model = tiny.model()
    loras = [adapters.lora(seed, ranks=ranks, names=adapters.NAMES[seed:]) for seed in range(3)]
    lengths = [length for length, _ in batch]
    ids = torch.cat([tiny.ids(length, 100 + place) for place, length in enumerate(lengths)])
    ends = [sum(lengths[: place + 1]) for place in range(len(lengths))]
    spans = [
        (slice(end - length, end), loras[which]) for end, (length, which) in zip(ends, batch, strict=True) if which >= 0
    ]
    device = torch.device("cpu")
    with applied(model, spans):
        hidden = model.hidden_states(ids, segment_positions(lengths, device), PackedAttention(lengths, device))
    for end, (length, which) in zip(ends, batch, strict=True):
        alone = merged(loras[which] if which >= 0 else None)(ids[end - length : end])
        assert torch.allclose(model.logits(hidden[end - length : end]), alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_nothing_is_left_of_it_afterwards() -> None:
    model, ids = tiny.model(), tiny.ids(5)
    before = model(ids)
    with applied(model, [(slice(None), adapters.lora(0))]):
        assert not torch.allclose(model(ids), before, atol=1e-2)
    assert torch.equal(model(ids), before)
    assert not any(module._forward_hooks for module in model.modules())


def test_quantised_weights_are_not_merged_into() -> None:
    model = tiny.model()
    quantise_model(model, "int8")
    with pytest.raises(CheckpointError, match=r"layers\.0.*merge before quantising"):
        merge(model, adapters.lora(0))

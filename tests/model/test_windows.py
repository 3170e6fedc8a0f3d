"""Sliding windows: the band that a layer sees, how far a stack of them sees, and attention sinks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.core import AttentionRule
from gristmill.errors import CheckpointError
from gristmill.model.attention.kernel import reference_attention, rule_attention
from gristmill.model.config import LayerConfig
from gristmill.model.memory import SequenceCache
from model import tiny


def heads(tokens: int, count: int, seed: int) -> torch.Tensor:
    return torch.randn(tokens, count, 8, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 45), st.data())
def test_a_window_is_dense_attention_under_a_band(tokens: int, window: int, data: st.DataObject) -> None:
    """The window counts the query itself; a step that continues a sequence gives the band's last rows."""
    query, key, value = heads(tokens, 4, 1), heads(tokens, 2, 2), heads(tokens, 2, 3)
    band = torch.ones(tokens, tokens, dtype=torch.bool).tril().triu(1 - window)
    expected = reference_attention(query, key, value, band)
    start = data.draw(st.integers(0, tokens - 1))
    rule = AttentionRule(window=window)
    found = rule_attention(query[None, start:], key[None], value[None], rule, query_start=start)[0]
    assert (found - expected[start:]).abs().max() < 1e-5


@pytest.mark.parametrize(("layers", "window"), [(1, 4), (2, 3), (3, 4), (4, 2), (3, 1)])
@torch.inference_mode()
def test_a_stack_sees_layers_times_window_less_one_plus_one(layers: int, window: int) -> None:
    """What changes the last token's logits is found by changing every token in turn."""
    model = tiny.model(num_hidden_layers=layers, layers=(LayerConfig(window=window),) * layers).double()
    tokens = tiny.ids(16)
    plain = model(tokens)[-1]
    changed = []
    for place in range(16):
        other = tokens.clone()
        other[place] = (other[place] + 1) % 300
        changed.append(bool((model(other)[-1] - plain).abs().max() > 1e-12))
    field = layers * (window - 1) + 1
    assert changed == [False] * (16 - field) + [True] * field


@pytest.mark.parametrize("window", [12, 13, 1000])
@torch.inference_mode()
def test_a_window_as_long_as_the_sequence_is_no_window(window: int) -> None:
    tokens = tiny.ids(12)
    wide, narrow = (tiny.model(layers=(LayerConfig(window=size),) * 3) for size in (window, 11))
    full = tiny.model()(tokens)
    assert (wide(tokens) - full).abs().max() < 1e-5
    assert (narrow(tokens)[:11] - full[:11]).abs().max() < 1e-5
    assert (narrow(tokens)[11] - full[11]).abs().max() > 1e-3


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"layers\[0\]\.window must be a whole number of at least 1"):
        tiny.config(layers=(LayerConfig(window=0),) * 3)


@pytest.mark.peer
@pytest.mark.parametrize("window", [None, 5])
def test_sinks_equal_those_of_transformers(window: int | None) -> None:
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    query, key, value = heads(12, 4, 1), heads(12, 2, 2), heads(12, 2, 3)
    sinks = torch.tensor([-2.0, 0.0, 1.0, 4.0])
    band = torch.ones(12, 12, dtype=torch.bool).tril().triu(1 - (window or 12))
    mask = torch.zeros(12, 12).masked_fill(~band, float("-inf"))
    module = SimpleNamespace(sinks=sinks, num_key_value_groups=2, training=False)
    rows = (x.transpose(0, 1)[None] for x in (query, key, value))
    expected = modeling.eager_attention_forward(module, *rows, mask, 8**-0.5)[0][0]
    rule = AttentionRule(window=window, sinks=sinks)
    found = rule_attention(query[None], key[None], value[None], rule)[0]
    assert (found - expected).abs().max() < 1e-6
    assert (reference_attention(query, key, value, band, rule) - expected).abs().max() < 1e-6


def test_a_sink_takes_weight_and_gives_nothing() -> None:
    """One key whose score is 0 and a sink at 0 share the weight evenly; a sink at minus infinity takes none."""
    query, key = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4)
    value = torch.tensor([2.0, 4.0, 6.0, 8.0]).view(1, 1, 1, 4)
    for sink, share in ((0.0, 0.5), (float("-inf"), 1.0)):
        found = rule_attention(query, key, value, AttentionRule(sinks=torch.tensor([sink])))
        assert torch.allclose(found, share * value)


@pytest.mark.parametrize("window", [1, 4, 30, 99])
@torch.inference_mode()
def test_a_windowed_memory_never_holds_more_than_the_window(window: int) -> None:
    model = tiny.model(layers=(LayerConfig(window=window),) * tiny.CONFIG.num_hidden_layers)
    tokens, cache, rows = tiny.ids(30), SequenceCache(model.config), []
    for part in tokens.split([5, 1, 1, 9, 14]):
        rows.append(model.logits(model.hidden_states(part, cache.extend(len(part)), cache)))
        assert all(key is not None and key.shape[1] <= window for key in cache.keys)
    assert torch.allclose(torch.cat(rows), model(tokens), atol=1e-4)  # as if all had been kept, or computed again
    if window >= 30:
        assert torch.allclose(torch.cat(rows), tiny.model()(tokens), atol=1e-4)

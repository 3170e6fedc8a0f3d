"""Vector products, counted one by one while a model runs."""

from __future__ import annotations

import pytest
import torch

from gristmill.core import AttentionRule
from gristmill.engine.metrics.attention_cost import CountedAttention, vector_products
from gristmill.errors import RequestError
from gristmill.model.transformer import Transformer
from model import tiny


@torch.inference_mode()
def counted(model: Transformer, chunks: list[int]) -> tuple[CountedAttention, torch.Tensor]:
    """A sequence computed in chunks; the counts, and the logits of all its tokens."""
    cache, ids, logits, start = CountedAttention(), tiny.ids(sum(chunks)), [], 0
    for length in chunks:
        here = slice(start, start + length)
        logits.append(model(ids[here], position_ids=torch.arange(start, start + length), cache=cache))
        start += length
    return cache, torch.cat(logits)


@pytest.mark.parametrize(("length", "products"), [(4, 20), (10, 110)])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_sequence_takes_its_length_times_one_more(length: int, products: int, at_once: bool) -> None:
    model = tiny.model()
    cache, logits = counted(model, [length] if at_once else [1] * length)
    layers = range(model.config.num_hidden_layers)
    assert [cache.scores[layer] + cache.sums[layer] for layer in layers] == [products] * len(layers)
    assert vector_products(length) == products
    # what is counted is the attention that the model has
    torch.testing.assert_close(logits, model(tiny.ids(length)), atol=1e-4, rtol=1e-4)


def test_twice_the_length_is_four_times_the_products_and_eight_without_a_cache() -> None:
    assert vector_products(2000) / vector_products(1000) == pytest.approx(4, rel=1e-2)
    assert vector_products(2000, cached=False) / vector_products(1000, cached=False) == pytest.approx(8, rel=1e-2)


def test_recomputing_without_a_cache_is_counted_as_the_closed_form_says() -> None:
    model = tiny.model(num_hidden_layers=1)
    runs = [counted(model, [length])[0] for length in range(1, 7)]
    assert sum(run.scores[0] + run.sums[0] for run in runs) == vector_products(6, cached=False)


def test_chunks_read_earlier_keys_again_and_multiply_no_more() -> None:
    model = tiny.model()
    whole, _ = counted(model, [12])
    chunks, logits = counted(model, [4, 4, 4])
    assert whole.scores[0] == chunks.scores[0] == 78
    assert (whole.rows_read[0], chunks.rows_read[0]) == (12, 4 + 8 + 12)
    torch.testing.assert_close(logits, model(tiny.ids(12)), atol=1e-4, rtol=1e-4)


def test_other_rules_are_refused() -> None:
    x = torch.ones(1, 2, 4)
    with pytest.raises(RequestError, match="causal"):
        CountedAttention().attend(0, x, x, x, AttentionRule(window=2))

"""Packed weights against plain linear layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from engine import helpers
from gristmill.engine.engine import Engine
from gristmill.engine.onednn import PackedLinear, can_pack, pack_linears
from model import tiny

pytestmark = pytest.mark.skipif(not can_pack(tiny.model()), reason="this build of torch has no oneDNN")


@pytest.mark.parametrize("shape", [(48, 64), (33, 7), (1, 5), (128, 300)], ids=str)
@torch.inference_mode()
def test_packed_equals_linear_for_any_number_of_rows(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(*shape, bias=False)
    packed = PackedLinear(plain.weight)
    assert packed.out_features == shape[1]
    for rows in range(1, 301):
        x = torch.randn(rows, shape[0])
        assert torch.allclose(packed(x), plain(x), atol=1e-4)


@torch.inference_mode()
def test_packed_bfloat16_stays_within_its_rounding() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(96, 80, bias=False, dtype=torch.bfloat16)
    if not can_pack(plain):
        pytest.skip("no bfloat16 here")
    packed = PackedLinear(plain.weight)
    for rows in (1, 2, 17, 300):
        x = torch.randn(rows, 96, dtype=torch.bfloat16)
        exact = x.float() @ plain.weight.float().T
        found = packed(x)
        assert found.dtype == torch.bfloat16
        assert float((found.float() - exact).abs().max()) <= 2**-8 * float(exact.abs().max())


@pytest.mark.parametrize("tied", [True, False])
@torch.inference_mode()
def test_packing_replaces_every_linear_layer_and_keeps_the_logits(tied: bool) -> None:
    model = tiny.model(tie_word_embeddings=tied)
    packed = copy.deepcopy(model)
    pack_linears(packed)
    kinds = [type(module) for module in packed.modules()]
    assert nn.Linear not in kinds
    assert kinds.count(PackedLinear) == 4 * model.config.num_hidden_layers + 1
    for count in (1, 2, 30):
        tokens = tiny.ids(count)
        assert torch.allclose(packed(tokens), model(tokens), atol=1e-3)


def test_layers_with_a_bias_are_left_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 5, bias=False)))
    pack_linears(model)
    assert isinstance(model[0], nn.Linear)
    assert isinstance(model[1][0], PackedLinear)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_are_not_packed(dtype: torch.dtype) -> None:
    assert not can_pack(nn.Linear(3, 4, dtype=dtype))


def test_greedy_tokens_are_those_of_the_plain_layers() -> None:
    packed = copy.deepcopy(helpers.model())
    pack_linears(packed)
    engine = Engine(packed, helpers.tokenizer(), kv_cache_tokens=512, max_num_batched_tokens=20)
    prompts = [helpers.prompt(length, length) for length in (1, 20, 33)]
    outputs = helpers.run(engine, [(ids, helpers.greedy(max_tokens=30)) for ids in prompts])
    assert [o.outputs[0].token_ids for o in outputs] == [helpers.plain_greedy(ids, 30) for ids in prompts]

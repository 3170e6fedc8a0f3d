"""The native step against the model itself, for weights that are already quantised."""

from __future__ import annotations

import pytest
import torch

from gristmill.engine.memory.paged_cache import Chunk
from gristmill.engine.native.decoder import native_refusal
from gristmill.engine.native.linear import NativeLinear
from gristmill.engine.native.runner import NativeRunner
from gristmill.model.quantised.quantise import quantise_model
from model import tiny

pytestmark = pytest.mark.peer  # needs a C++ compiler


def test_int8_weights_are_not_told_from_the_model_that_has_them() -> None:
    """w8a8 rounds activations and is far outside this tolerance."""
    model, ids = tiny.model(), tiny.ids(9)
    if refusal := native_refusal(model):
        pytest.skip(refusal)
    quantise_model(model, "int8")
    expected = model(ids)
    runner = NativeRunner(model, "int8_weights", num_blocks=4, block_size=4, release=True)
    tokens, tables = ids.tolist(), [2, 0, 3]
    logits = torch.cat(
        [
            runner.logits(runner.hidden_states(tokens[begin:end], [Chunk(tables, begin, end - begin)])).clone()
            for begin, end in ((0, 1), (1, 9))
        ]
    )
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    kinds = {layer.kind for layer in model.modules() if isinstance(layer, NativeLinear)}
    assert kinds == {"int8_weights"}

"""Operations of a training step, against those that torch runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gristmill.errors import GristmillError
from gristmill.model.config import ModelConfig
from gristmill.objectives.compute import step_flops
from gristmill.objectives.taxonomy import Symbols
from programs import program

EFFECTS = program("effects")
SIZE = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=128,
    max_position_embeddings=64,
)
MARKS = tuple(range(4, 20))
SYMBOLS = Symbols(size=512, cls=1, sep=2, mask=3, start=0, sentinels=MARKS, sentence_ends=frozenset())


class Counted(TorchDispatchMode):
    """Operations by kind. Torch's own counter refuses modules that run without gradient between others with one, and
    knows no product that adds in place."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        rule = flop_registry.get(torch.ops.aten.addmm if packet is torch.ops.aten.addmm_ else packet)
        if rule is not None:
            count = rule(*args, **(kwargs or {}), out_val=out)
            self.found[str(packet)] = self.found.get(str(packet), 0) + count
        return out


@pytest.mark.parametrize("name", EFFECTS.OBJECTIVES)
def test_a_step_costs_what_torch_counts_within_one_percent(name: str) -> None:
    objective, model = EFFECTS.build(name, SIZE, SYMBOLS)
    model.initialise(0)
    draw = np.random.default_rng(0)
    documents = [(draw.integers(20, 512, 62), None) for _ in range(128)]  # framed 64 long: nothing is rounded up
    batch = objective.prepare(documents, [(0, number) for number in range(len(documents))])
    with sdpa_kernel(SDPBackend.MATH), Counted() as counted:
        torch.stack(list(objective.loss_sums(model, batch).values())).sum().backward()
    total = sum(counted.found.values())
    if name == "causal LM":  # the plain kernel computes the masked half too
        total -= counted.found["aten.bmm"] * 61 / 62 / 2
    assert step_flops(model, batch) == pytest.approx(total, rel=0.01)


def test_another_model_is_refused() -> None:
    with pytest.raises(GristmillError, match="Linear"):
        step_flops(torch.nn.Linear(2, 2), None)

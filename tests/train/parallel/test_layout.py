"""Which layouts there are, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gristmill.errors import GristmillError
from gristmill.model.config import AttentionConfig, FeedForwardConfig, LayerConfig, MoEConfig, PositionConfig
from gristmill.train.config import TrainConfig
from gristmill.train.parallel import Parallel, start
from gristmill.train.parallel.slices import Slice
from train.parallel.small import LLAMA


def test_data_takes_the_processes_that_the_others_leave() -> None:
    layout = Parallel(data=None, shard=2, tensor=2).resolve(12)
    assert layout.data == 3
    assert layout.sizes == (1, 3, 1, 2, 1, 2)
    assert layout.shares == 6


@pytest.mark.parametrize(
    ("layout", "processes"), [(Parallel(data=2, tensor=2), 8), (Parallel(data=None, tensor=3), 4), (Parallel(), 2)]
)
def test_a_layout_of_another_size_is_refused(layout: Parallel, processes: int) -> None:
    with pytest.raises(GristmillError, match=f"does not fit {processes} processes"):
        layout.resolve(processes)


@pytest.mark.parametrize("sizes", [{"tensor": 0}, {"shard": 1.5}, {"sequence": True}, {"expert": 2, "shard": 2}])
def test_sizes_that_mean_nothing_are_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(GristmillError, match="parallel"):
        Parallel(**sizes)


MIXTURE = FeedForwardConfig(moe=MoEConfig(num_experts=6, top_k=2, intermediate_size=8))


@pytest.mark.parametrize(
    ("layout", "changes", "told"),
    [
        (Parallel(tensor=4), {}, r"parallel.tensor \(4\) must divide num_key_value_heads \(2\)"),
        (Parallel(tensor=3), {}, r"must divide num_attention_heads \(4\)"),
        (Parallel(tensor=2), {"intermediate_size": 49}, r"must divide intermediate_size \(49\)"),
        (Parallel(tensor=2), {"feed_forward": MIXTURE}, "mixture of experts"),
        (Parallel(tensor=2), {"positions": PositionConfig(bias="alibi")}, "bias per head"),
        (Parallel(tensor=2), {"attention": AttentionConfig(qk_norm="full")}, "full projection"),
        (Parallel(tensor=2), {"layers": (LayerConfig(mixer="linear"), LayerConfig())}, "recurrent"),
        (Parallel(expert=2), {}, "no mixture of experts"),
        (Parallel(expert=4), {"feed_forward": MIXTURE}, r"must divide moe.num_experts \(6\)"),
        (Parallel(pipeline=3), {}, r"more than the model's 2 layers"),
    ],
)
def test_a_model_that_cannot_be_split_so_is_refused_by_name(
    layout: Parallel, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(GristmillError, match=told):
        layout.check_model(replace(LLAMA, **changes))
    Parallel(data=8, shard=8).check_model(replace(LLAMA, **changes))


@pytest.mark.parametrize("options", [{"optimiser": "muon"}, {"optimiser": "adafactor"}, {"precision": "float16"}])
def test_options_that_need_whole_weights_are_refused_with_split_ones(options: dict[str, Any]) -> None:
    config = TrainConfig(steps=1, **options)
    Parallel(data=8).check_run(config)
    with pytest.raises(GristmillError, match=next(iter(options.values()))):
        Parallel(shard=2).check_run(config)


def test_without_torchrun_the_error_says_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(GristmillError, match="torchrun --nproc-per-node"):
        start(Parallel(), "cpu")


def test_restarts_that_would_meet_the_dead_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    torchrun |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(GristmillError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        start(Parallel(), "cpu")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 5), st.integers(0, 1))
def test_parts_join_to_the_whole(sections: list[int], parts: int, dim: int) -> None:
    whole = torch.arange(sum(sections) * 3).view(sum(sections), 3)
    whole = whole if dim == 0 else whole.T.contiguous()
    cut = Slice("tensor", dim, tuple(sections))
    taken = [cut.take(whole, part, parts) for part in range(parts)]
    assert torch.equal(cut.join(taken), whole)
    assert [part.shape[dim] for part in taken] == [sum(cut.sizes(part, parts)) for part in range(parts)]

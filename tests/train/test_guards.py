"""Bad steps are seen, bad batches kept whole, and advice against too little memory has the right figures."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from gristmill.errors import CheckpointError, GristmillError
from gristmill.model.attention.packed import PackedAttention
from gristmill.model.transformer import Transformer
from gristmill.train.guards import SpikeDetector, activation_bytes, dump_batch, memory_advice
from train.toy import CONFIG, toy_config, toy_loader, toy_model

LOSSES = st.lists(st.floats(0.1, 12.0), min_size=4, max_size=40)


def filled(losses: list[float], **options: Any) -> SpikeDetector:
    detector = SpikeDetector(**options)
    for loss in losses:
        detector.accept(loss, 1.0)
    return detector


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_bad_from_the_first_step_on(value: float) -> None:
    for detector in (SpikeDetector(), SpikeDetector(threshold=None)):
        assert "loss" in (detector.check(value, 1.0) or "")
        assert "gradient norm" in (detector.check(1.0, value) or "")
        with pytest.raises(GristmillError, match="cannot be accepted"):
            detector.accept(value, 1.0)


def test_an_injected_spike_is_seen_at_the_stated_threshold() -> None:
    # median 3, absolute deviations 1, 0, 1, 0 ...: their median is 0.5, so one robust deviation is 0.7413
    losses = [2.0, 3.0, 4.0, 3.0] * 4
    detector = filled(losses, window=16, threshold=4.0)
    border = 3.0 + 4.0 * 1.4826 * 0.5
    assert detector.check(border - 1e-9, 1.0) is None
    assert "4.0 deviations above 3" in (detector.check(border + 1e-6, 1.0) or "")
    assert filled(losses, window=16, threshold=None).check(1e9, 1.0) is None


def test_a_falling_or_even_loss_is_fine_and_a_short_history_says_nothing() -> None:
    detector = SpikeDetector(window=16)
    for step in range(100):
        loss = 8.0 * 0.97**step
        assert detector.check(loss, 1.0) is None
        detector.accept(loss, 1.0)
    assert filled([2.0] * 16, window=16, threshold=8.0).check(2.1, 1.0) is None
    assert filled([2.0] * 16, window=16, threshold=8.0).check(2.2, 1.0) is not None
    assert filled([2.0] * 3, window=16).check(1e6, 1.0) is None


@given(LOSSES, st.floats(0.1, 50.0), st.integers(4, 20))
def test_a_detector_saved_as_json_decides_the_same(losses: list[float], loss: float, window: int) -> None:
    detector = filled(losses, window=window, threshold=3.0)
    other = SpikeDetector(window=window, threshold=3.0)
    other.load_state(json.loads(json.dumps(detector.state())))
    assert other.check(loss, 1.0) == detector.check(loss, 1.0)
    assert other.state() == detector.state() == {"losses": losses[-window:]}


@pytest.mark.parametrize("state", [{}, {"losses": "many"}, {"losses": [1.0, math.nan]}])
def test_a_broken_state_and_wrong_options_are_refused(state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="spike detector"):
        SpikeDetector().load_state(state)
    with pytest.raises(GristmillError, match="window"):
        SpikeDetector(window=3)
    with pytest.raises(GristmillError, match="spike"):
        SpikeDetector(threshold=0.0)


@dataclass
class Pair:
    """A batch of two parts."""

    left: Any
    flags: Tensor
    names: tuple[str, ...]
    rates: np.ndarray


def test_a_dumped_batch_reads_back_whole(tmp_path: Path) -> None:
    packed = toy_loader(mask=True).batch(0)
    pair = Pair(packed, torch.tensor([[True, False]]).T, ("a", "b"), np.array([0.5, math.nan]))
    path = dump_batch(tmp_path, 12, [packed, pair], "loss nan", rank=3)
    assert path == tmp_path / "bad_batches" / "step-00000012-rank-3"
    facts = json.loads((path / "batch.json").read_text(encoding="utf-8"))
    tensors = load_file(path / "batches.safetensors")
    assert (facts["step"], facts["why"], facts["rank"]) == (12, "loss nan", 3)
    for place, prefix in ((facts["batches"][0], "0"), (facts["batches"][1]["left"], "1.left")):
        assert place["segment_lengths"] == list(packed.segment_lengths)
        for name in ("input_ids", "target_ids", "position_ids"):
            assert place[name] == {"tensor": f"{prefix}.{name}"}
            assert torch.equal(tensors[f"{prefix}.{name}"], getattr(packed, name))
    assert facts["batches"][1]["names"] == ["a", "b"]
    assert torch.equal(tensors["1.flags"], pair.flags)
    assert np.array_equal(tensors["1.rates"].numpy(), pair.rates, equal_nan=True)


def test_a_batch_that_cannot_be_kept_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(GristmillError, match=r"0\.names is a set"):
        dump_batch(tmp_path, 1, [Pair(1, torch.ones(1), {"a"}, np.ones(1))], "")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_memory_advice_counts_the_weights_and_offers_only_what_is_left_to_do() -> None:
    with torch.device("meta"):
        model = Transformer(replace(CONFIG, hidden_size=512, intermediate_size=1024))
    fixed = 4 * sum(p.numel() for p in model.parameters()) * 4  # weight, gradient and AdamW's two, four bytes each
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    text = memory_advice(error, toy_config(micro_batches=3), model, 4096)
    assert "Tried to allocate 2.00 GiB." in text
    assert "more\n" not in text
    assert f"{fixed / 2**20:.1f} MiB" in text
    assert "micro_batches (3 now)" in text
    assert "precision bfloat16" in text
    assert "checkpoint_activations" in text
    spare = toy_config(precision="bfloat16", checkpoint_activations=True, optimiser="sgd", background_checkpoints=False)
    text = memory_advice(MemoryError(), spare, model, 4096)
    assert "MemoryError" in text
    assert not any(word in text for word in ("precision", "checkpoint_activations", "optimiser lion", "background"))


def test_the_activations_of_the_advice_are_near_those_autograd_keeps() -> None:
    model, kept = toy_model(), {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden_states(torch.arange(1024) % 24, None, PackedAttention([64] * 16), 64)
    counted = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    assert activation_bytes(model, 1024, toy_config()) == pytest.approx(counted, rel=0.25)

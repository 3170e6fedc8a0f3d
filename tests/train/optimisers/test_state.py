"""Named optimiser state: complete, strict, and exact to go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gristmill.errors import CheckpointError
from gristmill.train.optimisers import load_optimiser_tensors, make_optimiser, optimiser_tensors
from train.optimisers.small import NAMES, copy_weights, equal, set_gradients, small_model, walk

MOMENTUM: dict[str, float] = {"sgd": 0.9}


def made(model: torch.nn.Module, name: Any) -> torch.optim.Optimizer:
    return make_optimiser(model, name, learning_rate=1e-2, momentum=MOMENTUM.get(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_bit_for_bit(name: str, steps: int, dtype: torch.dtype, tmp_path: Path) -> None:
    model, other = small_model(0, dtype), small_model(1, dtype)
    optimiser, fresh = made(model, name), made(other, name)
    walk(other, fresh, range(7, 8))  # what is loaded replaces what was there
    names = optimiser_tensors(model, optimiser).keys()
    walk(model, optimiser, range(steps))
    tensors = optimiser_tensors(model, optimiser)
    assert tensors.keys() == names
    save_file(tensors, tmp_path / "state.safetensors")
    copy_weights(model, other)
    walk(model, optimiser, range(steps, steps + 2))
    load_optimiser_tensors(other, fresh, load_file(tmp_path / "state.safetensors"))
    walk(other, fresh, range(steps, steps + 2))
    assert equal(model, other)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_state_is_left_out(name: str) -> None:
    model = small_model()
    optimiser = made(model, name)
    walk(model, optimiser, range(1))
    held = [value for state in optimiser.state.values() for value in state.values()]
    tensors = optimiser_tensors(model, optimiser)
    assert {id(value) for value in held} == {id(value) for value in tensors.values()}


def test_names_are_of_weights_and_keys() -> None:
    model = small_model(0, torch.bfloat16)
    names = optimiser_tensors(model, made(model, "muon")).keys()
    assert {"layers.0.self_attn.o_proj.weight.momentum_buffer", "norm.weight.exp_avg_sq", "norm.weight.step"} <= names
    assert {"norm.weight.master", "layers.0.mlp.down_proj.master"} <= names


@pytest.mark.parametrize("name", NAMES)
def test_weights_without_gradient_keep_their_place(name: str) -> None:
    """A weight that no batch has used yet is in the file, and begins afresh after loading as it would have."""
    model, other = small_model(0), small_model(0)
    optimiser, fresh = made(model, name), made(other, name)
    set_gradients(model, 0)
    model.layers[0].mlp.down_proj.grad = model.norm.weight.grad = None
    optimiser.step()
    copy_weights(model, other)
    load_optimiser_tensors(other, fresh, optimiser_tensors(model, optimiser))
    walk(model, optimiser, range(1, 3))
    walk(other, fresh, range(1, 3))
    assert equal(model, other)


def test_frozen_weights_have_no_state() -> None:
    model = small_model()
    model.embed_tokens.requires_grad_(False)
    assert not [n for n in optimiser_tensors(model, made(model, "adamw")) if n.startswith("embed_tokens")]


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_named_and_changes_nothing(name: str) -> None:
    model = small_model()
    optimiser = made(model, name)
    walk(model, optimiser, range(2))
    before = {key: value.clone() for key, value in optimiser_tensors(model, optimiser).items()}
    victim = next(key for key in before if key.startswith("layers.1.self_attn.o_proj.weight."))
    zeros = {key: torch.zeros_like(value) for key, value in before.items()}
    for broken in (
        {key: value for key, value in zeros.items() if key != victim},
        zeros | {victim + "x": torch.zeros(1)},
        zeros | {victim: torch.zeros(3, 5, 7)},
        zeros | {victim: zeros[victim].bfloat16()},
    ):
        with pytest.raises(CheckpointError, match=f"here.*{victim}"):
            load_optimiser_tensors(model, optimiser, broken, where="here")
    after = optimiser_tensors(model, optimiser)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_state_of_another_optimiser_is_refused() -> None:
    model = small_model()
    with pytest.raises(CheckpointError, match="exp_avg"):
        load_optimiser_tensors(model, made(model, "muon"), optimiser_tensors(model, made(model, "lion")))
    with pytest.raises(TypeError, match="RMSprop"):
        optimiser_tensors(model, torch.optim.RMSprop(model.parameters()))

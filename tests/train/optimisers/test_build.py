"""Which weight each optimiser updates, how, and that its steps are those of the reference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gristmill.errors import GristmillError
from gristmill.train.optimisers import make_optimiser
from gristmill.train.optimisers.build import hidden_matrices
from gristmill.train.optimisers.combined import Combined
from gristmill.train.optimisers.lion import Lion
from gristmill.train.optimisers.muon import StackedMuon, orthogonalise
from train.optimisers.small import NAMES, copy_weights, equal, set_gradients, small_model, walk


class One(nn.Module):
    """One weight of any shape."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)


def by_group(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group for group in optimiser.param_groups for p in group["params"]}


@pytest.mark.parametrize("name", NAMES)
def test_matrices_decay_and_vectors_do_not(name: Any) -> None:
    model = small_model()
    groups = by_group(model, make_optimiser(model, name, learning_rate=1e-3, weight_decay=0.3))
    assert groups.keys() == dict(model.named_parameters()).keys()
    for weight, group in groups.items():
        decays = not weight.endswith("norm.weight")  # embedding, head and router decay too
        assert group["weight_decay"] == (0.3 if decays else 0.0), weight


@pytest.mark.parametrize("name", NAMES)
def test_decay_is_decoupled_from_the_gradients(name: Any) -> None:
    model, start = small_model(), small_model()
    optimiser = make_optimiser(model, name, learning_rate=0.01, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    for weight, before in zip(model.parameters(), start.parameters(), strict=True):
        expected = before * (1 - 0.01 * 0.5) if before.ndim >= 2 else before
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-8)


def test_frozen_weights_are_left_out() -> None:
    model = small_model()
    model.embed_tokens.requires_grad_(False)
    assert "embed_tokens.weight" not in by_group(model, make_optimiser(model, "adamw", learning_rate=1e-3))
    model.requires_grad_(False)
    with pytest.raises(GristmillError, match="no weight to train"):
        make_optimiser(model, "adamw", learning_rate=1e-3)


def test_muon_takes_the_blocks_matrices_and_stacks() -> None:
    model = small_model()
    kinds = {
        name: type(part).__name__
        for part in make_optimiser(model, "muon", learning_rate=1e-3).parts  # type: ignore[attr-defined]
        for name in by_group(model, part)
    }
    for name, parameter in model.named_parameters():
        inside, owner = name.startswith("layers.") and parameter.ndim >= 2, kinds[name]
        assert owner == ({2: "Muon", 3: "StackedMuon"}[parameter.ndim] if inside else "AdamW"), name
    assert {"lm_head.weight", "embed_tokens.weight", "layers.0.mlp.down_proj"} <= kinds.keys()


def test_muon_leaves_convolutions_and_decay_rates_to_adamw() -> None:
    model = small_model()
    block = model.layers[0]
    block.conv, block.A_log = nn.Conv1d(4, 4, 3, groups=4), nn.Parameter(torch.zeros(4, 4))
    chosen = hidden_matrices(model)
    assert block.conv.weight not in chosen
    assert block.A_log not in chosen
    assert block.self_attn.qkv_proj.weight in chosen


def test_muon_refuses_a_model_without_hidden_matrices() -> None:
    with pytest.raises(GristmillError, match="no hidden matrix"):
        make_optimiser(One(torch.ones(3, 3)), "muon", learning_rate=1e-3)


def test_adamw_equals_torch() -> None:
    """Fused and in groups, it is the plain AdamW of torch."""
    model, other = small_model(), small_model()
    plain = [
        torch.optim.AdamW(
            [p for p in other.parameters() if (p.ndim >= 2) == decays],
            lr=1e-2,
            betas=(0.8, 0.97),
            weight_decay=0.2 if decays else 0.0,
            foreach=False,
        )
        for decays in (True, False)
    ]
    optimiser = make_optimiser(model, "adamw", learning_rate=1e-2, betas=(0.8, 0.97), weight_decay=0.2)
    for number in range(5):
        for each in (model, other):
            set_gradients(each, number)
        for part in (optimiser, *plain):
            part.step()
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


def test_sgd_is_the_delta_rule() -> None:
    """The worked number: L = theta^2 at 1 with rate 0.1 gives 0.8; and many steps equal torch.optim.SGD."""
    model, other = One(torch.ones(1)), One(torch.ones(1))
    optimiser = make_optimiser(model, "sgd", learning_rate=0.1, weight_decay=0.0)
    reference = torch.optim.SGD(other.parameters(), lr=0.1)
    model.weight.square().sum().backward()
    optimiser.step()
    assert model.weight.item() == pytest.approx(0.8)
    other.weight.square().sum().backward()
    reference.step()
    for _ in range(9):
        for each, part in ((model, optimiser), (other, reference)):
            part.zero_grad()
            each.weight.square().sum().backward()
            part.step()
    assert torch.equal(model.weight, other.weight)
    assert model.weight.item() == pytest.approx(0.8**10)


def test_lion_follows_its_recursion() -> None:
    """Two steps by hand: rate 0.1, decay 0.5, betas 0.9 and 0.5. The sign is of 0.1 g + 0.9 m."""
    weight = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimiser = Lion([weight], lr=0.1, betas=(0.9, 0.5), weight_decay=0.5)
    for gradient, expected, mean in [
        ([2.0, -4.0], [0.95 - 0.1, 0.95 + 0.1], [1.0, -2.0]),
        # the mean outvotes a gradient of the other sign, unless that is more than nine times as great
        ([-8.0, 19.0], [0.85 * 0.95 - 0.1, 1.05 * 0.95 - 0.1], [-3.5, 8.5]),
    ]:
        weight.grad = torch.tensor(gradient)
        optimiser.step()
        torch.testing.assert_close(weight.detach(), torch.tensor(expected))
        torch.testing.assert_close(optimiser.state[weight]["exp_avg"], torch.tensor(mean))


@pytest.mark.parametrize("shape", [(3, 24, 12), (3, 12, 24)])
def test_muon_on_a_stack_is_torch_muon_on_each_matrix(shape: tuple[int, ...]) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stack, single = nn.Parameter(start.clone()), [nn.Parameter(matrix.clone()) for matrix in start]
    ours = StackedMuon([stack], lr=1e-2, momentum=0.9, weight_decay=0.3)
    torchs = torch.optim.Muon(single, lr=1e-2, momentum=0.9, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for number in range(3):
        stack.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1 + number))
        for matrix, gradient in zip(single, stack.grad, strict=True):
            matrix.grad = gradient
        ours.step()
        torchs.step()
    # products are of bfloat16: their rounding may differ by the kernel
    torch.testing.assert_close(stack.detach(), torch.stack([m.detach() for m in single]), rtol=0, atol=2e-4)
    assert (stack - start).abs().max() > 1e-2


def test_orthogonalised_matrices_keep_their_singular_vectors() -> None:
    stack = torch.randn(4, 8, 20, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(stack, full_matrices=False)
    inner = left.mT @ orthogonalise(stack).float() @ right.mT  # diagonal when the singular vectors are the same
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.5
    assert values.max() < 1.5
    assert (inner - torch.diag_embed(values)).abs().max() < 0.05


def test_muon_scale_is_of_its_groups_alone() -> None:
    model = small_model()
    optimiser = make_optimiser(model, "muon", learning_rate=1e-3, muon_scale=4.0)
    scales = {name: group["scale"] for name, group in by_group(model, optimiser).items()}
    assert scales["layers.1.self_attn.o_proj.weight"] == scales["layers.1.mlp.gate_up_proj"] == 4.0
    assert scales["lm_head.weight"] == scales["norm.weight"] == 1.0


def test_combined_steps_as_its_parts_would_alone() -> None:
    model, other = small_model(), small_model()
    hidden = hidden_matrices(other)
    parts = [
        torch.optim.SGD([{"params": [p for p in other.parameters() if p in hidden], "scale": 2.0}], momentum=0.5),
        torch.optim.SGD([{"params": [p for p in other.parameters() if p not in hidden], "scale": 1.0}]),
    ]
    hidden = hidden_matrices(model)
    combined = Combined(
        [
            torch.optim.SGD([{"params": [p for p in model.parameters() if p in hidden], "scale": 2.0}], momentum=0.5),
            torch.optim.SGD([{"params": [p for p in model.parameters() if p not in hidden], "scale": 1.0}]),
        ]
    )
    walk(model, combined, range(4))
    for part in parts:
        walk(other, part, range(4))  # each sees the same gradients and moves its own weights
    assert equal(model, other)


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_go_on_bit_for_bit(name: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, other = small_model(0, dtype), small_model(1, dtype)
        optimiser, fresh = (make_optimiser(each, name, learning_rate=1e-2) for each in (model, other))
        walk(model, optimiser, range(3))
        copy_weights(model, other)
        fresh.load_state_dict(copy.deepcopy(optimiser.state_dict()))  # torch shares the tensors
        walk(model, optimiser, range(3, 5))
        walk(other, fresh, range(3, 5))
        assert equal(model, other)


@pytest.mark.parametrize("name", NAMES)
def test_small_updates_of_16_bit_weights_add_up(name: Any) -> None:
    """A weight in bfloat16 is the rounded float32 one at every step, and no gradient of it stays."""
    model = small_model(0, torch.bfloat16)
    wide = small_model(0, torch.bfloat16).float()
    ours, theirs = make_optimiser(model, name, learning_rate=1e-4), make_optimiser(wide, name, learning_rate=1e-4)
    for number in range(4):
        set_gradients(model, number)
        for new, old in zip(wide.parameters(), model.parameters(), strict=True):
            new.grad = old.grad.float()  # type: ignore[union-attr]
        for optimiser in (ours, theirs):
            optimiser.step()
            optimiser.zero_grad()
        for weight, exact in zip(model.parameters(), wide.parameters(), strict=True):
            assert torch.equal(weight, exact.bfloat16())
            assert weight.grad is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamv", {}, "Did you mean adamw"),
        ("sgd", {"betas": (0.9, 0.99)}, "sgd has no betas"),
        ("adafactor", {"betas": (0.9, 0.99)}, "adafactor has no betas"),
        ("adamw", {"momentum": 0.9}, "adamw has no momentum"),
        ("adamw", {"muon_scale": 2.0}, "muon_scale is of"),
        ("muon", {"muon_scale": 0.0}, "muon_scale must be above 0"),
        ("adamw", {"betas": (0.9, 1.0)}, "betas must be in"),
        ("sgd", {"momentum": -0.1}, "momentum must be in"),
    ],
)
def test_an_option_that_cannot_be_applied_is_refused(name: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(GristmillError, match=message):
        make_optimiser(small_model(), name, learning_rate=1e-3, **options)

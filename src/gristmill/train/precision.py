"""What a training step computes in, and the loss scale that float16 needs.

| name | weights | products | masters and optimiser state |
|---|---|---|---|
| float32 | float32 | float32 | float32 |
| bfloat16 | float32 | bfloat16, by autocast | float32 |
| float16 | float32 | float16, by autocast, loss scaled | float32 |
| pure_bfloat16 | bfloat16 | bfloat16 throughout | float32 (gristmill.train.optimisers.masters) |

In each of them a small step is added to a float32 number, so it is not lost. pure_bfloat16 casts no weight in the
forward pass and its gradients take half the memory; they are also accumulated in bfloat16, so prefer few micro-batches.

Source: Micikevicius et al. 2018.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from gristmill.errors import GristmillError, closest
from gristmill.model.formats.state import check_shapes

PrecisionName = Literal["float32", "bfloat16", "pure_bfloat16", "float16"]

_SMALLEST_SCALE = 2.0**-16


class Precision:
    """`prepare` the model once. A step: the loss under `forward`; `scale(loss).backward()`; `unscale`; clip; `step`.

    `device` is where the gradients are. Raises GristmillError for an unknown name.
    """

    def __init__(
        self,
        name: PrecisionName,
        device: str | torch.device,
        *,
        initial_scale: float = 2.0**16,
        growth_every: int = 2000,
    ) -> None:
        known = get_args(PrecisionName)
        if name not in known:
            raise GristmillError(f"precision must be one of {', '.join(known)}, got {name!r}.{closest(name, known)}")
        self.name = name
        self._unscaled = False  # gradients were unscaled and no step was made of them
        self._scaler = torch.amp.GradScaler(
            torch.device(device).type, init_scale=initial_scale, growth_interval=growth_every, enabled=name == "float16"
        )

    def prepare(self, model: nn.Module) -> None:
        """Give the weights their type, in place; buffers keep theirs. Before the optimiser is made."""
        for weight in model.parameters():
            if weight.is_floating_point():
                weight.data = weight.data.to(torch.bfloat16 if self.name == "pure_bfloat16" else torch.float32)

    def forward(self, device: str | torch.device) -> AbstractContextManager[object]:
        """The context of the forward pass and the loss on `device`."""
        if self.name in ("float32", "pure_bfloat16"):
            return nullcontext()
        return torch.autocast(torch.device(device).type, torch.float16 if self.name == "float16" else torch.bfloat16)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, to call backward on."""
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def unscale(self, optimiser: torch.optim.Optimizer) -> None:
        """Divide the gradients by the loss scale. Once a step, after the last backward and before clipping."""
        self._close()
        self._scaler.unscale_(optimiser)
        self._unscaled = True

    def expects(self, loss: float, norm: float) -> bool:
        """Whether gradients of this norm are an overflow that `step` deals with, and no reason for alarm: those of a
        finite loss are, as no smaller scale mends a loss."""
        return self.name == "float16" and math.isfinite(loss) and not math.isfinite(norm)

    def step(self, optimiser: torch.optim.Optimizer) -> bool:
        """Step; False when float16 gradients had overflowed: no weight has changed then and the loss scale is halved.

        Raises GristmillError once the scale is so small that it cannot be the overflow's cause.
        """
        before = self._scaler.get_scale()
        self._scaler.step(optimiser)
        self._scaler.update()
        self._unscaled = False
        after = self._scaler.get_scale()
        if after < _SMALLEST_SCALE:
            raise GristmillError(
                f"float16: gradients are not finite even at a loss scale of {after:g}; "
                "try precision bfloat16 or a smaller learning rate"
            )
        return after >= before

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold besides weights and optimiser: scalars in float32; none but for float16."""
        if self.name != "float16":
            return {}
        self._close()  # a run that goes on from here knows nothing of gradients that were dropped
        state = self._scaler.state_dict()
        keys = {"loss_scale": "scale", "loss_scale.steps": "_growth_tracker"}
        return {name: torch.tensor(float(state[key]), dtype=torch.float32) for name, key in keys.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor], where: str = "loss scale") -> None:
        """Put back what `tensors` gave. Raises CheckpointError for a missing or surplus one."""
        check_shapes({name: tensor.shape for name, tensor in self.tensors().items()}, tensors, where)
        if self.name == "float16":
            self._close()
            state = self._scaler.state_dict()
            state |= {"scale": float(tensors["loss_scale"]), "_growth_tracker": int(tensors["loss_scale.steps"])}
            self._scaler.load_state_dict(state)

    def _close(self) -> None:
        """End the scaler's step, also one whose gradients were dropped."""
        if self._unscaled:
            self._scaler.update()
        self._unscaled = False

"""Linear layers with weights packed once for oneDNN.

For one token a matrix product is bound by reading the weights; PyTorch's own float32 path reads them at half the
bandwidth that oneDNN's packed layout reaches, and packs them anew at every call for larger batches. The plain
`nn.Linear` stays the reference: results differ by rounding only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """x W' for a fixed W, without bias. Inference only: no gradient flows."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features = weight.shape[0]
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, in) -> (tokens, out)."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], None)
        return out


def can_pack(model: nn.Module) -> bool:
    """True when this build has oneDNN and the model is float32 or bfloat16 on the CPU."""
    weight = next(model.parameters())
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
    )


@torch.no_grad()
def pack_linears(module: nn.Module) -> None:
    """Replace every bias-free `nn.Linear` below `module`, in place. Each original weight is freed as it is packed."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) and getattr(child, "bias", None) is None:
            setattr(module, name, PackedLinear(child.weight))
        else:
            pack_linears(child)

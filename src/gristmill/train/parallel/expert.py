"""Expert parallelism: the experts of a mixture are dealt to a group of processes, and tokens travel to them and back.

Each process routes its own tokens, sends each to the processes of its experts, computes what it has received, and gets
the outputs of its own tokens back: two exchanges forward, two backward. No token is dropped, however uneven the
routing.

Source: Lepikhin et al. 2020 (GShard), section 3; dropless: Gale et al. 2023 (MegaBlocks).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gristmill.errors import GristmillError
from gristmill.model.moe import MixtureOfExperts
from gristmill.train.parallel.collectives import paired
from gristmill.train.parallel.mesh import Mesh
from gristmill.train.parallel.slices import Slice

_STACKED = ("gate_up_proj", "down_proj")


class SplitMixture(MixtureOfExperts):
    """A mixture of which this process holds the experts [rank * n / parts, (rank + 1) * n / parts).

    All processes of the group must call it equally often, as each call is an exchange.
    """

    def __init__(self, whole: MixtureOfExperts, group: dist.ProcessGroup) -> None:
        nn.Module.__init__(self)
        self.group, self.parts, self.part = group, dist.get_world_size(group), dist.get_rank(group)
        self.router, self.shared_expert = whole.router, whole.shared_expert
        self.act, self.grouped = whole.act, whole.grouped
        for name in _STACKED:
            weight: Tensor = getattr(whole, name)
            own = expert_slice(len(weight)).take(weight.detach(), self.part, self.parts)
            setattr(self, name, nn.Parameter(own, requires_grad=weight.requires_grad))

    def forward(self, x: Tensor) -> Tensor:
        """See `MixtureOfExperts.forward`."""
        flat = x.flatten(0, -2)
        routing = self.router(flat)
        order = routing.experts.flatten().argsort(stable=True)
        out = self._travel(flat[order // routing.experts.shape[1]], routing.counts())
        chosen = out[order.argsort()].unflatten(0, routing.experts.shape)
        y: Tensor = (chosen * routing.weights[..., None]).sum(dim=1).to(x.dtype).view_as(x)
        return y if self.shared_expert is None else y + self.shared_expert(x)

    def _travel(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Outputs of the experts for rows that are sorted by expert, `counts` (experts,) of each."""
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        here = arriving.view(self.parts, -1)  # of each process, rows for each expert of this one
        sent, received = self.sizes(counts.view(self.parts, -1), here, len(rows))
        rows = _exchange(rows, sent, received, self.group)
        # by process and then expert, as they came; the experts want them by expert
        own = torch.arange(here.shape[1], device=rows.device).repeat(self.parts)
        order = own.repeat_interleave(here.flatten(), output_size=len(rows)).argsort(stable=True)
        out = self._own_experts(rows[order], here.sum(dim=0))
        return _exchange(out[order.argsort()], received, sent, self.group)

    def sizes(self, leaving: Tensor, arriving: Tensor, rows: int) -> tuple[list[int], list[int]]:
        """Rows for and from each process, of counts (parts, own experts)."""
        sent, received = torch.stack((leaving.sum(dim=1), arriving.sum(dim=1))).tolist()
        return sent, received

    def _own_experts(self, rows: Tensor, counts: Tensor) -> Tensor:
        if len(rows) == 0:  # a product with nothing: the weights get gradients of zero, as unused experts always do
            used = self.gate_up_proj[:, :1, :0].sum() + self.down_proj[:, :1, :0].sum()
            return rows + used.to(rows.dtype)
        return self._grouped(rows, counts) if self._can_group(rows) else self._one_by_one(rows, counts)


def split_experts(model: nn.Module, mesh: Mesh) -> dict[str, Slice]:
    """Replace every mixture of a model by this process's part, in place; names stay.

    Returns which part of which parameter stands now. A token of any process counts in the gradient of its experts, so
    these are to be summed over "expert_replicas" alone. Raises GristmillError for experts that the group does not
    divide, and for a model without any.
    """
    group, slices = mesh.group("expert"), dict[str, Slice]()
    mixtures = {name: part for name, part in model.named_modules() if isinstance(part, MixtureOfExperts)}
    if not mixtures:
        raise GristmillError("parallel.expert splits mixtures of experts, and this model has none")
    for name, whole in mixtures.items():
        experts = len(whole.gate_up_proj)
        if experts % mesh.size("expert"):
            raise GristmillError(f"parallel.expert ({mesh.size('expert')}) must divide moe.num_experts ({experts})")
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, SplitMixture(whole, group))
        slices |= {f"{name}.{weight}": expert_slice(experts) for weight in _STACKED}
    return slices


def expert_slice(experts: int) -> Slice:
    """How a stack of so many experts is split."""
    return Slice("expert", 0, (experts,))


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """rows (sum of sent, size), in the order of their receivers -> (sum of received, size), of their senders."""

    def move(x: Tensor, out: list[int], into: list[int]) -> Tensor:
        found = x.new_empty((sum(into), *x.shape[1:]))
        dist.all_to_all_single(found, x.contiguous(), into, out, group=group)
        return found

    return paired(rows, lambda x: move(x, sent, received), lambda grad: move(grad, received, sent))

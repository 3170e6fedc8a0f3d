"""A LoRA adapter as kernels/adapter.h wants it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from gristmill.model.lora.low_rank import Lora, LowRank

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32
# the products of a layer, and the first of its places in AdapterLayer.parts and how many it has
_PRODUCTS = {
    "self_attn.qkv_proj": (0, 3),
    "self_attn.o_proj": (3, 1),
    "mlp.gate_up_proj": (4, 2),
    "mlp.down_proj": (6, 1),
}


class _LowRank(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("down", "up")),
        *((name, _INT) for name in ("begin", "rows", "rank", "unused")),
    )


class _AdapterLayer(ctypes.Structure):
    _fields_ = (("parts", _LowRank * 7),)


class NativeAdapter:
    """An adapter of a model whose executed layers are the blocks of `order`, and the memory that it points into."""

    def __init__(self, lora: Lora, order: Sequence[int]) -> None:
        self._held: list[object] = []
        self.low_size = 0
        """Most ranks of a product together."""
        blocks: dict[int, _AdapterLayer] = {block: _AdapterLayer() for block in order}
        for module, parts in lora.parts.items():
            _, block, product = module.split(".", 2)
            first, count = _PRODUCTS[product]
            assert len(parts) <= count, "more parts than the kernel has places for"
            for place, part in enumerate(parts, first):
                blocks[int(block)].parts[place] = self._part(part)
            self.low_size = max(self.low_size, sum(part.rank for part in parts))
        self._layers = (_AdapterLayer * len(order))(*(blocks[block] for block in order))
        self.address = ctypes.addressof(self._layers)
        """Of its layers."""

    def _part(self, part: LowRank) -> _LowRank:
        down, up = part.down.float().contiguous(), (part.up.float() * part.scale).T.contiguous()
        self._held += [down, up]
        return _LowRank(down.data_ptr(), up.data_ptr(), part.begin, len(part.up), part.rank, 0)

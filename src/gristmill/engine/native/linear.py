"""Linear layers whose weights are packed for the native kernels: float32, bfloat16, int8, int4 and int8_weights.

int8 multiplies weights of one scale per output channel with activations rounded to eight bits, one scale per token:
the same whole numbers as `gristmill.model.int8.Int8Linear`. int8_weights multiplies them with float32 activations as
they are, like `gristmill.model.quantised.linear.Int8WeightLinear`. int4 has a scale per group of inputs, for the
weights and for the activations of each token.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from gristmill.engine.native.build import require_native_library
from gristmill.errors import CheckpointError, RequestError, closest
from gristmill.model.quantised.weights import GROUP_SIZES, Int4Weight, Int8Weight, Weight, round_to_nearest

Kind = Literal["float32", "bfloat16", "int8", "int4", "int8_weights"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_FLOAT32, _BFLOAT16, _INT8, _INT4, _INT8_WEIGHTS, _FLOAT16 = range(6)  # enum Kind of kernels/linear.h
_ALIGNMENT = 64
_HUGE_PAGE = 2 << 20


class Int8Only(Int8Weight):
    """int8 weights whose product is with activations that are not rounded: what kind int8_weights packs."""


class LinearStruct(ctypes.Structure):
    """`Linear` of kernels/linear.h. It points into memory that its owner keeps."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("out_features", ctypes.c_int32),
        ("in_features", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("has_bias", ctypes.c_int32),
        ("weights", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """A packed layer: what C++ is told of it, and the memory that this points into."""

    struct: LinearStruct
    memory: Tensor


def of_kind(weight: Tensor, kind: Kind, group_size: int = 32) -> Tensor | Weight:
    """A floating weight (out, in) as a kind has it, rounded to nearest; `group_size` is for int4.

    Raises RequestError for an unknown kind or group size, CheckpointError for int8, int8_weights and int4 when a
    weight is not finite, and for int4 when groups do not divide the inputs.
    """
    if kind not in KINDS:
        raise RequestError(f"kind {kind!r} is not one of {', '.join(KINDS)}.{closest(kind, KINDS)}", field="kind")
    if kind in ("float32", "bfloat16"):
        return weight.detach().to(torch.float32 if kind == "float32" else torch.bfloat16)
    if group_size not in GROUP_SIZES:
        raise RequestError(f"group_size {group_size} is not one of {GROUP_SIZES}", field="group_size")
    rounded = round_to_nearest(weight, 4 if kind == "int4" else 8, group_size)
    if kind == "int8_weights" and isinstance(rounded, Int8Weight):
        return Int8Only(rounded.quantised, rounded.scale)
    return rounded


def packed_bytes(weight: Tensor | Weight, bias: Tensor | None = None) -> int:
    """Bytes that `pack` writes, a multiple of 64."""
    return int(_functions().gristmill_packed_bytes(ctypes.byref(_describe(weight, bias))))


def allocate(count: int) -> Tensor:
    """uint8 (count,) aligned to 64 bytes; large ones in huge pages where the system gives them, which read faster."""
    if count < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=torch.uint8)
    memory = mmap.mmap(-1, count + _HUGE_PAGE)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the mapping for as long as it is used
    skip = -whole.data_ptr() % _HUGE_PAGE
    return whole[skip : skip + count]


def pack(weight: Tensor | Weight, bias: Tensor | None = None, memory: Tensor | None = None) -> PackedLinear:
    """Pack a weight (out, in) on the CPU: a float32 or bfloat16 tensor, Int8Weight, Int8Only or Int4Weight.
    bias (out,).

    memory: uint8 (packed_bytes,) aligned to 64 to write to, part of a larger one perhaps; None allocates.
    Raises CheckpointError for another type, a shape that does not fit, or memory too small; NativeUnavailable.
    """
    functions = _functions()
    struct = _describe(weight, bias)
    size = functions.gristmill_packed_bytes(ctypes.byref(struct))
    memory = allocate(size) if memory is None else memory
    if memory.nbytes < size or memory.data_ptr() % _ALIGNMENT or not memory.is_contiguous():
        raise CheckpointError(f"packed weights need {size} bytes in one piece, aligned to {_ALIGNMENT}")
    values, scales = _canonical(weight)
    floats = None if bias is None else bias.detach().float().contiguous()
    functions.gristmill_pack(
        ctypes.byref(struct), values.data_ptr(), _pointer(scales), _pointer(floats), memory.data_ptr(), _threads()
    )
    return PackedLinear(struct, memory)


class NativeLinear(nn.Module):
    """x W' + bias with packed weights. Inference only: no gradient flows.

    A row's result does not depend on the rows beside it, nor on the number of threads. Int8Linear computes the same but
    for float rounding; float32 and bfloat16 differ from nn.Linear by the order of additions.
    """

    def __init__(self, weight: Tensor | Weight, bias: Tensor | None = None, memory: Tensor | None = None) -> None:
        """weight (out, in), memory: see `pack`; `of_kind` makes one of another kind."""
        super().__init__()
        self.packed = pack(weight, bias, memory)
        self.out_features = self.packed.struct.out_features
        self.in_features = self.packed.struct.in_features

    @property
    def kind(self) -> Kind:
        """What the weights are kept as."""
        kind: int = self.packed.struct.kind
        return KINDS[kind]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) on the CPU -> (..., out), in x's type; between, float32."""
        if x.shape[-1] != self.in_features or x.device.type != "cpu":
            raise ValueError(
                f"rows of {self.in_features} values on the CPU expected, got {tuple(x.shape)} on {x.device}"
            )
        rows = x.detach().reshape(-1, self.in_features).float().contiguous()
        out = torch.empty(len(rows), self.out_features)
        functions, layer = _functions(), ctypes.byref(self.packed.struct)
        scratch = torch.empty(functions.gristmill_rows_bytes(layer, len(rows)), dtype=torch.uint8)
        functions.gristmill_linear(layer, rows.data_ptr(), len(rows), scratch.data_ptr(), out.data_ptr(), _threads())
        return out.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def __deepcopy__(self, memo: object) -> NativeLinear:
        return self  # packed weights never change, and a copy's pointers would lead into the original


def argmax_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Index (rows,) int64 and value (rows,) of the largest of each row of float32 logits (rows, vocab), the first of
    equal ones. A row with a NaN has index -1 and value NaN."""
    logits = logits.contiguous()
    rows, vocab = logits.shape
    if logits.dtype != torch.float32 or vocab == 0:
        raise ValueError(f"logits of {vocab} float32 values a row expected, got {logits.dtype}")
    index, value = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    _functions().gristmill_argmax_rows(logits.data_ptr(), rows, vocab, index.data_ptr(), value.data_ptr(), _threads())
    return index, value


def _describe(weight: Tensor | Weight, bias: Tensor | None) -> LinearStruct:
    """The layer without its pointers. Raises CheckpointError for what cannot be packed."""
    kind, group, scale_type = _INT8, 0, _FLOAT32
    if isinstance(weight, Int8Only):
        kind = _INT8_WEIGHTS
    elif isinstance(weight, Int4Weight):
        kind, group, scale_type = _INT4, weight.group_size, _shortest(weight.scale)
        if group % 8 or group * weight.scale.shape[1] != weight.shape[1]:
            raise CheckpointError(f"int4: {weight.shape[1]} inputs with {weight.scale.shape[1]} scales a row")
    elif isinstance(weight, Tensor):
        kinds = {torch.float32: _FLOAT32, torch.bfloat16: _BFLOAT16}
        if weight.dtype not in kinds or weight.ndim != 2 or weight.device.type != "cpu":
            raise CheckpointError(
                f"native kernels take float32 or bfloat16 matrices on the CPU, not {weight.dtype} of shape "
                f"{tuple(weight.shape)} on {weight.device}"
            )
        kind = kinds[weight.dtype]
    out, inputs = weight.shape
    if out < 1 or inputs < 1 or (bias is not None and bias.shape != (out,)):
        raise CheckpointError(
            f"a weight of shape {(out, inputs)} with a bias of {None if bias is None else bias.shape}"
        )
    return LinearStruct(kind, out, inputs, group, scale_type, int(bias is not None), None, None, None)


def _canonical(weight: Tensor | Weight) -> tuple[Tensor, Tensor | None]:
    """Values and float32 scales as kernels/linear.h names them."""
    if isinstance(weight, Tensor):
        return weight.detach().contiguous(), None
    values = weight.quantised if isinstance(weight, Int8Weight) else weight.packed
    return values.contiguous(), weight.scale.float().contiguous()


def _shortest(scales: Tensor) -> int:
    """The shortest type that holds all scales exactly."""
    for dtype, code in ((torch.bfloat16, _BFLOAT16), (torch.float16, _FLOAT16)):
        if scales.dtype == dtype or torch.equal(scales.to(dtype).float(), scales.float()):
            return code
    return _FLOAT32


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads() -> int:
    return torch.get_num_threads()


def _functions() -> ctypes.CDLL:
    return _declared(require_native_library())


@functools.cache
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of the functions above."""
    pointer, whole, layer = ctypes.c_void_p, ctypes.c_long, ctypes.POINTER(LinearStruct)
    library.gristmill_packed_bytes.argtypes = (layer,)
    library.gristmill_packed_bytes.restype = ctypes.c_size_t
    library.gristmill_rows_bytes.argtypes = (layer, whole)
    library.gristmill_rows_bytes.restype = ctypes.c_size_t
    library.gristmill_pack.argtypes = (layer, pointer, pointer, pointer, pointer, ctypes.c_int)
    library.gristmill_linear.argtypes = (layer, pointer, whole, pointer, pointer, ctypes.c_int)
    library.gristmill_argmax_rows.argtypes = (pointer, whole, whole, pointer, pointer, ctypes.c_int)
    return library

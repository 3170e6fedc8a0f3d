"""Quantise the linear layers of a model in place, and tell what it cost and what it saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gristmill.errors import CheckpointError, RequestError
from gristmill.model.quantised.awq import folds, search_scale
from gristmill.model.quantised.calibrate import Inputs, MeasuredBlock, measured_blocks
from gristmill.model.quantised.gptq import gptq, output_error
from gristmill.model.quantised.linear import Int8Embedding, build_linear
from gristmill.model.quantised.weights import (
    Int8Weight,
    Scheme,
    Weight,
    bits_of,
    check_embedding,
    check_scheme,
    round_to_nearest,
)
from gristmill.model.transformer import Transformer

Method = Literal["round", "gptq", "awq"]
METHODS: tuple[Method, ...] = ("round", "gptq", "awq")
HEAD, EMBEDDING = "lm_head", "embed_tokens"


@dataclass(frozen=True)
class QuantisedLayer:
    """One matrix. bits: eight where groups of four bits do not divide it, and for head and embedding. error: root mean
    square of the rounding over that of the weights; output_error: the same of the outputs on the calibration text,
    None where there was none. Bytes are those of the matrix and of its scales."""

    name: str
    bits: int
    error: float
    output_error: float | None
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantisationReport:
    """What `quantise_model` did. left: parameters of two dimensions or more that stay as they were. Bytes are those of
    the whole model in memory, what is tied counted once."""

    scheme: Scheme
    method: Method
    group_size: int
    layers: tuple[QuantisedLayer, ...]
    left: tuple[str, ...]
    bytes_before: int
    bytes_after: int

    @property
    def in_eight_bits(self) -> list[str]:
        """Layers that the scheme int4 left in eight bits because groups do not divide them."""
        ends = (HEAD, EMBEDDING)
        return [x.name for x in self.layers if self.scheme == "int4" and x.bits == 8 and x.name not in ends]


@torch.no_grad()
def quantise_model(
    model: nn.Module,
    scheme: Scheme,
    *,
    group_size: int = 32,
    method: Method = "round",
    calibration: Sequence[Sequence[int]] | None = None,
    head: bool = True,
    embedding: bool = False,
    by_activation: bool = True,
    advance: Callable[..., None] = lambda done, note="": None,
) -> QuantisationReport:
    """Replace the `nn.Linear` layers of a model by quantised ones, in place, and freeze the rest.

    method: "round" to nearest, or for a `Transformer` "gptq" or "awq" by what its layers read on `calibration`, token
    ids of some texts. The output head gets eight bits in every scheme, or stays with head=False; a tied one gets a copy
    of its own. With embedding=True the embedding gets eight bits too, and a tied head shares them. by_activation: see
    `gptq`. Experts and convolutions are no `nn.Linear` and stay. advance: told how many layers are done.

    Raises RequestError naming an option, and CheckpointError, leaving the model alone, for a weight that is not finite
    and for a model without floating linear layers.
    """
    check_scheme(scheme, group_size)
    _check_method(model, method, calibration)
    linears = {n: x for n, x in model.named_modules() if type(x) is nn.Linear and (head or not _is_head(n))}
    if not linears:
        raise CheckpointError("the model has no floating linear layers to quantise; is it quantised already?")
    for name, linear in linears.items():
        if not bool(linear.weight.isfinite().all()):
            raise CheckpointError(f"{name}: a weight is not a finite number; get the checkpoint again")
    tied = _tied(model)
    check_embedding(tied, head, embedding)
    work = _Work(model, scheme, group_size, method, by_activation, model_bytes(model), advance)
    if isinstance(model, Transformer) and calibration is not None:
        for measured in measured_blocks(model, calibration):
            work.block(measured)
    for name, linear in linears.items():
        if model.get_submodule(name) is linear and not (embedding and tied and _is_head(name)):
            work.replace(name)
    if embedding:
        work.embed(tied)
    model.requires_grad_(False).eval()
    return work.report()


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a model; what is tied counts once."""
    seen: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        seen[tensor.data_ptr() if not tensor.is_meta else id(tensor)] = tensor.nbytes
    return sum(seen.values())


@dataclass
class _Work:
    model: nn.Module
    scheme: Scheme
    group_size: int
    method: Method
    by_activation: bool
    bytes_before: int
    advance: Callable[..., None]

    def __post_init__(self) -> None:
        self.done: list[QuantisedLayer] = []

    def block(self, measured: MeasuredBlock) -> None:
        """Quantise all layers of a block for what they read."""
        columns: dict[str, Tensor] = {}
        if self.method == "awq":
            for fold in folds(measured.prefix, measured.block):
                bits = bits_of(self.scheme, fold.layer.in_features, self.group_size)
                scale = search_scale(fold, measured.inputs[fold.name], bits, self.group_size)
                fold.apply(scale)
                columns[fold.name] = fold.per_input(scale)
        for name, inputs in measured.inputs.items():
            self.replace(name, inputs, columns.get(name))

    def replace(self, name: str, inputs: Inputs | None = None, columns: Tensor | None = None) -> None:
        """Quantise one layer: for `inputs` of a model that was not scaled, whose columns now are."""
        linear = self._linear(name)
        bits = 8 if _is_head(name) else bits_of(self.scheme, linear.in_features, self.group_size)
        moments = None
        if inputs is not None and inputs.tokens:
            moments = inputs.hessian if columns is None else inputs.hessian / columns / columns[:, None]
        try:
            if self.method == "gptq" and moments is not None:
                options: dict[str, Any] = {"by_activation": self.by_activation}
                weight = gptq(linear.weight, moments, bits, self.group_size, **options)
            else:
                weight = round_to_nearest(linear.weight, bits, self.group_size)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error
        self._note(name, linear.weight, weight, moments)
        self.model.set_submodule(name, build_linear(weight, linear.bias, self.scheme))

    def embed(self, share: bool) -> None:
        """Quantise the embedding, and give the head the same tensors if it shares them."""
        old = self.model.get_submodule(EMBEDDING)
        assert isinstance(old, nn.Embedding)
        weight = round_to_nearest(old.weight, 8)
        assert isinstance(weight, Int8Weight)
        self._note(EMBEDDING, old.weight, weight, None)
        self.model.set_submodule(EMBEDDING, Int8Embedding(weight, old.weight.dtype))
        if share:
            bias = self._linear(HEAD).bias
            self.model.set_submodule(HEAD, build_linear(weight, bias, self.scheme))

    def report(self) -> QuantisationReport:
        left = tuple(name for name, parameter in self.model.named_parameters() if parameter.ndim >= 2)
        sizes = self.bytes_before, model_bytes(self.model)
        return QuantisationReport(self.scheme, self.method, self.group_size, tuple(self.done), left, *sizes)

    def _linear(self, name: str) -> nn.Linear:
        layer = self.model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        return layer

    def _note(self, name: str, exact: Tensor, weight: Weight, moments: Tensor | None) -> None:
        back, values = weight.dequantised(), exact.detach().float()
        error = float((back - values).square().sum().sqrt() / values.square().sum().sqrt().clamp(min=1e-30))
        outputs = None if moments is None else output_error(values, back, moments) ** 0.5
        bits = 8 if isinstance(weight, Int8Weight) else 4
        self.done.append(QuantisedLayer(name, bits, error, outputs, exact.nbytes, weight.nbytes))
        self.advance(len(self.done), name)


def _is_head(name: str) -> bool:
    return name.rpartition(".")[2] == HEAD


def _tied(model: nn.Module) -> bool:
    head, embedding = (getattr(model, name, None) for name in (HEAD, EMBEDDING))
    return isinstance(head, nn.Linear) and isinstance(embedding, nn.Embedding) and head.weight is embedding.weight


def _check_method(model: nn.Module, method: str, calibration: Sequence[Sequence[int]] | None) -> None:
    if method not in METHODS:
        raise RequestError(f"method {method!r} is not one of {', '.join(METHODS)}", field="method")
    if method == "round" and calibration is not None:
        raise RequestError("calibration does not apply to method 'round'", field="calibration")
    if method != "round":
        if not isinstance(model, Transformer):
            raise RequestError(f"method {method!r} needs a decoder, not a {type(model).__name__}", field="method")
        if calibration is None:
            raise RequestError(f"method {method!r} needs calibration: token ids of some texts", field="calibration")

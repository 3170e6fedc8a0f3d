"""What guards a run: steps that are not finite or spike are seen, their batches kept for a look, and a machine that
has too little memory is answered with advice in figures.

Source: Chowdhery et al. 2022 (PaLM), section 5.1 (spikes, skipped batches).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gristmill.errors import CheckpointError, GristmillError
from gristmill.files import atomic_directory, write_json
from gristmill.model.formats.safetensors_file import save_tensors

if TYPE_CHECKING:
    from gristmill.train.config import TrainConfig

_TO_DEVIATION = 1.4826
"""Of a normal distribution: standard deviation / median absolute deviation."""
_SMALLEST_DEVIATION = 0.01
"""As a share of the median: losses that barely differ must not make any rise a spike."""


class SpikeDetector:
    """Says which steps are bad: loss or gradient norm not finite, or a loss far above the recent ones.

    A loss is a spike when it lies more than `threshold` robust deviations (1.4826 * median absolute deviation, at
    least 1% of the median) above the median of the last `window` accepted losses; None looks for none. Until a quarter
    of the window is full, only what is not finite is bad. Raises GristmillError for a window below 4 or a threshold
    that is not above 0.
    """

    def __init__(self, window: int = 64, threshold: float | None = 8.0) -> None:
        if window < 4:
            raise GristmillError(f"the window of the spike detector must be at least 4 losses, got {window}")
        if threshold is not None and not threshold > 0.0:
            raise GristmillError(f"spike must be above 0 deviations, got {threshold}")
        self.window, self.threshold = window, threshold
        self._losses: deque[float] = deque(maxlen=window)

    def check(self, loss: float, norm: float) -> str | None:
        """Why the step is bad, or None. loss: mean loss in nats; norm: global gradient norm before clipping."""
        wrong = [
            f"{name} {value}" for name, value in (("loss", loss), ("gradient norm", norm)) if not math.isfinite(value)
        ]
        if wrong:
            return f"not finite: {', '.join(wrong)}"
        if self.threshold is None or len(self._losses) < self.window // 4:
            return None
        middle = statistics.median(self._losses)
        spread = _TO_DEVIATION * statistics.median(abs(value - middle) for value in self._losses)
        spread = max(spread, _SMALLEST_DEVIATION * abs(middle), 1e-12)
        if loss <= middle + self.threshold * spread:
            return None
        return (
            f"loss {loss:.4g} spikes: {(loss - middle) / spread:.1f} deviations above {middle:.4g}, the median of the "
            f"last {len(self._losses)}"
        )

    def accept(self, loss: float, norm: float) -> None:
        """Count a step that was fine. Raises GristmillError when it is not finite."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise GristmillError(f"a step of loss {loss} and gradient norm {norm} cannot be accepted")
        self._losses.append(loss)

    def state(self) -> dict[str, Any]:
        """As JSON, exact: floats are written so that they read back as they were."""
        return {"losses": list(self._losses)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave; of a longer window the newest losses. Raises CheckpointError."""
        losses = state.get("losses")
        if not isinstance(losses, list) or not all(isinstance(x, int | float) and math.isfinite(x) for x in losses):
            raise CheckpointError("spike detector: its state must have a list of finite 'losses'")
        self._losses = deque((float(x) for x in losses), maxlen=self.window)


def dump_batch(directory: Path, step: int, batches: Sequence[Any], why: str, *, rank: int = 0) -> Path:
    """Keep the batches of a bad step: `directory/bad_batches/step-N[-rank-R]/` with batches.safetensors and batch.json.

    Tensors and arrays get names such as "0.input_ids" (the batch, then the field); all else is in the JSON, where
    {"tensor": name} stands in their place. Raises GristmillError when the disk is full or a field can be neither.
    """
    tensors: dict[str, Tensor] = {}
    facts = [_split(batch, str(number), tensors) for number, batch in enumerate(batches)]
    path = directory / "bad_batches" / (f"step-{step:08d}" + (f"-rank-{rank}" if rank else ""))
    with atomic_directory(path) as temporary:
        save_tensors(tensors, temporary / "batches.safetensors")
        write_json(temporary / "batch.json", {"step": step, "why": why, "rank": rank, "batches": facts})
    return path


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out: on the CPU torch says so by a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def memory_advice(error: BaseException, config: TrainConfig, model: nn.Module, tokens: int) -> str:
    """What to change once memory has run out (`is_out_of_memory`), with figures, most helpful first.

    tokens: those of one loader batch. Weights, gradients and optimiser are counted; activations are a rough sum.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    states = {"adamw": 2, "muon": 2, "lion": 1, "adafactor": 0, "sgd": int(bool(config.momentum))}[config.optimiser]
    fixed = weights * (2 + states) + (weights if config.average is not None else 0)
    activations = activation_bytes(model, tokens, config)
    advice = [
        f"halve rows_per_batch and double micro_batches ({config.micro_batches} now): the same gradient, and about "
        f"{_size(activations / 2)} less"
    ]
    if not config.checkpoint_activations:
        kept = activation_bytes(model, tokens, dataclasses.replace(config, checkpoint_activations=True))
        advice.append(f"checkpoint_activations: about {_size(activations - kept)} less for a third more time")
    if config.precision == "float32":
        advice.append(f"precision bfloat16: about {_size(activations / 2)} less")
    if states == 2:
        advice.append(f"optimiser lion: {_size(weights)} less; adafactor: {_size(2 * weights)} less")
    if config.average is not None:
        advice.append(f"average None: {_size(weights)} less")
    if config.background_checkpoints:
        advice.append(f"background_checkpoints False: {_size(weights * (1 + states))} less while one is written")
    if torch.distributed.is_available() and not torch.distributed.is_initialized():
        advice.append(f"more devices with sharding: the {_size(fixed)} are divided by their number")
    lines = "\n".join(f"- {line}" for line in advice)
    return (
        f"out of memory ({str(error).splitlines()[0] if str(error) else type(error).__name__}). Weights, gradients and "
        f"optimiser take {_size(fixed)}, the activations of {tokens:,} tokens about {_size(activations)}. Try:\n{lines}"
    )


def activation_bytes(model: nn.Module, tokens: int, config: TrainConfig) -> float:
    """Rough memory of what the forward pass keeps for the backward pass, logits left out (they are chunked).

    Each block keeps about 6 hidden states, its queries, keys and values twice, and 4 wide states where gated, else 2.

    Source: Korthikanti et al. 2022, section 4.1, for other blocks.
    """
    shape = getattr(model, "config", None)
    if shape is None or not hasattr(shape, "num_hidden_layers"):
        return 0.0
    width, wide = 4 if config.precision == "float32" else 2, 4 if shape.feed_forward.gated else 2
    moe = shape.feed_forward.moe
    inner = shape.intermediate_size if moe is None else moe.top_k * moe.intermediate_size + moe.shared_intermediate_size
    block = 6 * shape.hidden_size + 2 * (shape.query_size + 2 * shape.key_value_size) + wide * inner
    if config.checkpoint_activations:  # the input of each block, and one block at a time in full
        return float(tokens * width * (shape.num_hidden_layers * shape.hidden_size + block))
    return float(tokens * width * shape.num_hidden_layers * block)


def _split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON; its tensors go into `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu()
        return {"tensor": name}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _split(item, f"{name}.{key}", tensors) for key, item in value.items()}
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_split(item, f"{name}.{place}", tensors) for place, item in enumerate(value)]
    if hasattr(value, "__array__"):
        return _split(torch.as_tensor(value), name, tensors)
    raise GristmillError(f"the batch cannot be kept: {name} is a {type(value).__name__}, neither a tensor nor JSON")


def _size(number: float) -> str:
    """Bytes in powers of 1024."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"

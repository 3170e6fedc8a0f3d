"""Compare what a checkpoint computes before and after it was converted, and with what transformers makes of it.

Both sides compute in float32 on the same token ids. The difference is told beside the spread of the reference, its
standard deviation: a difference of 0.01 is nothing among logits that are 10 apart and much among those 0.1 apart.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gristmill.errors import CheckpointError, MissingExtra
from gristmill.model.config import EncoderDecoderConfig
from gristmill.model.encoder import Encoder
from gristmill.model.encoder_decoder import EncoderDecoder
from gristmill.model.formats.family import Config
from gristmill.model.formats.huggingface import Model, read_config, read_object
from gristmill.model.heads import Headed
from gristmill.model.transformer import Transformer

TOKENS = 64
"""Length of the sequence that is compared, where the model takes as much."""

EXACT = 1e-3
"""Greatest difference that passes where no weight was rounded, and only the order of additions differs, as a share of
the spread."""

ROUNDING = {"float16": 0.01, "f16": 0.01, "bfloat16": 0.05, "bf16": 0.05, "q8_0": 0.2, "q4_0": 1.0}
"""Root mean square of the differences that passes, as a share of the spread, by what the weights were rounded to. Of
values that have nothing to do with each other it is 1.4. Each is two to five times what SmolLM2-135M shows; see
docs/checkpoints.md."""

_LOGITS = ("logits", "prediction_logits", "seq_relationship_logits", "sop_logits")


@dataclass(frozen=True)
class Verification:
    """What was compared, and how far apart it is. difference: the greatest; mean: the root mean square of all; spread:
    the standard deviation of the reference; rounded: what the weights were rounded to, if they were."""

    what: str
    against: str
    tokens: int
    difference: float
    mean: float
    spread: float
    rounded: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the differences are numbers, and within the tolerance."""
        if self.rounded is None:
            return self.difference <= EXACT * self.spread
        return self.mean <= ROUNDING[self.rounded] * self.spread

    def __str__(self) -> str:
        if self.rounded is None:
            tolerance = f"tolerance {EXACT:g} of it"
        else:
            tolerance = f"tolerance of the root mean square {ROUNDING[self.rounded]:g} of it, for {self.rounded}"
        return (
            f"{'Verified' if self.passed else 'NOT verified'}: greatest difference of {self.what} "
            f"{self.difference:.2e}, root mean square {self.mean:.2e}, over {self.tokens} tokens against "
            f"{self.against} (spread {self.spread:.3g}; {tolerance})"
        )


@dataclass(frozen=True)
class Reference:
    """What a model computes from `ids`, and whose work it is: logits or final states, and a pooled vector or the logits
    of a second head where there are any."""

    ids: Tensor
    values: tuple[Tensor, ...]
    what: str
    against: str


def random_ids(config: Config, *, seed: int = 0, avoid: Sequence[int] = ()) -> Tensor:
    """The ids (1, tokens) that are compared: the same for the same vocabulary. avoid: padding, which some models read
    as the absence of a token."""
    sizes = config.encoder if isinstance(config, EncoderDecoderConfig) else config
    allowed = torch.tensor([token for token in range(sizes.vocab_size) if token not in avoid])
    length = min(TOKENS, sizes.max_position_embeddings)
    return allowed[torch.randint(len(allowed), (1, length), generator=torch.Generator().manual_seed(seed))]


def compare(model: Model, reference: Reference, rounded: str | None = None) -> Verification:
    """Run `model`, float32 and in evaluation mode, on the ids of the reference. rounded: a key of ROUNDING.

    Raises CheckpointError when it returns something of another shape.
    """
    found = ours(model, reference.ids)
    shapes = [[tuple(part.shape) for part in parts] for parts in (found, reference.values)]
    if shapes[0] != shapes[1]:
        raise CheckpointError(f"{reference.against} returns {reference.what} of shapes {shapes[1]}, we {shapes[0]}")
    left, right = (torch.cat([part.flatten() for part in parts]) for parts in (found, reference.values))
    return Verification(
        what=reference.what,
        against=reference.against,
        tokens=reference.ids.shape[1],
        difference=float((left - right).abs().max()),
        mean=float((left - right).square().mean().sqrt()),
        spread=float(right.std() if right.numel() > 1 else right.abs().max()),
        rounded=rounded,
    )


def our_reference(model: Model, ids: Tensor, name: str) -> Reference:
    """What a model of ours computes."""
    states = isinstance(model, Encoder) or (isinstance(model, Headed) and model.head_config.kind == "pooled_encoder")
    return Reference(ids, ours(model, ids), "final states" if states else "logits", f"{name} as gristmill reads it")


@torch.inference_mode()
def ours(model: Model, ids: Tensor) -> tuple[Tensor, ...]:
    """What a model of ours returns for ids (1, tokens). A decoder that reads an encoder gets the ids as its target too,
    one place later."""
    if isinstance(model, EncoderDecoder):
        return (model(ids, _target(ids, model.config.decoder_start_token_id)),)
    if isinstance(model, Headed) and model.head_config.kind == "pooled_encoder":
        return model.body(ids), model(ids)
    found = model(ids)
    return found if isinstance(found, tuple) else (found,)


def transformers_reference(path: Path, ids: Tensor) -> Reference:
    """What transformers computes with a Hugging Face directory or a GGUF file, in float32.

    Nothing is fetched, and no code of the checkpoint runs. Raises MissingExtra when transformers is not installed, and
    CheckpointError when it cannot load the checkpoint, or would make up weights that are not there.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "verify") from error
    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "output_loading_info": True}
    if path.is_file():
        name, directory = "AutoModelForCausalLM", path.parent
        options["gguf_file"] = path.name
    else:
        directory, values = path, read_object(path / "config.json")
        family, kind, _ = read_config(values, str(path / "config.json"))
        name = (values.get("architectures") or list(family.architectures))[0]
        if not hasattr(transformers, name):  # an older name of the class
            name = family.architecture(kind)
    if not hasattr(transformers, name):
        raise CheckpointError(f"{path}: transformers {transformers.__version__} has no {name} to compare with")
    with _quiet(transformers.utils.logging):
        try:
            theirs, info = getattr(transformers, name).from_pretrained(directory, **options)
        except Exception as error:  # anything: it is another library's opinion of the file
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{path}: transformers {transformers.__version__} cannot load it ({reason})"
            ) from error
    absent = sorted(info["missing_keys"])
    made_up = [name for name in absent if "pooler" not in name]  # of which the vector is left out below
    if made_up or info["mismatched_keys"]:
        raise CheckpointError(f"{path}: transformers finds no weights for {made_up or info['mismatched_keys']}")
    found, what = _run(theirs.eval(), ids, pooled=not absent)
    return Reference(ids, found, what, f"transformers {transformers.__version__} ({type(theirs).__name__})")


def logits_difference(model: Transformer, directory: Path, token_ids: Sequence[int]) -> float:
    """Greatest absolute difference between our logits and those of transformers.

    Raises MissingExtra and CheckpointError as `transformers_reference` does.
    """
    reference = transformers_reference(directory, torch.tensor([list(token_ids)]))
    return compare(model, reference).difference


@torch.inference_mode()
def _run(theirs: Any, ids: Tensor, *, pooled: bool) -> tuple[tuple[Tensor, ...], str]:
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if theirs.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = _target(ids, theirs.config.decoder_start_token_id)
    output = theirs(**inputs)
    if "start_logits" in output:
        return (torch.stack((output.start_logits, output.end_logits), dim=-1),), "logits"
    found = [output[name] for name in _LOGITS if output.get(name) is not None]
    if found:
        return tuple(found), "logits"
    pooler = output.get("pooler_output") if pooled else None
    return (output.last_hidden_state,) if pooler is None else (output.last_hidden_state, pooler), "final states"


def _target(ids: Tensor, start: int) -> Tensor:
    return torch.cat((torch.full_like(ids[:, :1], start), ids[:, :-1]), dim=1)


@contextlib.contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without transformers' bars and hints, which would mix with a command's own lines."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its GGUF reader has a bar that knows no switch
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

"""What a family of checkpoints is, and reading its configuration so that nothing in it is passed over."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

from gristmill.errors import CheckpointError
from gristmill.model.config import EncoderDecoderConfig, ModelConfig
from gristmill.model.formats.mapping import Entry
from gristmill.model.heads import HeadConfig, HeadKind

_T = TypeVar("_T")

Config = ModelConfig | EncoderDecoderConfig
Kind = Literal[
    "causal_lm",
    "encoder",
    "pooled_encoder",
    "masked_lm",
    "pretraining",
    "replaced_token",
    "sequence_classifier",
    "token_classifier",
    "span",
    "seq2seq",
]
"""What a checkpoint computes: which of our modules holds its weights."""


@dataclass(frozen=True)
class Heads:
    """What a family puts on its stack.

    read: the head of a kind, or CheckpointError naming the key that is not supported. names: for each kind, our parts
    of the head and where they are stored. write: keys that `read` wants, labels aside. tied: parameters stored
    elsewhere when the output matrix is the embedding. others: beginnings of stored names of other tasks' parts, which
    published checkpoints hold besides their own.
    """

    read: Callable[[Raw, ModelConfig, HeadKind], HeadConfig]
    names: Mapping[HeadKind, Mapping[str, str]]
    write: Callable[[ModelConfig, HeadConfig], dict[str, Any]] = lambda config, head: {}
    tied: Mapping[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One model_type of Hugging Face: its classes, its configuration and where each weight stands.

    architectures: class name -> what it is; where a class may lack its pooler, `pooled_encoder` becomes `encoder`.
    read: the configuration, or CheckpointError naming the key that is missing or not supported. write: the same back,
    without "architectures"; CheckpointError when the family cannot express it. entries: one per parameter of ours.
    copies: stored names that must equal another one (tied weights stored twice). derived: endings of stored names that
    hold nothing of their own. settle: the configuration once the stored names are known, for what they alone tell:
    whether an optional weight exists. renamed: endings of older names, and those of today. heads: for kinds with a
    head; the other fields are then about the stack below it. prefix: what all names but those of heads begin with; a
    checkpoint may lack it, then in every name.
    """

    model_type: str
    architectures: Mapping[str, Kind]
    read: Callable[[Raw], Config]
    write: Callable[[Any], dict[str, Any]]
    entries: Callable[[Any, Kind], Sequence[Entry]]
    copies: Callable[[Any, Kind], Mapping[str, str]] = lambda config, kind: {}
    derived: tuple[str, ...] = ()
    settle: Callable[[Any, Collection[str]], Config] = lambda config, names: config
    renamed: Mapping[str, str] = field(default_factory=dict)
    heads: Heads | None = None
    prefix: str = ""

    def architecture(self, kind: Kind) -> str:
        """The class name to write. Raises CheckpointError when the family has none of that kind."""
        for name, what in self.architectures.items():
            if what == kind or (what, kind) == ("pooled_encoder", "encoder"):
                return name
        raise CheckpointError(f"{self.model_type} has no {kind}")


_NEUTRAL_KEYS = (
    # about the file, not the model
    "architectures model_type transformers_version _name_or_path torch_dtype dtype auto_map _commit_hash "
    "_attn_implementation attn_implementation _attn_implementation_autoset unsloth_version unsloth_fixed "
    # about what a caller gets back
    "output_hidden_states output_attentions return_dict use_cache output_past keys_to_ignore_at_inference "
    "output_router_logits torchscript sentence_transformers sbert_ce_default_activation_function "
    "is_matryoshka matryoshka_dimensions "
    # about training
    "attention_dropout attention_dropout_prob hidden_dropout attention_probs_dropout_prob hidden_dropout_prob "
    "resid_pdrop embd_pdrop attn_pdrop dropout dropout_rate classifier_dropout activation_dropout resid_dropout "
    "summary_first_dropout router_aux_loss_coef router_jitter_noise aux_loss_alpha seq_aux gradient_checkpointing "
    "use_bfloat16 tf_legacy_loss "
    # about labels and heads of other tasks
    "id2label label2id num_labels _num_labels problem_type finetuning_task task_specific_params "
    # about tokens and generation
    "bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id mask_token_id cls_token_id "
    "decoder_start_token_id forced_bos_token_id forced_eos_token_id max_length min_length do_sample num_beams "
    "num_beam_groups early_stopping temperature top_k top_p typical_p repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences "
    "return_dict_in_generate output_scores suppress_tokens begin_suppress_tokens exponential_decay_length_penalty "
    "remove_invalid_values diversity_penalty prefix tokenizer_class pruned_heads "
    # about programs and machines that are not ours
    "transformers.js_config xla_device "
    # defaults that every configuration carries
    "chunk_size_feed_forward is_encoder_decoder tie_encoder_decoder add_cross_attention is_decoder "
    "cross_attention_hidden_size"
)
_NEUTRAL = frozenset(_NEUTRAL_KEYS.split())

_LARGEST = 2**31 - 1
_COUNTED = (
    "num_hidden_layers num_layers num_decoder_layers encoder_layers decoder_layers n_layers n_layer num_hidden_groups "
    "inner_group_num relative_attention_num_buckets num_experts num_local_experts n_routed_experts n_shared_experts"
)
# a list is made of so many entries before any tensor is looked at
_MOST = dict.fromkeys(_COUNTED.split(), 10_000) | {"num_labels": 10**6, "relative_attention_max_distance": 10**6}


class Raw:
    """A foreign configuration. What is never asked for must be neutral, or `finish` refuses it by name."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where
        self._read: set[str] = set()
        for key in ("is_decoder", "add_cross_attention", "tie_encoder_decoder", "pruned_heads"):
            if values.get(key):
                raise self.refuse(key)
        if values.get("quantization_config"):
            raise self.refuse("quantization_config")
        self._read.add("quantization_config")

    def get(self, key: str, kind: type[_T]) -> _T | None:
        """A value, or None when it is absent or null. Raises CheckpointError when it is of another type, and for a
        number that is infinite, none at all, or beyond any model."""
        self._read.add(key)
        value = self.values.get(key)
        if value is None:
            return None
        most = 1e12 if kind is float else _MOST.get(key, _LARGEST)  # a rotation's base may be of any size
        if isinstance(value, (int, float)) and not abs(value) <= most:
            raise self.refuse(key)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return cast(_T, float(value))
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise CheckpointError(f"{self.where}: {key} = {_short(value)} is not of type {kind.__name__}")
        return value

    def need(self, key: str, kind: type[_T]) -> _T:
        """The same, and CheckpointError when it is missing."""
        value = self.get(key, kind)
        if value is None:
            raise CheckpointError(f"{self.where}: {key!r} is missing")
        return value

    def default(self, key: str, fallback: _T) -> _T:
        """The same, with the family's default, whose type it must have."""
        value = self.get(key, type(fallback))
        return fallback if value is None else value

    def nullable(self, key: str, kind: type[_T], fallback: _T | None) -> _T | None:
        """The same, for a key whose null says something else than its absence: null is None, absence the fallback."""
        value = self.get(key, kind)
        return value if key in self.values else fallback

    def only(self, key: str, *allowed: Any) -> None:
        """Raise CheckpointError unless the value is absent, null or one of these: others would change the model."""
        self._read.add(key)
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise self.refuse(key)

    def neutral(self, *keys: str) -> None:
        """Keys that change nothing in this family."""
        self._read.update(keys)

    def refuse(self, key: str) -> CheckpointError:
        """The error for a value that is not supported."""
        return CheckpointError(f"{self.where}: {key} = {_short(self.values.get(key))} is not supported")

    def finish(self) -> None:
        """Raise CheckpointError naming a key that nobody read and that is not known to change nothing."""
        unknown = sorted(set(self.values) - self._read - _NEUTRAL)
        if unknown:
            raise CheckpointError(
                f"{self.where}: {unknown[0]} = {_short(self.values[unknown[0]])} is not known to this family; "
                "remove the key if it changes nothing"
            )


def _short(value: Any) -> str:
    """A value for a message of one line."""
    try:
        text = repr(value)
    except ValueError:  # a number of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."

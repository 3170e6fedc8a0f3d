"""Heads in Hugging Face directories: their labels, their weights, and what else a published checkpoint may hold."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gristmill.errors import CheckpointError
from gristmill.model.config import ModelConfig
from gristmill.model.formats.family import Config, Family, Heads, Kind, Raw
from gristmill.model.formats.mapping import Entry
from gristmill.model.heads import HeadConfig, Headed, HeadKind


def read_head(family: Family, raw: Raw, config: Config, kind: Kind) -> HeadConfig | None:
    """The head of a checkpoint of this kind, None where it has none. Raises CheckpointError naming the key that is not
    supported."""
    if family.heads is None or not isinstance(config, ModelConfig):
        return None
    wanted = next((known for known in family.heads.names if known == kind), None)
    return None if wanted is None else family.heads.read(raw, config, wanted)


def write_head(family: Family, config: Config, head: HeadConfig | None) -> dict[str, Any]:
    """What config.json says of a head. Raises CheckpointError when the family has none such."""
    if head is None:
        return {}
    if family.heads is None or not isinstance(config, ModelConfig):
        raise CheckpointError(f"{family.model_type} has no heads")
    fields = family.heads.write(config, head)
    if head.labels:
        fields["id2label"] = {str(index): label for index, label in enumerate(head.labels)}
        fields["label2id"] = {label: index for index, label in enumerate(head.labels)}
    return fields


def classifier(raw: Raw, kind: HeadKind, **sequence: Any) -> HeadConfig:
    """The head of a classifier: one linear layer for tokens and spans; for sequences it has the given fields."""
    labels = read_labels(raw)
    if kind == "sequence_classifier":
        return HeadConfig(kind=kind, labels=labels, **sequence)
    if kind not in ("token_classifier", "span"):
        raise CheckpointError(f"{raw.where}: {kind} is no classifier")
    return HeadConfig(kind=kind, labels=labels)


def decoder_heads() -> Heads:
    """What Llama and its descendants put on a decoder: one linear layer over the last token's state."""

    def read(raw: Raw, config: ModelConfig, kind: HeadKind) -> HeadConfig:
        return classifier(raw, kind, pooling="last", bias=False)

    return Heads(read=read, names={"sequence_classifier": {"out": "score"}})


def read_labels(raw: Raw) -> tuple[str, ...]:
    """The names of a classifier's outputs, from `id2label` or else `num_labels`; two without either.

    Raises CheckpointError unless the ids count from 0.
    """
    named, count = raw.get("id2label", dict), raw.get("num_labels", int)
    if named is None:
        return tuple(f"LABEL_{index}" for index in range(2 if count is None else count))
    labels = {str(index): label for index, label in named.items()}
    wanted = [str(index) for index in range(len(labels))]
    if set(labels) != set(wanted) or not all(isinstance(label, str) for label in labels.values()):
        raise raw.refuse("id2label")
    if count is not None and count != len(labels):
        raise CheckpointError(f"{raw.where}: num_labels = {count}, but id2label names {len(labels)}")
    return tuple(labels[index] for index in wanted)


def model_entries(family: Family, model: nn.Module, kind: Kind) -> list[Entry]:
    """One entry per parameter of a model, which may be on the meta device, its head included."""
    entries = list(family.entries(model.config, kind))
    if not isinstance(model, Headed):
        return entries
    assert family.heads is not None
    body = [entry for entry in entries if not entry.ours.startswith("lm_head.")]  # a decoder's, which the head replaces
    entries = [Entry(f"body.{entry.ours}", entry.theirs, entry.layout) for entry in body]
    table = family.heads.names[model.head_config.kind]
    single = family.heads.tied if model.config.tie_word_embeddings else {}
    for name, _ in model.named_parameters():  # a tied matrix comes once, as the body's
        if name.startswith("head."):
            inner = name.removeprefix("head.")
            part, _, leaf = inner.rpartition(".")
            entries.append(Entry(name, (single.get(inner) or f"{table[part]}.{leaf}",)))
    return entries


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint under today's names, without those of other tasks' heads, which a warning names."""

    def __init__(self, tensors: Mapping[str, Tensor], family: Family, entries: Sequence[Entry], where: str) -> None:
        self._tensors = tensors
        self._stored = {_renamed(name, family.renamed): name for name in tensors}
        wanted = {name for entry in entries for name in entry.theirs}
        if family.prefix and not any(name.startswith(family.prefix) for name in self._stored):
            known = {name: family.prefix + name for name in self._stored if family.prefix + name in wanted}
            self._stored = {known.get(name, name): stored for name, stored in self._stored.items()}
        others = family.heads.others if family.heads is not None else ()
        unused = (
            sorted(name for name in self._stored if name not in wanted and name.startswith(others)) if others else []
        )
        for name in unused:
            del self._stored[name]
        if unused:
            warnings.warn(f"{where}: left out, of another task: {', '.join(unused)}", stacklevel=4)

    def __len__(self) -> int:
        return len(self._stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._stored[name]]


def _renamed(name: str, endings: Mapping[str, str]) -> str:
    for old, new in endings.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name

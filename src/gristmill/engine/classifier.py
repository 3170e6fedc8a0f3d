"""Models that judge texts: classifiers, cross-encoders and reward models. They have no next token, so no scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tokenizers import Encoding
from torch import Tensor

from gristmill.core import Message
from gristmill.engine.llm import LLM
from gristmill.engine.scoring import batches_of
from gristmill.errors import CheckpointError, RequestError
from gristmill.model.attention.packed import PackedAttention, segment_positions
from gristmill.model.formats.huggingface import is_quantised, read_config, read_object
from gristmill.model.heads import Headed
from gristmill.model.load import load_any, resolve
from gristmill.tokens.renderer import JinjaRenderer
from gristmill.tokens.tokenizer import Tokenizer

BATCH_TOKENS = 4096

Judged = str | tuple[str, str] | Sequence[int]
"""What is judged: a text, a pair of texts, or token ids, which are taken as they are."""

Problem = Literal["single_label", "multi_label", "regression"]
"""One of the labels is true (softmax), each is true or not (sigmoid), or the outputs are values (as they are)."""

_PROBLEMS: dict[str, Problem] = {
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}
_ACTIVATIONS: dict[str, Problem] = {
    "torch.nn.modules.activation.Sigmoid": "multi_label",
    "torch.nn.modules.linear.Identity": "regression",
}


class Encoded(NamedTuple):
    """Token ids, and which text of a pair each is of (0 or 1)."""

    ids: list[int]
    types: list[int]


@dataclass(frozen=True)
class Classification:
    """What a model makes of one input; `scores` and `logits` have one entry per label of the model.

    label: the one of the highest score. scores: probabilities, or the values themselves for a regression or a reward.
    """

    label: str
    scores: list[float]
    logits: list[float]


class TextClassifier:
    """A stack with a classifier on it: on the first token of an encoder (a cross-encoder reads pairs), on the last one
    of a decoder (a reward model). Inputs lie one after another in a batch; there is no padding.

    problem: how logits become scores.

    Source: Devlin et al. 2018, section 4.1; Nogueira and Cho 2019 (pairs); Ouyang et al. 2022, section 3.5 (rewards).
    """

    def __init__(
        self, model: Headed, tokenizer: Tokenizer, *, problem: Problem, pad_token_id: int | None = None, name: str = ""
    ) -> None:
        if model.head_config.kind != "sequence_classifier":
            raise CheckpointError(f"{name}: a head of kind {model.head_config.kind!r} does not judge whole texts")
        self.network, self.tokenizer, self.problem, self.model_name = model.eval(), tokenizer, problem, name
        self.labels = model.head_config.labels
        self.max_model_len = model.config.max_position_embeddings
        self._pad = pad_token_id if model.head_config.pooling == "last" else None
        bos = tokenizer.bos_token_id
        starts = tokenizer.add_bos_token and bos is not None and tokenizer.backend.encode("x").ids[:1] != [bos]
        self._start = [bos] if starts and bos is not None else []  # a start token that the backend does not put itself

    @property
    def kind(self) -> Literal["classify"]:
        """What a server may ask of it."""
        return "classify"

    @property
    def max_input_len(self) -> int:
        """Most tokens of one input, special ones included."""
        return self.max_model_len

    def classify(self, inputs: Sequence[Judged], *, max_tokens: int | None = None) -> list[Classification]:
        """One judgement per input, in order. Raises RequestError as `encode` does."""
        return self.judge(self.encode(inputs, max_tokens=max_tokens))

    def score(self, pairs: Sequence[tuple[str, str]], *, max_tokens: int | None = None) -> list[float]:
        """How well the second text of each pair fits the first, for a model with one label. Raises RequestError."""
        self.need_one_label()
        return [found.scores[0] for found in self.classify(pairs, max_tokens=max_tokens)]

    def rewards(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        """The value of each answered conversation, for a model with one label. Raises RequestError and DataError."""
        self.need_one_label()
        return [found.scores[0] for found in self.judge(self.encode_chats(conversations))]

    def need_one_label(self) -> None:
        """Raise RequestError when one score cannot stand for the model's judgement."""
        if len(self.labels) != 1:
            raise RequestError(
                f"{self.model_name} has {len(self.labels)} labels, so no single score: classify with it", field="model"
            )

    def encode(self, inputs: Sequence[Judged], *, max_tokens: int | None = None) -> list[Encoded]:
        """The tokens of each input, between the special ones of the model.

        max_tokens: longer inputs are cut to so many at their end, special ones included, of a pair its longer text
        first; None refuses what is longer than the model reads. Raises RequestError naming the input, DataError for
        text with half of a surrogate pair.
        """
        if isinstance(inputs, str):
            raise RequestError("inputs must be a list of texts, not one text", field="inputs")
        if max_tokens is not None and not 1 <= max_tokens <= self.max_model_len:
            raise RequestError(f"max_tokens must be in [1, {self.max_model_len}], got {max_tokens}", field="max_tokens")
        texts: list[str] = []
        for item in inputs:
            texts += [item] if isinstance(item, str) else item if isinstance(item, tuple) else []
        try:
            pieces = iter(self.tokenizer.backend.encode_batch(texts, add_special_tokens=False))
        except TypeError:
            self.tokenizer.encode_batch(texts)  # says which text it is
            raise
        encoded = []
        for number, item in enumerate(inputs):
            if isinstance(item, str):
                ids, types = self._frame(next(pieces), None, max_tokens)
            elif isinstance(item, tuple):
                ids, types = self._frame(next(pieces), next(pieces), max_tokens)
            else:
                ids, types = list(item)[:max_tokens], [0] * len(item[:max_tokens])
            encoded.append(self._checked(Encoded(ids, types), number))
        return encoded

    def encode_chats(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
        """The tokens of answered conversations, rendered with the model's own template.

        Raises RequestError when the model has no template or one is too long, DataError as `JinjaRenderer.render`.
        """
        rendered = [self._renderer.render(messages).token_ids for messages in conversations]
        return [self._checked(Encoded(ids, [0] * len(ids)), number) for number, ids in enumerate(rendered)]

    def judge(self, encoded: Sequence[Encoded]) -> list[Classification]:
        """One judgement per encoded input, in order."""
        logits = self.logits(encoded)
        scores = {
            "single_label": lambda: logits.softmax(dim=-1),
            "multi_label": lambda: logits.sigmoid(),
            "regression": lambda: logits,
        }[self.problem]()
        best = logits.argmax(dim=-1).tolist()
        rows = zip(best, scores.tolist(), logits.tolist(), strict=True)
        return [Classification(self.labels[label], score, logit) for label, score, logit in rows]

    @torch.inference_mode()
    def logits(self, encoded: Sequence[Encoded]) -> Tensor:
        """What the model's last layer gives, float32 (inputs, labels) on the CPU."""
        out = torch.empty(len(encoded), len(self.labels))
        for members in batches_of([len(item.ids) for item in encoded], BATCH_TOKENS):
            out[members] = self._forward([encoded[i] for i in members]).float().cpu()
        return out

    def _forward(self, items: Sequence[Encoded]) -> Tensor:
        body = self.network.body
        device = body.embed_tokens.weight.device
        rows = [self._without_padding(item.ids) for item in items]
        lengths = [len(row) for row in rows]
        ids = torch.tensor([token for row in rows for token in row], device=device)
        types = None
        if body.config.embedding.token_types > 1:
            types = torch.tensor([kind for item in items for kind in item.types], device=device)
        positions = segment_positions(lengths, device)
        hidden = body.hidden_states(ids, positions, PackedAttention(lengths, device), token_type_ids=types)
        states = _pooled(hidden, lengths, self.network.head_config.pooling)
        logits: Tensor = self.network.head(states[:, None])  # rows of one token, which every pooling takes
        return logits

    def _without_padding(self, ids: list[int]) -> list[int]:
        """Without padding tokens at the end. Where the padding token is the end-of-sequence token, the model was
        trained with the state of the token before, so its value has to be taken there."""
        end = len(ids)
        while self._pad is not None and end > 1 and ids[end - 1] == self._pad:
            end -= 1
        return ids[:end]

    def _frame(self, first: Encoding, second: Encoding | None, max_tokens: int | None) -> tuple[list[int], list[int]]:
        """Ids and types between the special tokens of the tokenizer's template."""
        backend, start = self.tokenizer.backend, self._start
        if max_tokens is not None:
            room = max_tokens - backend.num_special_tokens_to_add(is_pair=second is not None) - len(start)
            if room < 1:
                raise RequestError(f"max_tokens = {max_tokens} leaves no place for a text", field="max_tokens")
            left, right = _shares(len(first), 0 if second is None else len(second), room)
            first.truncate(left)
            if second is not None:
                second.truncate(right)
        whole = backend.post_process(first, second)
        ids, types = list(whole.ids), list(whole.type_ids)
        if start and ids[:1] != start:
            ids, types = [*start, *ids], [0, *types]
        return ids, types

    def _checked(self, item: Encoded, number: int) -> Encoded:
        vocabulary = self.network.config.vocab_size
        if not item.ids:
            raise RequestError(f"input {number} has no token", field="inputs")
        if len(item.ids) > self.max_model_len:
            raise RequestError(
                f"input {number} has {len(item.ids)} tokens, the model reads {self.max_model_len}; shorten it, or ask "
                "for truncation",
                field="inputs",
                code="context_length_exceeded",
            )
        if wrong := next((token for token in item.ids if not 0 <= token < vocabulary), None):
            raise RequestError(f"input {number}: {wrong} is no token id below {vocabulary}", field="inputs")
        return item

    @cached_property
    def _renderer(self) -> JinjaRenderer:
        if self.tokenizer.chat_template is None:
            raise RequestError(f"{self.model_name} has no chat template: give it texts, not messages", field="messages")
        return JinjaRenderer(self.tokenizer)

    @classmethod
    def load(cls, source: str | Path, *, dtype: str = "float32", device: str = "cpu") -> TextClassifier:
        """Read a Hugging Face directory of a class named ...ForSequenceClassification.

        Raises CheckpointError for another one, for one without a tokenizer, and for a final activation that is not
        known.
        """
        path = resolve(source)
        if not is_classifier(path):
            raise CheckpointError(f"{path}: not a classifier (architectures is no ...ForSequenceClassification)")
        model, tokenizer = load_any(path, dtype=dtype, device=device)
        assert isinstance(model, Headed)
        if tokenizer is None:
            raise CheckpointError(f"{path}: no tokenizer beside the model")
        problem = problem_of(path, len(model.head_config.labels), model.config.causal)
        pad = read_object(path / "config.json").get("pad_token_id")
        return cls(model, tokenizer, problem=problem, pad_token_id=pad, name=str(source))


def is_classifier(source: str | Path) -> bool:
    """Whether a name is that of a model that judges texts. Raises as loading does."""
    path = resolve(source)
    if path.is_file():
        return False
    values = read_object(path / "config.json")
    return not is_quantised(values) and read_config(values, str(path / "config.json"))[1] == "sequence_classifier"


def problem_of(directory: Path, labels: int, causal: bool) -> Problem:
    """How the logits of a model become scores.

    For one label the activation that sentence-transformers wrote comes first; then `problem_type` of config.json.
    Without either it is softmax for several labels, and for one sigmoid on an encoder (a cross-encoder), the bare value
    on a decoder (a reward model). Raises CheckpointError, naming the file, for one that is not known.
    """
    at, beside = directory / "config.json", directory / "config_sentence_transformers.json"
    values, settings = read_object(at), read_object(beside) if beside.is_file() else {}
    if settings.get("default_prompt_name") is not None:
        raise CheckpointError(f"{beside}: default_prompt_name is not supported; put the prompt before each text")
    older = values.get("sentence_transformers")
    activation = (
        settings.get("activation_fn")
        or (older.get("activation_fn") if isinstance(older, dict) else None)
        or values.get("sbert_ce_default_activation_function")
    )
    named = values.get("problem_type")
    if labels == 1 and activation is not None:
        return _known(_ACTIVATIONS, activation, directory, "activation_fn")
    if named is not None:
        return _known(_PROBLEMS, named, at, "problem_type")
    if labels > 1:
        return "single_label"
    return "regression" if causal else "multi_label"


def _known(table: dict[str, Problem], name: object, where: Path, key: str) -> Problem:
    if not isinstance(name, str) or name not in table:
        raise CheckpointError(f"{where}: {key} = {name!r} is not supported ({', '.join(table)})")
    return table[name]


def load_servable(
    source: str | Path, *, dtype: str = "float32", device: str = "cpu", **options: Any
) -> LLM | TextClassifier:
    """The model of a name as a server hosts it: a classifier where its config.json says so, else an LLM.

    options: of `LLM`; a classifier refuses those that are not None. Raises CheckpointError and RequestError.
    """
    if not is_classifier(source):
        return LLM(source, dtype=dtype, device=device, **options)
    if given := [name for name, value in options.items() if value is not None]:
        raise RequestError(f"{given[0]} is for models that generate, and {source} is a classifier", field=given[0])
    return TextClassifier.load(source, dtype=dtype, device=device)


def _pooled(hidden: Tensor, lengths: Sequence[int], how: str) -> Tensor:
    """One state per text, (texts, hidden), of flat states (tokens, hidden)."""
    ends = torch.tensor(lengths, device=hidden.device).cumsum(0)
    if how == "last":
        return hidden[ends - 1]
    if how == "cls":
        return hidden[torch.cat((ends.new_zeros(1), ends[:-1]))]
    return torch.stack([part.mean(dim=0) for part in hidden.split(list(lengths))])


def _shares(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens two texts keep when `room` is too small for both: the longer one gives first, down to a half."""
    half = room // 2
    if first + second <= room:
        return first, second
    if first <= half:
        return first, room - first
    if second <= half:
        return room - second, second
    return (room - half, half) if first > second else (half, room - half)

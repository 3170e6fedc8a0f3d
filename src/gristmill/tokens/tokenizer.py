"""A tokenizer with what generation needs beside it: special ids, stop ids and the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from gristmill.errors import CheckpointError, DataError
from gristmill.files import write_json, write_text
from gristmill.tokens.token_bytes import TokenBytes, has_token_bytes

_NAMED = ("unk_token", "cls_token", "sep_token", "mask_token")


@dataclass(frozen=True)
class Tokenizer:
    """A Rust `tokenizers` backend and its special tokens.

    `stop_token_ids` are the tokens at which generation ends (end of sequence, end of turn). `named_tokens` are those
    that encoders name besides: unk_token, cls_token, sep_token, mask_token, and their texts.
    """

    backend: Backend
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    add_bos_token: bool = False
    named_tokens: tuple[tuple[str, str], ...] = ()

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def _plain_backend(self) -> Backend:
        # a copy, because the switch is a state of the backend and other threads may be encoding
        backend = Backend.from_str(self.backend.to_str())
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def token_bytes(self) -> TokenBytes | None:
        """The bytes of each token; None where a token's text depends on its neighbours. Not for tokens added later."""
        return TokenBytes(self.backend) if has_token_bytes(self.backend) else None

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text and id of every special token."""
        added = self.backend.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Token ids. Special tokens spelled in the text are recognised.

        `add_bos` None does what the model was trained with (`add_bos_token`). Raises DataError for text with half of
        a surrogate pair, which UTF-8 cannot hold.
        """
        try:
            # of a batch, even of one: only that lets other threads run meanwhile
            ids = self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError as error:
            raise _not_encodable([text], error) from error
        add_bos = self.add_bos_token if add_bos is None else add_bos
        if add_bos and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            return [self.bos_token_id, *ids]
        return ids

    def encode_batch(self, texts: Sequence[str], *, special_tokens: bool = True) -> list[list[int]]:
        """Ids of many texts at once, without a start token. Raises DataError as `encode` does.

        `special_tokens` False takes those spelled in a text for plain text, as a corpus needs: what a page about chat
        templates says must not end the turn.
        """
        backend = self.backend if special_tokens else self._plain_backend
        try:
            encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError as error:
            raise _not_encodable(texts, error) from error
        return [item.ids for item in encoded]

    def encode_framed(self, texts: Sequence[str], max_tokens: int | None = None) -> tuple[list[list[int]], list[int]]:
        """Ids of many texts between the special tokens of the tokenizer's own template ([CLS] ... [SEP]), and how many
        each text has.

        Texts are cut so that `max_tokens` are left, special ones included. Raises DataError as `encode` does.
        """
        try:
            encoded = self.backend.encode_batch(list(texts), add_special_tokens=False)
        except TypeError as error:
            raise _not_encodable(texts, error) from error
        special = self.backend.num_special_tokens_to_add(is_pair=False)
        lengths = [len(item.ids) + special for item in encoded]
        for item in encoded:
            if max_tokens is not None:
                item.truncate(max_tokens - special)
        return [self.backend.post_process(item).ids for item in encoded], lengths

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids; bytes that are no complete character become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def id_of(self, token: str) -> int | None:
        """Id of a token's text, or None."""
        return self.backend.token_to_id(token)

    def token_of(self, token_id: int | None) -> str | None:
        """Text of a token id, or None."""
        return None if token_id is None else self.backend.id_to_token(token_id)

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and generation_config.json as Hugging Face tools read them."""
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / "tokenizer.json", self.backend.to_str(pretty=False))
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.add_bos_token,
            "bos_token": self.token_of(self.bos_token_id),
            "eos_token": self.token_of(self.eos_token_id),
            "pad_token": self.token_of(self.pad_token_id),
            **dict(self.named_tokens),
            "clean_up_tokenization_spaces": False,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        write_json(directory / "tokenizer_config.json", config)
        # A template file beside the configuration would win over it, so one left by an earlier tokenizer must go.
        (directory / "chat_template.jinja").unlink(missing_ok=True)
        write_json(
            directory / "generation_config.json",
            {
                "bos_token_id": self.bos_token_id,
                "eos_token_id": list(self.stop_token_ids) or self.eos_token_id,
                "pad_token_id": self.pad_token_id,
            },
        )

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read a Hugging Face directory.

        Stop ids come from generation_config.json, else config.json, and hold the end-of-sequence token in any case.
        Truncation and padding stored in tokenizer.json are switched off: nothing is cut in silence.
        Raises CheckpointError, naming the file, when one is missing or broken or names a token that does not exist.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{directory}: tokenizer.json is missing")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the Rust library raises bare Exception
            raise CheckpointError(f"{path}: not a tokenizer ({error})") from error
        backend.no_truncation()
        backend.no_padding()
        config_path = directory / "tokenizer_config.json"
        config = {**_read_json(directory / "special_tokens_map.json"), **_read_json(config_path)}
        _add_missing_tokens(backend, config, config_path)

        def text_of(name: str) -> str | None:
            token = config.get(name)
            text = token.get("content") if isinstance(token, dict) else token
            return None if text is None else str(text)

        def special(name: str) -> int | None:
            text = text_of(name)
            if text is None:
                return None
            index = None if _is_broken(text) else backend.token_to_id(text)
            if index is None:
                raise CheckpointError(f"{config_path}: {name} {text!r} is not in the vocabulary of {path.name}")
            return index

        bos, eos = special("bos_token"), special("eos_token")
        add_bos = config.get("add_bos_token")
        return cls(
            backend=backend,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=special("pad_token"),
            stop_token_ids=_stop_ids(directory, backend, eos),
            chat_template=_chat_template(directory, config),
            add_bos_token=_starts_with(backend, bos) if add_bos is None else bool(add_bos),
            named_tokens=tuple((name, text) for name in _NAMED if (text := text_of(name)) is not None),
        )


def _add_missing_tokens(backend: Backend, config: Mapping[str, Any], path: Path) -> None:
    """Tokens that only tokenizer_config.json knows. Raises CheckpointError when one cannot have the id it claims."""
    listed = config.get("added_tokens_decoder") or {}
    try:
        tokens = sorted((int(index), _added_token(entry)) for index, entry in listed.items())
        missing = [token for _, token in tokens if backend.token_to_id(token.content) is None]
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # ValueError: half of a surrogate pair, too
        raise CheckpointError(f"{path}: added_tokens_decoder does not give each id a token ({error!r})") from error
    for token in missing:
        if token.special:
            backend.add_special_tokens([token])
        else:
            backend.add_tokens([token])
    for index, token in tokens:
        if (found := backend.token_to_id(token.content)) != index:
            raise CheckpointError(f"{path}: {token.content!r} should have id {index}, it has {found}")


def _added_token(entry: Mapping[str, Any]) -> AddedToken:
    flags = {name: entry[name] for name in ("lstrip", "rstrip", "single_word", "normalized") if name in entry}
    return AddedToken(entry["content"], special=bool(entry.get("special")), **flags)


def _stop_ids(directory: Path, backend: Backend, eos: int | None) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        given = _read_json(directory / name).get("eos_token_id")
        if given is None:
            continue
        stops = given if isinstance(given, list) else [given]
        for index in stops:
            if not isinstance(index, int) or not 0 <= index < 2**32 or backend.id_to_token(index) is None:
                raise CheckpointError(f"{directory / name}: eos_token_id {index!r} is not a token of tokenizer.json")
        return tuple(dict.fromkeys([*stops, *([] if eos is None else [eos])]))
    return () if eos is None else (eos,)


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The template file beside the configuration, else the configuration's; of several named ones, the default."""
    beside = directory / "chat_template.jinja"
    if beside.is_file():
        try:
            return beside.read_text(encoding="utf-8")
        except ValueError as error:
            raise CheckpointError(f"{beside}: not UTF-8 ({error})") from error
    template = config.get("chat_template") or _read_json(directory / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
        if "default" not in named:
            raise CheckpointError(f"{directory}: no chat template is named default (found: {', '.join(named)})")
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{directory}: chat_template must be text, got {type(template).__name__}")
    return template


def _is_broken(text: str) -> bool:
    """Whether it holds half of a surrogate pair, which UTF-8 cannot."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _starts_with(backend: Backend, bos: int | None) -> bool:
    """Whether the backend's own post-processor puts the start token first, as Llama-3's does without saying so."""
    return bos is not None and backend.encode("x").ids[:1] == [bos]


def _not_encodable(texts: Sequence[object], error: TypeError) -> Exception:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            return error
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as reason:
            return DataError(f"text {index} holds half of a surrogate pair at character {reason.start}; remove it")
    return error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value

"""A tokenizer with what generation needs beside it: special ids, stop ids and the chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from gristmill.errors import CheckpointError
from gristmill.files import write_json, write_text


@dataclass(frozen=True)
class Tokenizer:
    """A Rust `tokenizers` backend and its special tokens.

    `stop_token_ids` are the tokens at which generation ends (end of sequence, end of turn).
    """

    backend: Backend
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    add_bos_token: bool = False

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text and id of every special token."""
        added = self.backend.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Token ids. Special tokens spelled in the text are recognised.

        `add_bos` None does what the model was trained with (`add_bos_token`).
        """
        ids = self.backend.encode(text, add_special_tokens=False).ids
        add_bos = self.add_bos_token if add_bos is None else add_bos
        if add_bos and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            return [self.bos_token_id, *ids]
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts at once, without a start token."""
        encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [item.ids for item in encoded]

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
            "clean_up_tokenization_spaces": False,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        write_json(directory / "tokenizer_config.json", config)
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
        """Read a Hugging Face directory. Raises CheckpointError when tokenizer.json is missing or broken."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{directory}: tokenizer.json is missing")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the Rust library raises bare Exception
            raise CheckpointError(f"{path}: not a tokenizer ({error})") from error
        config = _read_json(directory / "tokenizer_config.json")
        generation = _read_json(directory / "generation_config.json")

        def special(name: str) -> int | None:
            token = config.get(name)
            text = token.get("content") if isinstance(token, dict) else token
            return None if text is None else backend.token_to_id(text)

        eos = special("eos_token")
        stops = generation.get("eos_token_id", eos)
        stop_ids = stops if isinstance(stops, list) else [stops]
        template = config.get("chat_template")
        beside = directory / "chat_template.jinja"
        if beside.is_file():
            template = beside.read_text(encoding="utf-8")
        return cls(
            backend=backend,
            bos_token_id=special("bos_token"),
            eos_token_id=eos,
            pad_token_id=special("pad_token"),
            stop_token_ids=tuple(dict.fromkeys(i for i in [*stop_ids, eos] if i is not None)),
            chat_template=template,
            add_bos_token=bool(config.get("add_bos_token", False)),
        )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value

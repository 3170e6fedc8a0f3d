"""The tokenizer in a GGUF file's metadata."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from gristmill.errors import CheckpointError
from gristmill.model.formats.gguf_reader import GGUFFile
from gristmill.tokens.tokenizer import Tokenizer

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>")


def read_tokenizer(file: GGUFFile) -> Tokenizer:
    """Raises CheckpointError for a tokenizer that is not byte-level BPE, or whose parts do not fit together."""
    kind = file.need("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise CheckpointError(f"{file.path}: tokenizer.ggml.model {kind!r} is not supported (supported: 'gpt2')")
    backend = _backend(file)

    def special(name: str) -> int | None:
        index = file.get(f"tokenizer.ggml.{name}_token_id", int)
        if index is not None and backend.id_to_token(index) is None:
            raise CheckpointError(f"{file.path}: tokenizer.ggml.{name}_token_id {index} is not a token")
        return index

    eos = special("eos")
    stops = [eos, special("eot"), *map(backend.token_to_id, _TURN_ENDS)]
    return Tokenizer(
        backend=backend,
        bos_token_id=special("bos"),
        eos_token_id=eos,
        pad_token_id=special("padding"),
        stop_token_ids=tuple(dict.fromkeys(token for token in stops if token is not None)),
        chat_template=file.get("tokenizer.chat_template", str),
        add_bos_token=bool(file.get("tokenizer.ggml.add_bos_token", bool)),
    )


def _backend(file: GGUFFile) -> Backend:
    tokens = file.need_list("tokenizer.ggml.tokens", str)
    types = file.get_list("tokenizer.ggml.token_type", int) or [_NORMAL] * len(tokens)
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens) or len(types) != len(tokens):
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.tokens has {len(tokens)} entries, {len(ids)} of them different, "
            f"and tokenizer.ggml.token_type {len(types)}; the three must be the same"
        )
    pairs = [pair.split(" ", 1) for pair in file.need_list("tokenizer.ggml.merges", str)]
    try:
        backend = Backend(models.BPE(vocab=ids, merges=[(left, right) for left, right in pairs]))
    except Exception as error:  # the Rust library raises bare Exception
        raise CheckpointError(f"{file.path}: tokenizer.ggml.merges do not fit the tokens ({error})") from error
    backend.pre_tokenizer = _pre_tokenizer(file.get("tokenizer.ggml.pre", str) or "default", file.path)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return backend


def _pre_tokenizer(kind: str, path: Path) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind in ("gpt-2", "default"):
        return byte_level
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if kind in ("llama-bpe", "qwen2"):
        digits = r"\p{N}{1,3}" if kind == "llama-bpe" else r"\p{N}"
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    raise CheckpointError(f"{path}: tokenizer.ggml.pre {kind!r} is not supported")

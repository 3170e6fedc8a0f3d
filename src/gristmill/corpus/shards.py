"""Token documents on disk: flat binary shards that are memory-mapped, and an index that says what they hold.

A shard is a file of little-endian uint16 or uint32 token ids, a file of uint32 document lengths, and with loss masks
a file of one byte a token. `index.json` names the files with their sizes and SHA-256, the vocabulary size and the
tokenizer's hash, so that shards of another tokenizer are refused.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np

from gristmill.errors import DataError
from gristmill.files import atomic_directory, write_json

if TYPE_CHECKING:
    from gristmill.model.config import ModelConfig

FORMAT, VERSION, INDEX = "gristmill-shards", 1, "index.json"

TokenDocument = tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray | None]
"""Token ids and loss mask, 1 where a token is to be learned; None where the corpus has no masks."""


class TokenSource(Protocol):
    """What a loader needs: lengths known up front, and any stretch of any document."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 of shape (documents,)."""

    @property
    def vocab_size(self) -> int:
        """All ids are below this."""

    def read(self, pieces: np.ndarray) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Ids and loss mask, None where all are to be learned, of each (document, start, end), shape (pieces, 3).

        Raises DataError for an id outside the vocabulary.
        """


def check_vocabulary(source: TokenSource, config: "ModelConfig") -> None:
    """Raise DataError when ids of the source may have no row in the model's embedding.

    An embedding with more rows than the vocabulary has ids is fine: many are rounded up.
    """
    if source.vocab_size > config.vocab_size:
        where = f"{source.directory}: " if isinstance(source, TokenDataset) else ""
        raise DataError(
            f"{where}the corpus has a vocabulary of {source.vocab_size}, but the model's embedding (vocab_size) has "
            f"{config.vocab_size} rows. Build the model for the corpus' tokenizer, or tokenise with the model's."
        )


class TokenList:
    """Token documents in memory. Raises DataError as `write_shards` does."""

    def __init__(self, documents: Iterable[TokenDocument], *, vocab_size: int) -> None:
        self._documents = [
            (_checked_ids(ids, vocab_size, number), _checked_mask(mask, len(ids), number))
            for number, (ids, mask) in enumerate(documents)
        ]
        self.lengths = np.array([len(ids) for ids, _ in self._documents], dtype=np.int64)
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return len(self._documents)

    def piece(self, document: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Ids and mask of a stretch of one document."""
        ids, mask = self._documents[document]
        return ids[start:end], None if mask is None else mask[start:end]

    def read(self, pieces: np.ndarray) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """See `TokenSource`."""
        return [self.piece(*piece) for piece in pieces.tolist()]


@dataclass
class _Shard:
    """One shard's entry in the index; `sha256` is by file name."""

    name: str
    documents: int = 0
    tokens: int = 0
    sha256: dict[str, str] = field(default_factory=dict)


def write_shards(
    documents: Iterable[TokenDocument],
    directory: Path,
    *,
    vocab_size: int,
    tokenizer_hash: str,
    eos_token_id: int | None,
    shard_tokens: int = 2**26,
) -> "TokenDataset":
    """Write documents as they come and open the result; the directory appears whole or not at all.

    `eos_token_id` is appended, to be learned, to each document that does not end with it; None appends nothing.
    A shard is closed once it holds `shard_tokens`; documents are never split.
    Raises DataError, naming the document by number, for an empty one, an id outside the vocabulary, a mask of another
    length or one that trains nothing, or masks on some documents only.
    """
    if eos_token_id is not None and not 0 <= eos_token_id < vocab_size:
        raise DataError(f"eos_token_id {eos_token_id} is outside the vocabulary of {vocab_size}")
    dtype = "<u2" if vocab_size <= 2**16 else "<u4"
    with atomic_directory(directory) as temporary:
        writer = _Writer(temporary, dtype, shard_tokens)
        for number, (raw_ids, raw_mask) in enumerate(documents):
            ids = _checked_ids(raw_ids, vocab_size, number)
            mask = _checked_mask(raw_mask, len(ids), number)
            if eos_token_id is not None and ids[-1] != eos_token_id:
                ids = np.append(ids, eos_token_id)
                mask = None if mask is None else np.append(mask, np.uint8(1))
            writer.add(ids, mask, number)
        shards = writer.close()
        if not shards:
            raise DataError(f"{directory}: there are no documents to write")
        index = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": dtype,
            "vocab_size": vocab_size,
            "tokenizer_hash": tokenizer_hash,
            "eos_token_id": eos_token_id,
            "masks": bool(writer.masks),
            "documents": sum(shard.documents for shard in shards),
            "tokens": sum(shard.tokens for shard in shards),
            "shards": [asdict(shard) for shard in shards],
        }
        write_json(temporary / INDEX, index)
    return TokenDataset.open(directory, tokenizer_hash=tokenizer_hash)


class TokenDataset:
    """Memory-mapped shards; `open` one. Documents are numbered through all shards in the order they were written."""

    def __init__(self, directory: Path, index: dict[str, Any]) -> None:
        """Use `open`, which checks the files first."""
        self.directory = directory
        self.vocab_size: int = index["vocab_size"]
        self.tokenizer_hash: str = index["tokenizer_hash"]
        self.eos_token_id: int | None = index["eos_token_id"]
        self.tokens: int = index["tokens"]
        """Tokens of all documents."""
        self.fingerprint = hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
        """Changes with any token, mask or boundary; a resumed run compares it."""
        self._shards = [_Shard(**shard) for shard in index["shards"]]
        lengths = [_read_lengths(directory, shard) for shard in self._shards]
        self.lengths = np.concatenate(lengths).astype(np.int64)
        self._ids = [_map(directory / f"{shard.name}.bin", index["dtype"], shard.tokens) for shard in self._shards]
        self._masks = (
            [_map(directory / f"{shard.name}.mask", "u1", shard.tokens) for shard in self._shards]
            if index["masks"]
            else None
        )
        self._shard_of = np.repeat(np.arange(len(lengths)), [len(part) for part in lengths])
        self._begin = np.concatenate([np.cumsum(part, dtype=np.int64) - part for part in lengths])

    @classmethod
    def open(cls, directory: Path, *, tokenizer_hash: str | None = None) -> "TokenDataset":
        """Check the index, the sizes of all files and the document lengths, then map the tokens.

        Ids are checked against the vocabulary where they are read; `verify` reads and checks all of it at once.
        Raises DataError, naming file and field, for what does not match.
        """
        index = _read_index(directory)
        if tokenizer_hash is not None and index["tokenizer_hash"] != tokenizer_hash:
            raise DataError(
                f"{directory}: written with another tokenizer (hash {index['tokenizer_hash']}, expected "
                f"{tokenizer_hash}). Write the shards again with this tokenizer."
            )
        dataset = cls(directory, index)
        if len(dataset.lengths) != index["documents"] or int(dataset.lengths.sum()) != index["tokens"]:
            raise DataError(
                f"{directory / INDEX}: says {index['documents']} documents and {index['tokens']} tokens, but the "
                f"shards hold {len(dataset.lengths)} and {int(dataset.lengths.sum())}"
            )
        return dataset

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenDataset.open, (self.directory,)  # another process maps the files, instead of getting a copy

    def document(self, number: int) -> np.ndarray:
        """Token ids of one document: a read-only view of the mapped file, shape (length,)."""
        return self.piece(number, 0, int(self.lengths[number]))[0]

    def mask(self, number: int) -> np.ndarray | None:
        """Loss mask of one document, uint8 of shape (length,), or None for a corpus without masks."""
        return self.piece(number, 0, int(self.lengths[number]))[1]

    def piece(self, document: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Ids and mask of a stretch of one document. Raises DataError for an id outside the vocabulary."""
        shard = self._shard_of[document]
        begin = self._begin[document]
        ids = self._ids[shard][begin + start : begin + end]
        if end > start and ids.max() >= self.vocab_size:
            raise DataError(
                f"{self.directory / self._shards[shard].name}.bin: document {document} holds token id {ids.max()}, "
                f"but the vocabulary has {self.vocab_size}"
            )
        return ids, None if self._masks is None else self._masks[shard][begin + start : begin + end]

    def read(self, pieces: np.ndarray) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """See `TokenSource`. Ids are looked through together: piece by piece that would take most of the time."""
        documents = pieces[:, 0]
        shards = self._shard_of[documents].tolist()
        begins = (self._begin[documents] + pieces[:, 1]).tolist()
        ends = (self._begin[documents] + pieces[:, 2]).tolist()
        spans = list(zip(shards, begins, ends, strict=True))
        ids = [self._ids[shard][begin:end] for shard, begin, end in spans]
        if ids and np.concatenate(ids).max(initial=0) >= self.vocab_size:
            return [self.piece(*piece) for piece in pieces.tolist()]  # names the document
        if self._masks is None:
            return [(item, None) for item in ids]
        masks = [self._masks[shard][begin:end] for shard, begin, end in spans]
        return list(zip(ids, masks, strict=True))

    def verify(self) -> None:
        """Read every file and compare its SHA-256 with the index, and every id with the vocabulary."""
        for shard, ids in zip(self._shards, self._ids, strict=True):
            for name, expected in shard.sha256.items():
                with (self.directory / name).open("rb") as handle:
                    found = hashlib.file_digest(handle, "sha256").hexdigest()
                if found != expected:
                    raise DataError(f"{self.directory / name}: SHA-256 is {found}, the index says {expected}")
            if ids.max() >= self.vocab_size:
                raise DataError(
                    f"{self.directory / shard.name}.bin: holds token id {ids.max()}, but the vocabulary has "
                    f"{self.vocab_size}"
                )


class _Writer:
    """Appends documents to the current shard and hashes what it writes."""

    def __init__(self, directory: Path, dtype: str, shard_tokens: int) -> None:
        self.directory, self.dtype, self.shard_tokens = directory, dtype, shard_tokens
        self.masks: bool | None = None
        self.shards: list[_Shard] = []
        self.files: dict[str, IO[bytes]] = {}
        self.hashes: dict[str, Any] = {}

    def add(self, ids: np.ndarray, mask: np.ndarray | None, number: int) -> None:
        if self.masks is None:
            self.masks = mask is not None
        if self.masks != (mask is not None):
            raise DataError(f"document {number}: loss masks must be given for all documents or for none")
        if not self.files:
            self.shards.append(_Shard(f"shard-{len(self.shards):05d}"))
        shard = self.shards[-1]
        self._write(f"{shard.name}.bin", ids.astype(self.dtype))
        self._write(f"{shard.name}.lengths", np.array([len(ids)], dtype="<u4"))
        if mask is not None:
            self._write(f"{shard.name}.mask", mask)
        shard.documents += 1
        shard.tokens += len(ids)
        if shard.tokens >= self.shard_tokens:
            self.close()

    def close(self) -> list[_Shard]:
        """Finish the current shard, if one is open; the shards so far."""
        for name, file in self.files.items():
            file.close()
            self.shards[-1].sha256[name] = self.hashes[name].hexdigest()
        self.files, self.hashes = {}, {}
        return self.shards

    def _write(self, name: str, values: np.ndarray) -> None:
        if name not in self.files:
            self.files[name] = (self.directory / name).open("wb")
            self.hashes[name] = hashlib.sha256()
        data = values.tobytes()
        self.files[name].write(data)
        self.hashes[name].update(data)


def _checked_ids(raw: Sequence[int] | np.ndarray, vocab_size: int, number: int) -> np.ndarray:
    ids = np.asarray(raw)
    if ids.ndim != 1 or len(ids) == 0:
        raise DataError(f"document {number} has no tokens")
    if ids.dtype.kind not in "iu":
        raise DataError(f"document {number}: token ids must be whole numbers, got {ids.dtype}")
    ids = ids.astype(np.int64)
    if ids.min() < 0 or ids.max() >= vocab_size:
        worst = ids.min() if ids.min() < 0 else ids.max()
        raise DataError(f"document {number}: token id {worst} is outside the vocabulary of {vocab_size}")
    return ids


def _checked_mask(raw: Sequence[int] | np.ndarray | None, length: int, number: int) -> np.ndarray | None:
    if raw is None:
        return None
    mask = np.asarray(raw)
    if mask.shape != (length,):
        raise DataError(f"document {number} has {length} tokens, but its loss mask has {len(mask)}")
    if not np.isin(mask, (0, 1)).all():
        raise DataError(f"document {number}: its loss mask must hold 0 and 1 alone")
    mask = mask.astype(np.uint8)
    if not mask[1:].any():
        raise DataError(f"document {number}: its loss mask trains nothing (the first token is never predicted)")
    return mask


def _read_index(directory: Path) -> dict[str, Any]:
    path = directory / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); this is no folder of token shards") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DataError(f'{path}: field "format" is not {FORMAT}')
    if index.get("version") != VERSION:
        raise DataError(f"{path}: version {index.get('version')} is not known here, only {VERSION}. Write it again.")
    fields = ("dtype", "vocab_size", "tokenizer_hash", "eos_token_id", "masks", "documents", "tokens", "shards")
    missing = [name for name in fields if name not in index]
    if missing:
        raise DataError(f"{path}: missing fields: {', '.join(missing)}")
    if index["dtype"] not in ("<u2", "<u4"):
        raise DataError(f'{path}: field "dtype" must be <u2 or <u4, found {index["dtype"]!r}')
    return index


def _read_lengths(directory: Path, shard: _Shard) -> np.ndarray:
    path = directory / f"{shard.name}.lengths"
    data = np.asarray(_map(path, "<u4", shard.documents))
    if hashlib.sha256(data.tobytes()).hexdigest() != shard.sha256.get(path.name):
        raise DataError(f"{path}: SHA-256 differs from the index; the document boundaries cannot be trusted")
    if int(data.sum(dtype=np.int64)) != shard.tokens:
        raise DataError(f"{path}: lengths sum to {data.sum(dtype=np.int64)}, the index says {shard.tokens} tokens")
    return data


def _map(path: Path, dtype: str, count: int) -> np.ndarray:
    """A read-only map of a file that must hold exactly `count` values. Plain views of it slice faster than memmaps."""
    expected = count * np.dtype(dtype).itemsize
    try:
        size = path.stat().st_size
        if size != expected:
            raise DataError(f"{path}: {size} bytes, but the index says {count} values, which are {expected} bytes")
        return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error

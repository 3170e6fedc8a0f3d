"""Text to token shards: what a run reads, tokenised once and kept in its directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from gristmill import assets
from gristmill.core import Objective
from gristmill.corpus.document import Document
from gristmill.corpus.loader import PackedLoader
from gristmill.corpus.mixture import MixedLoader, Part
from gristmill.corpus.shards import INDEX, TokenDataset, write_shards
from gristmill.corpus.sources import BLANK_LINE, read_articles, read_jsonl, read_text
from gristmill.corpus.split import is_held_out
from gristmill.errors import AssetError, DataError
from gristmill.files import atomic_directory, write_json
from gristmill.pretrain.config import PretrainConfig
from gristmill.pretrain.recipes import special_tokens
from gristmill.progress import progress
from gristmill.tokens.tokenizer import Tokenizer
from gristmill.tokens.train import train_bpe

_TOKENIZER_DOCUMENTS = 50_000
_AT_ONCE = 1000


def read_source(name: str) -> Iterator[Document]:
    """The documents of a file, a directory of files or an asset. Raises DataError for what is none of them."""
    path = Path(name)
    if not path.exists():
        try:
            path = assets.get(name)
        except AssetError as error:
            raise DataError(f"data: {name} is neither a file, a directory nor an asset ({error})") from error
    files = sorted(path.rglob("*.txt")) + sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"data: {path} holds no .txt and no .jsonl file")
    for file in files:
        if file.suffix == ".jsonl":
            yield from read_jsonl(file)
        elif file.suffix == ".json":
            yield from read_articles(file)
        else:
            yield from read_text(file, BLANK_LINE)


def prepare_tokenizer(config: PretrainConfig) -> Tokenizer:
    """The tokenizer of the run: the one given, or one trained on the first documents of each source and kept."""
    if config.tokenizer:
        return Tokenizer.load(Path(config.tokenizer))
    directory = config.directory / "tokenizer"
    if not directory.exists():
        if any(_is_shards(name) for name in config.data):
            raise DataError("data are token shards: give the tokenizer that they were written with")
        texts = chain.from_iterable(_some(name) for name in config.data)
        with progress("tokenizer", _TOKENIZER_DOCUMENTS * len(config.data)) as advance:
            counted = (advance(number) or text for number, text in enumerate(texts, start=1))
            tokenizer = train_bpe(counted, config.vocab_size, special_tokens=special_tokens(config.objective))
        with atomic_directory(directory) as temporary:
            tokenizer.save(temporary)
    return Tokenizer.load(directory)


def tokenizer_hash(config: PretrainConfig) -> str:
    """What shards say of the tokenizer that they were written with."""
    directory = Path(config.tokenizer) if config.tokenizer else config.directory / "tokenizer"
    return hashlib.sha256((directory / "tokenizer.json").read_bytes()).hexdigest()


def prepare_shards(config: PretrainConfig, tokenizer: Tokenizer) -> list[tuple[TokenDataset, TokenDataset | None]]:
    """Token shards of each source, to train on and held out; made once, and again when a source has changed.

    Of a source that is shards already nothing is held out here: None.
    """
    found: list[tuple[TokenDataset, TokenDataset | None]] = []
    mark = tokenizer_hash(config)
    for number, name in enumerate(config.data):
        if _is_shards(name):
            found.append((TokenDataset.open(Path(name), tokenizer_hash=mark), None))
            continue
        folder = config.directory / "tokens" / f"{number:02d}"
        facts = {"data": name, "stamp": _stamp(name), "tokenizer": mark, "held_out": config.held_out}
        if not _is_made(folder, facts):
            with atomic_directory(folder) as temporary:
                for part in ("train", "held-out"):
                    _write(name, temporary / part, part == "held-out", config.held_out, tokenizer, mark)
                write_json(temporary / "source.json", facts)
        parts = [TokenDataset.open(folder / part, tokenizer_hash=mark) for part in ("train", "held-out")]
        found.append((parts[0], parts[1]))
    return found


def loaders(
    config: PretrainConfig, objective: Objective, sources: list[tuple[TokenDataset, TokenDataset | None]]
) -> tuple[PackedLoader | MixedLoader, PackedLoader | MixedLoader | None]:
    """What the run trains on, and what its loss is measured on: None where nothing is held out."""
    shares = config.weights or tuple(float(source.tokens) for source, _ in sources)
    training = [Part(f"{n}:{config.data[n]}", source, shares[n]) for n, (source, _) in enumerate(sources)]
    held_out = [
        Part(f"{n}:{config.data[n]}", kept, shares[n]) for n, (_, kept) in enumerate(sources) if kept is not None
    ]

    def one(parts: list[Part]) -> PackedLoader | MixedLoader:
        length, rows, seed, prepare = config.row_length, config.rows_per_batch, config.seed, objective.prepare
        if len(parts) == 1:
            source = parts[0].source
            return PackedLoader(source, row_length=length, rows_per_batch=rows, seed=seed, prepare=prepare)
        return MixedLoader(parts, row_length=length, rows_per_batch=rows, seed=seed, prepare=prepare)

    return one(training), one(held_out) if held_out else None


def _some(name: str) -> Iterator[str]:
    for number, document in enumerate(read_source(name)):
        if number == _TOKENIZER_DOCUMENTS:
            return
        yield document.text


def _write(name: str, directory: Path, held_out: bool, share: float, tokenizer: Tokenizer, mark: str) -> None:
    def documents() -> Iterator[tuple[list[int], None]]:
        texts: list[str] = []
        for document in read_source(name):
            if is_held_out(document.id, share) == held_out:
                texts.append(document.text)
            if len(texts) == _AT_ONCE:
                yield from ((ids, None) for ids in tokenizer.encode_batch(texts, special_tokens=False) if ids)
                texts.clear()
        yield from ((ids, None) for ids in tokenizer.encode_batch(texts, special_tokens=False) if ids)

    try:
        write_shards(
            documents(),
            directory,
            vocab_size=tokenizer.vocab_size,
            tokenizer_hash=mark,
            eos_token_id=tokenizer.eos_token_id,
        )
    except DataError as error:
        if held_out and "no documents" in str(error):
            raise DataError(f"data: {name} has too few documents to hold out a share of {share}") from error
        raise


def _is_shards(name: str) -> bool:
    return (Path(name) / INDEX).exists()


def _is_made(folder: Path, facts: dict[str, object]) -> bool:
    try:
        return bool(json.loads((folder / "source.json").read_text(encoding="utf-8")) == facts)
    except (OSError, ValueError):
        return False


def _stamp(name: str) -> str:
    """Changes with names, sizes and times of a source's files; empty for an asset, which never changes."""
    path = Path(name)
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    parts = [f"{file}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files if file.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16] if parts else ""

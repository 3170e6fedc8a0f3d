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
from gristmill.errors import AssetError, CheckpointError, DataError
from gristmill.files import atomic_directory, write_json
from gristmill.pretrain.config import PretrainConfig
from gristmill.pretrain.recipes import special_tokens
from gristmill.pretrain.settings import has_begun
from gristmill.progress import progress
from gristmill.tokens.tokenizer import Tokenizer
from gristmill.tokens.train import train_bpe

_TOKENIZER_DOCUMENTS = 50_000
_AT_ONCE = 1000
_PARTS = ("train", "held-out")
_SOURCE = "source.json"


def read_source(name: str, config: PretrainConfig) -> Iterator[Document]:
    """The documents of a file, a directory of files or an asset. Raises DataError for what is none of them."""
    path = Path(name)
    if not path.exists():
        try:
            path = assets.get(name)
        except AssetError as error:
            mend = " Several are written [a,b]." if "," in name else ""
            raise DataError(f"data: {name} is neither a file, a directory nor an asset ({error}).{mend}") from error
    files = sorted(path.rglob("*.txt")) + sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"data: {path} holds no .txt, no .jsonl file and no token shards")
    for file in files:
        if file.suffix == ".jsonl":
            yield from read_jsonl(file, config.text_field, on_error=config.on_error)
        elif file.suffix == ".json":
            yield from read_articles(file)
        else:
            yield from read_text(file, BLANK_LINE)


def prepare_tokenizer(config: PretrainConfig) -> Tokenizer:
    """The tokenizer of the run: the one given, or one trained on the first documents of each source and kept.

    It is trained again when what it was made of has changed and no checkpoint hangs on it.
    """
    if config.tokenizer:
        return Tokenizer.load(Path(config.tokenizer))
    directory = config.directory / "tokenizer"
    specials = special_tokens(config.objective)
    facts = {**_facts(config, *config.data), "vocab_size": config.vocab_size, "special_tokens": list(specials)}
    if not directory.exists() or not (has_begun(config) or _is_made(directory, facts)):
        if any(_shards(name) for name in config.data):
            raise DataError("data are token shards: give --tokenizer, the one that they were written with")
        texts = chain.from_iterable(_some(name, config) for name in config.data)
        with progress("tokenizer", _TOKENIZER_DOCUMENTS * len(config.data)) as advance:
            counted = (advance(number) or text for number, text in enumerate(texts, start=1))
            tokenizer = train_bpe(counted, config.vocab_size, special_tokens=specials)
        with atomic_directory(directory) as temporary:
            tokenizer.save(temporary)
            write_json(temporary / _SOURCE, facts)
    return Tokenizer.load(directory)


def tokenizer_hash(config: PretrainConfig) -> str:
    """What shards say of the tokenizer that they were written with."""
    directory = Path(config.tokenizer) if config.tokenizer else config.directory / "tokenizer"
    return hashlib.sha256((directory / "tokenizer.json").read_bytes()).hexdigest()


def prepare_shards(config: PretrainConfig, tokenizer: Tokenizer) -> list[tuple[TokenDataset, TokenDataset | None]]:
    """Token shards of each source, to train on and held out; made once, and again when a source has changed.

    Of a source that is one folder of shards nothing is held out: None. Raises CheckpointError when a source gives other
    tokens than those that the run was trained on so far, and leaves these.
    """
    found: list[tuple[TokenDataset, TokenDataset | None]] = []
    mark = tokenizer_hash(config)
    for number, name in enumerate(config.data):
        if ready := _shards(name):
            train, *rest = [TokenDataset.open(path, tokenizer_hash=mark) for path in ready]
            found.append((train, rest[0] if rest else None))
            continue
        folder = config.directory / "tokens" / f"{number:02d}"
        facts = {**_facts(config, name), "tokenizer": mark, "held_out": config.held_out}
        if not _is_made(folder, facts):
            with atomic_directory(folder) as temporary:
                made = [_write(config, name, temporary / part, tokenizer, mark) for part in _PARTS]
                if has_begun(config) and folder.exists():
                    before = [TokenDataset.open(folder / part).fingerprint for part in _PARTS]
                    if before != [dataset.fingerprint for dataset in made]:
                        raise CheckpointError(
                            f"{name} gives other tokens than those {config.directory} was trained on so far (the file, "
                            "held_out or the tokenizer has changed). Use another directory, or delete this one to "
                            "start anew."
                        )
                write_json(temporary / _SOURCE, facts)
        parts = [TokenDataset.open(folder / part, tokenizer_hash=mark) for part in _PARTS]
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


def _some(name: str, config: PretrainConfig) -> Iterator[str]:
    for number, document in enumerate(read_source(name, config)):
        if number == _TOKENIZER_DOCUMENTS:
            return
        yield document.text


def _write(config: PretrainConfig, name: str, directory: Path, tokenizer: Tokenizer, mark: str) -> TokenDataset:
    held_out, share = directory.name == "held-out", config.held_out

    def documents() -> Iterator[tuple[list[int], None]]:
        texts: list[str] = []
        for document in read_source(name, config):
            if is_held_out(document.id, share) == held_out:
                texts.append(document.text)
            if len(texts) == _AT_ONCE:
                yield from ((ids, None) for ids in tokenizer.encode_batch(texts, special_tokens=False) if ids)
                texts.clear()
        yield from ((ids, None) for ids in tokenizer.encode_batch(texts, special_tokens=False) if ids)

    try:
        return write_shards(
            documents(),
            directory,
            vocab_size=tokenizer.vocab_size,
            tokenizer_hash=mark,
            eos_token_id=tokenizer.eos_token_id,
        )
    except DataError as error:
        if "no documents" not in str(error):
            raise
        what = f"hold out a share of {share}" if held_out else f"train on when a share of {share} is held out"
        raise DataError(
            f"data: {name} has too few documents to {what}. In text a blank line ends a document; change held_out."
        ) from error


def _shards(name: str) -> list[Path]:
    """Where a source is token shards: one folder, or those to train on and held out, as a run leaves them."""
    path = Path(name)
    parts = [path / part for part in _PARTS]
    return [path] if (path / INDEX).exists() else parts if all((part / INDEX).exists() for part in parts) else []


def _facts(config: PretrainConfig, *names: str) -> dict[str, object]:
    """What the documents of some sources hang on."""
    stamps = [_stamp(name) for name in names]
    return {"data": list(names), "stamps": stamps, "text_field": config.text_field, "on_error": config.on_error}


def _is_made(folder: Path, facts: dict[str, object]) -> bool:
    try:
        return bool(json.loads((folder / _SOURCE).read_text(encoding="utf-8")) == facts)
    except (OSError, ValueError):
        return False


def _stamp(name: str) -> str:
    """Changes with names, sizes and times of a source's files; empty for an asset, which never changes."""
    path = Path(name)
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    parts = [f"{file}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files if file.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16] if parts else ""

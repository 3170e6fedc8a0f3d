"""The stages of the quickstart. Each reads what earlier ones left in the run directory and leaves its own files."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from gristmill import assets
from gristmill.align.encyclopedia import Article, articles, conversations, topics
from gristmill.align.sft import render_conversations
from gristmill.corpus.document import Document
from gristmill.corpus.funnel import DOCUMENTS, default_steps, run_pipeline
from gristmill.corpus.loader import PackedLoader
from gristmill.corpus.shards import TokenDataset, write_shards
from gristmill.corpus.sources import read_articles, read_documents
from gristmill.corpus.split import split
from gristmill.errors import DataError
from gristmill.files import atomic_directory
from gristmill.model.config import ModelConfig
from gristmill.model.formats.huggingface import save_huggingface
from gristmill.model.load import load_model
from gristmill.model.presets import preset
from gristmill.model.transformer import Transformer
from gristmill.objectives.causal import CausalLM
from gristmill.progress import progress
from gristmill.quickstart.config import (
    BUDGETS,
    HELD_OUT_SHARE,
    ROW_LENGTH,
    QuickstartConfig,
    choose_precision,
    train_config,
)
from gristmill.quickstart.run import StageRecord
from gristmill.tokens.renderer import JinjaRenderer
from gristmill.tokens.tokenizer import Tokenizer
from gristmill.tokens.train import compression, train_bpe
from gristmill.train.loop import train


@dataclass(frozen=True)
class Quickstart:
    """A run: its options and where its parts lie."""

    config: QuickstartConfig

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.config.directory

    @property
    def export_directory(self) -> Path:
        """The fine-tuned model, as Hugging Face tools read it."""
        return self.directory / "export"

    @property
    def base_directory(self) -> Path:
        """The pretrained model before fine-tuning, likewise."""
        return self.directory / "base"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer this run has trained."""
        return Tokenizer.load(self.directory / "tokenizer")

    @cached_property
    def documents(self) -> tuple[list[Document], list[Document]]:
        """Cleaned documents to train on, and those held out."""
        return split(read_documents(self.directory / "corpus" / DOCUMENTS), HELD_OUT_SHARE)

    @property
    def model_config(self) -> ModelConfig:
        """The architecture of the preset over this run's vocabulary."""
        return preset(self.config.preset, vocab_size=self.tokenizer.vocab_size)

    def held_out_articles(self) -> list[Article]:
        """What questions about unseen articles are made from."""
        return list(articles(self.documents[1]))


def clean_corpus(run: Quickstart, record: StageRecord) -> None:
    """Raw articles -> cleaned, de-duplicated documents and the funnel. Raises DataError when they are too few."""
    path = Path(run.config.corpus) if run.config.corpus else assets.get("wikipedia-summaries")
    everything = list(read_articles(path))
    raw = spread(everything, BUDGETS[run.config.preset].documents)
    if len(raw) < len(everything):
        note = f"preset {run.config.preset} takes {len(raw):,} of the {len(everything):,} articles"
        print(note, file=sys.stderr, flush=True)
    funnel = run_pipeline(_counted(raw, "cleaning", len(raw)), default_steps(), run.directory / "corpus")
    training, held_out = run.documents
    _require_topics(path, training, held_out)
    record.facts = {
        "found": len(everything),
        "read": funnel.documents_in,
        "kept": funnel.kept,
        "training": len(training),
        "held_out": len(held_out),
    }


def _require_topics(path: Path, training: list[Document], held_out: list[Document]) -> None:
    """Say now, not after the training, that there is nothing to ask the model."""
    known, asked = topics(articles(training)), topics(articles(held_out))
    if len(known) < 2 or len(asked) < 2:
        raise DataError(
            f"{path}: the topic questions need at least two topics among the articles to train on (found: "
            f"{', '.join(known) or 'none'}) and among the {len(held_out)} held out of "
            f"{len(training) + len(held_out)} (found: {', '.join(asked) or 'none'}). Give more articles."
        )


def train_tokenizer(run: Quickstart, record: StageRecord) -> None:
    """Documents -> a byte-level BPE tokenizer with ChatML tokens. Held-out text is not looked at."""
    training, held_out = run.documents
    texts = _counted((document.text for document in training), "tokenizer", len(training))
    tokenizer = train_bpe(texts, preset(run.config.preset).vocab_size)
    with atomic_directory(run.directory / "tokenizer") as temporary:
        tokenizer.save(temporary)
    record.facts = {
        "vocabulary": tokenizer.vocab_size,
        "bytes_per_token": compression(tokenizer, [document.text for document in held_out]),
    }


def tokenise(run: Quickstart, record: StageRecord) -> None:
    """Documents -> token shards, training and held out apart."""
    total = 0
    for name, documents in zip(("train", "held-out"), run.documents, strict=True):
        ids = run.tokenizer.encode_batch([document.text for document in documents], special_tokens=False)
        total += _write(run, name, ((item, None) for item in ids), run.tokenizer.eos_token_id).tokens
    record.tokens = total


def pretrain(run: Quickstart, record: StageRecord) -> None:
    """Token shards -> the base model, trained from random weights."""
    budget = BUDGETS[run.config.preset]
    model = Transformer(run.model_config)
    model.initialise(run.config.seed)
    _train(run, record, model, "pretrain", ("train", "held-out"), budget.pretrain_epochs, budget.pretrain_learning_rate)
    _save_model(run, model, run.base_directory)


def make_questions(run: Quickstart, record: StageRecord) -> None:
    """Articles -> question-answer pairs -> token shards with loss masks. Those too long are counted and left out."""
    renderer = JinjaRenderer(run.tokenizer)
    total = pairs = 0
    left_out: list[str] = []
    for name, documents in zip(("questions", "questions-held-out"), run.documents, strict=True):
        chats = [chat for article in articles(documents) for chat in conversations(article)]
        rendered = render_conversations(
            chats, renderer, max_tokens=ROW_LENGTH, on_error=lambda error: left_out.append(str(error))
        )
        total += _write(run, name, _counted(rendered, name, len(chats)), None).tokens
        pairs += len(chats)
    if left_out:
        print(f"{len(left_out)} of {pairs} pairs left out, the first: {left_out[0]}", file=sys.stderr)
    record.tokens, record.facts = total, {"pairs": pairs - len(left_out), "left_out": len(left_out)}


def finetune(run: Quickstart, record: StageRecord) -> None:
    """The base model and the question-answer pairs -> the chat model, exported as a Hugging Face directory."""
    budget = BUDGETS[run.config.preset]
    model, _ = load_model(run.base_directory)
    names = ("questions", "questions-held-out")
    _train(run, record, model, "finetune", names, budget.finetune_epochs, budget.finetune_learning_rate)
    _save_model(run, model, run.export_directory)


T = TypeVar("T")


def spread(items: Sequence[T], count: int | None) -> list[T]:
    """`count` items evenly spaced, or all: the articles are sorted by topic, and each topic must keep its share."""
    if count is None or count >= len(items):
        return list(items)
    return [items[number * len(items) // count] for number in range(count)]


def _counted(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Pass items on and show how many went by."""
    with progress(description, total) as advance:
        for number, item in enumerate(items, start=1):
            advance(number)
            yield item


def _write(
    run: Quickstart, name: str, documents: Iterator[tuple[list[int], list[int] | None]], eos: int | None
) -> TokenDataset:
    return write_shards(
        documents,
        run.directory / "tokens" / name,
        vocab_size=run.tokenizer.vocab_size,
        tokenizer_hash=_tokenizer_hash(run),
        eos_token_id=eos,
    )


def _tokenizer_hash(run: Quickstart) -> str:
    return hashlib.sha256((run.directory / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()


def _train(
    run: Quickstart,
    record: StageRecord,
    model: Transformer,
    name: str,
    data: tuple[str, str],
    epochs: float,
    learning_rate: float,
) -> None:
    rows = BUDGETS[run.config.preset].rows_per_batch
    sources = [TokenDataset.open(run.directory / "tokens" / part, tokenizer_hash=_tokenizer_hash(run)) for part in data]
    loader, held_out = (
        PackedLoader(source, row_length=ROW_LENGTH, rows_per_batch=rows, seed=run.config.seed) for source in sources
    )
    config = train_config(epochs, learning_rate, loader.batches_per_epoch, choose_precision(run.config))
    model.to(run.config.device)
    identity = hashlib.sha256(
        repr((config, model.config, run.config.seed, sources[0].fingerprint)).encode()
    ).hexdigest()
    position = train(
        model,
        CausalLM(),
        loader,
        config,
        run.directory / name,
        validation=held_out,
        identity=identity[:16],
        description=name,
    )
    model.to("cpu")
    lengths = loader.packing.pieces[:, 2] - loader.packing.pieces[:, 1]
    # a token of a document of n tokens attends to (n + 1) / 2 on average
    context = int(np.square(lengths).sum() / lengths.sum() / 2)
    record.seconds, record.tokens = position.seconds, position.tokens
    record.flops = model.config.flops_per_token(context) * position.tokens
    record.facts = {
        "steps": position.step,
        "utilisation": loader.utilisation,
        "parameters": model.count_parameters(),
        "precision": config.precision,
        "learning_rate": learning_rate,
    }


def _save_model(run: Quickstart, model: Transformer, directory: Path) -> None:
    with atomic_directory(directory) as temporary:
        save_huggingface(model, temporary, stop_token_ids=run.tokenizer.stop_token_ids)
        run.tokenizer.save(temporary)

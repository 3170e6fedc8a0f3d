"""Every self-supervised objective on the same data, for the same steps, with the same number of parameters: one table.

    python examples/compare_objectives.py                 # twenty runs, about a minute each on two free cores
    python examples/compare_objectives.py --steps 20      # a first look

Each of the fifteen objectives trains each kind of model that it goes with (twenty runs) on the beginnings of English
Wikipedia summaries, the same documents in the same order. Losses of different objectives cannot be compared; so the
frozen model, decoder or encoder, then gives each document its mean state, and a linear classifier on these names the
topics of held-out documents. Prints a Markdown table and writes it with all settings as JSON.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gristmill import assets
from gristmill.core import Objective
from gristmill.corpus.document import Document
from gristmill.corpus.loader import ExampleLoader
from gristmill.corpus.sources import read_wikipedia_summaries
from gristmill.corpus.split import split
from gristmill.files import write_json
from gristmill.model.attention.packed import PackedAttention
from gristmill.model.config import EmbeddingConfig, EncoderDecoderConfig, ModelConfig
from gristmill.model.encoder import Encoder
from gristmill.model.encoder_decoder import EncoderDecoder
from gristmill.model.heads import HeadConfig, Headed
from gristmill.model.transformer import Stack, Transformer
from gristmill.objectives.encoder_batch import segment_vectors
from gristmill.objectives.noising import alter_tokens
from gristmill.objectives.pairs import IS_NEXT, NOT_NEXT, SentencePair
from gristmill.objectives.sentence_comparison import ScoredPair
from gristmill.objectives.single import example_generator
from gristmill.objectives.spans import choose_places
from gristmill.objectives.taxonomy import Architecture, Symbols, build_objective, pairs
from gristmill.objectives.token_classification import LabelledTokens
from gristmill.tokens.batch import PackedBatch
from gristmill.tokens.train import train_bpe
from gristmill.train.config import TrainConfig
from gristmill.train.loop import train

VOCABULARY, SENTINELS = 2048, 32
OPTIONS: dict[str, dict[str, Any]] = {"sentence comparison": {"loss": "logistic", "scale": 4.0}}
"""Where a builder's own defaults are not meant for two texts that belong together or not."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents as token ids, the number of each one's topic, and the vocabulary's special symbols."""

    documents: Sequence[np.ndarray]
    topics: np.ndarray
    symbols: Symbols


@dataclass(frozen=True)
class Result:
    """A run: losses are of held-out documents, per target and summed over terms; `accuracy` is the probe's."""

    objective: str
    architecture: str
    parameters: int
    tokens: int
    loss_before: float
    loss_after: float
    accuracy: float


def examples(name: str, corpus: Corpus) -> list[Any]:
    """One example per document, of the kind that an objective takes."""
    made: list[Any] = []
    for number, ids in enumerate(corpus.documents):
        generator = example_generator((number,))
        middle, together = (len(ids) + 1) // 2, number % 2 == 0
        other = corpus.documents[number - 1]
        second = ids[middle:] if together else other[(len(other) + 1) // 2 :]
        if name == "next sentence prediction":
            made.append(SentencePair(ids[:middle], second, IS_NEXT if together else NOT_NEXT))
        elif name == "sentence comparison":
            made.append(ScoredPair(ids[:middle], second, float(together)))
        elif name == "token classification":  # which tokens were exchanged
            places = choose_places(generator, len(ids), 0.15)
            drawn = generator.choice(corpus.symbols.vocabulary.ordinary_ids, len(places))
            altered = alter_tokens(ids, places, drawn).ids
            made.append(LabelledTokens(altered, (altered != ids).astype(np.int64)))
        else:
            made.append((ids, None))
    return made


def build_model(name: str, architecture: Architecture, size: ModelConfig, parameters: int) -> nn.Module:
    """A model for an objective, as wide inside its feed-forward layers as brings it nearest to `parameters` weights."""

    def count(width: int) -> int:
        with torch.device("meta"):
            return sum(
                p.numel() for p in _model(name, architecture, replace(size, intermediate_size=width)).parameters()
            )

    per_unit = (count(72) - count(8)) / 64
    width = max(8, 8 * round((parameters - count(8)) / per_unit / 8 + 1))
    model = _model(name, architecture, replace(size, intermediate_size=width))
    model.initialise(0)
    return model


def _model(name: str, architecture: Architecture, size: ModelConfig) -> Any:
    if architecture == "decoder":
        return Transformer(size)
    if architecture == "encoder_decoder":
        half = replace(size, num_hidden_layers=max(1, size.num_hidden_layers // 2))
        sides = (replace(half, causal=False), replace(half, cross_attention=True))
        return EncoderDecoder(EncoderDecoderConfig(encoder=sides[0], decoder=sides[1], decoder_start_token_id=0))
    body = Encoder(replace(size, causal=False, embedding=EmbeddingConfig(token_types=2)))
    if name == "token classification":
        return Headed(body, HeadConfig(kind="token_classifier", labels=("kept", "exchanged")))
    kind: Any = "pretraining" if name == "next sentence prediction" else "masked_lm"
    return body if name == "sentence comparison" else Headed(body, HeadConfig(kind=kind, dense="gelu", norm=True))


@torch.no_grad()
def held_out_loss(model: nn.Module, objective: Objective, loader: ExampleLoader) -> float:
    """The trained loss over an epoch."""
    sums, counts = dict.fromkeys(objective.weights, 0.0), dict.fromkeys(objective.weights, 0)
    for number in range(loader.batches_per_epoch):
        batch = loader.batch(number)
        for name, value in objective.loss_sums(model, batch).items():
            sums[name] += float(value)
            counts[name] += objective.counts(batch)[name]
    return sum(weight * sums[name] / max(1, counts[name]) for name, weight in objective.weights.items())


@torch.no_grad()
def vectors(model: nn.Module, corpus: Corpus) -> Tensor:
    """(documents, hidden): the mean final state of each document's tokens, of the encoder where there is one."""
    stack = model.encoder if isinstance(model, EncoderDecoder) else getattr(model, "body", model)
    assert isinstance(stack, Stack)
    found = []
    for start in range(0, len(corpus.documents), 64):
        batch = PackedBatch.from_segments([(ids, None) for ids in corpus.documents[start : start + 64]])
        cache = PackedAttention(batch.segment_lengths)
        states = stack.hidden_states(batch.input_ids, batch.position_ids, cache)
        found.append(segment_vectors(states, batch.segment_lengths, "mean"))
    return torch.cat(found).double()


def probe(model: nn.Module, training: Corpus, held_out: Corpus) -> float:
    """Share of held-out documents whose topic a ridge classifier on frozen states names."""
    seen, unseen = vectors(model, training), vectors(model, held_out)
    mean, deviation = seen.mean(0), seen.std(0) + 1e-6
    seen, unseen = ((torch.nn.functional.pad((x - mean) / deviation, (0, 1), value=1.0)) for x in (seen, unseen))
    labels = torch.nn.functional.one_hot(torch.from_numpy(training.topics)).double()
    ridge = 0.01 * len(seen) * torch.eye(seen.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(seen.T @ seen + ridge, seen.T @ labels)
    return float(((unseen @ weights).argmax(1) == torch.from_numpy(held_out.topics)).double().mean())


def compare(
    training: Corpus, held_out: Corpus, size: ModelConfig, config: TrainConfig, *, documents_per_batch: int
) -> Iterator[Result]:
    """Train every pair of the taxonomy. The decoder of `size` says how many parameters all models are to have."""
    budget = Transformer(size).count_parameters()
    for entry, architecture in pairs():
        options = OPTIONS.get(entry.name, {})
        objective = build_objective(entry.name, architecture, training.symbols, **options)
        model = build_model(entry.name, architecture, size, budget)
        loaders = [
            ExampleLoader(
                examples(entry.name, corpus),
                examples_per_batch=documents_per_batch,
                seed=config.seed,
                prepare=objective.prepare,
            )
            for corpus in (training, held_out)
        ]
        before = held_out_loss(model.eval(), objective, loaders[1])
        with tempfile.TemporaryDirectory() as folder:
            label = f"{entry.name}, {architecture.replace('_', '-')}"
            position = train(model, objective, loaders[0], config, Path(folder), description=label)
        after, accuracy = held_out_loss(model.eval(), objective, loaders[1]), probe(model, training, held_out)
        count = sum(parameter.numel() for parameter in model.parameters())
        yield Result(entry.name, architecture, count, position.tokens, before, after, accuracy)


def table(results: Sequence[Result]) -> str:
    """Markdown."""
    head = "| objective | model | parameters | tokens read | held-out loss before | after | topics named |"
    lines = [head, "|---|---|---:|---:|---:|---:|---:|"]
    for r in results:
        losses = f"{r.loss_before:.3f} | {r.loss_after:.3f}"
        model = r.architecture.replace("_", "-")
        lines.append(f"| {r.objective} | {model} | {r.parameters:,} | {r.tokens:,} | {losses} | {r.accuracy:.1%} |")
    return "\n".join(lines)


def read(documents: int, length: int) -> tuple[Corpus, Corpus]:
    """The first `length` tokens of so many summaries of the most frequent topics, evenly spaced, and held-out ones."""
    known = read_wikipedia_summaries(assets.get("wikipedia-summaries"))
    sides = [
        side[:: max(1, len(side) // count)] for side, count in zip(split(known, 0.1), (documents, 500), strict=True)
    ]
    specials = ["<|end|>", "[CLS]", "[SEP]", "[MASK]", *(f"<extra_id_{number}>" for number in range(SENTINELS))]
    tokenizer = train_bpe((document.text for document in sides[0]), VOCABULARY, special_tokens=specials)
    start, cls, sep, mask, *sentinels = (tokenizer.backend.token_to_id(name) for name in specials)
    ends = frozenset(i for i in range(tokenizer.vocab_size) if (tokenizer.token_of(i) or "").rstrip().endswith("."))
    symbols = Symbols(
        size=tokenizer.vocab_size,
        cls=cls,
        sep=sep,
        mask=mask,
        start=start,
        sentinels=tuple(sentinels),
        sentence_ends=ends,
    )
    topics = sorted({document.metadata["topic"] for document in sides[0]})

    def corpus(side: Sequence[Document]) -> Corpus:
        kept = [document for document in side if document.metadata["topic"] in topics]
        ids = [np.array(found[:length]) for found in tokenizer.encode_batch([document.text for document in kept])]
        return Corpus(ids, np.array([topics.index(document.metadata["topic"]) for document in kept]), symbols)

    return corpus(sides[0]), corpus(sides[1])


def main() -> None:
    """Parse the options, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="training steps of each run (default 300)")
    parser.add_argument("--documents", type=int, default=4000, help="documents to train on (default 4000)")
    parser.add_argument("--length", type=int, default=64, help="most tokens of a document (default 64)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak learning rate (default 0.002)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the documents and of noises (default 0)")
    parser.add_argument("--out", type=Path, default=Path("objectives.json"), help="where the figures go")
    options = parser.parse_args()
    training, held_out = read(options.documents, options.length)
    size = ModelConfig(
        vocab_size=training.symbols.size,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=352,
        max_position_embeddings=2 * options.length + 16,
    )
    config = TrainConfig(
        steps=options.steps,
        learning_rate=options.learning_rate,
        warmup=0.1,
        checkpoint_every=options.steps,
        seed=options.seed,
    )
    results = []
    for result in compare(training, held_out, size, config, documents_per_batch=32):
        results.append(result)
        write_json(
            options.out,
            {
                "settings": {**vars(options), "out": str(options.out)},
                "model": asdict(size),
                "most_frequent_topic": float(np.bincount(held_out.topics).max() / len(held_out.topics)),
                "results": [asdict(item) for item in results],
            },
        )
    print(table(results))
    print(f"\n{len(training.documents)} documents, {options.steps} steps; {options.out}")


if __name__ == "__main__":
    main()

"""What the choices of pretraining buy, on one corpus, with several seeds: tables of means and standard errors.

    python examples/effects.py objectives    # four objectives at the same compute, then the same classification
    python examples/effects.py documents     # attention within documents or across all of a row
    python examples/effects.py optimisers    # Muon and AdamW, each at the best of three learning rates
    python examples/effects.py scaling       # a ladder of sizes, its exponent, a forecast and its check

The corpus is the English Wikipedia summaries; the models have the shape of the preset nano, those of the ladder are
smaller. Standard errors are over seeds: each draws other weights, another order of the data and other noise. The last
line of the output is JSON. On one core each takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gristmill import assets
from gristmill.core import Batch, Objective
from gristmill.corpus.loader import ExampleLoader, PackedLoader
from gristmill.corpus.packing import pack
from gristmill.corpus.shards import TokenList, write_shards
from gristmill.corpus.sources import read_wikipedia_summaries
from gristmill.corpus.split import split
from gristmill.files import read_jsonl
from gristmill.model.config import EncoderDecoderConfig, ModelConfig
from gristmill.model.encoder import Encoder
from gristmill.model.encoder_decoder import EncoderDecoder
from gristmill.model.heads import HeadConfig, Headed
from gristmill.model.presets import preset
from gristmill.model.transformer import Stack, Transformer
from gristmill.objectives.causal import CausalLM
from gristmill.objectives.compute import step_flops
from gristmill.objectives.encoder_batch import EncoderBatch, Row, encoder_states, segment_vectors
from gristmill.objectives.replaced_token import Electra, ReplacedToken
from gristmill.objectives.single import SingleTerm
from gristmill.objectives.taxonomy import Symbols, build_objective
from gristmill.scale.fit import bootstrap, fit_power_law
from gristmill.scale.ladder import LadderConfig, Rung, climb, held_out_loss
from gristmill.tokens.batch import IGNORED, PackedBatch, Segment
from gristmill.tokens.train import train_bpe
from gristmill.train.config import TrainConfig
from gristmill.train.loop import train
from gristmill.train.optimisers import OptimiserName

OBJECTIVES = ("causal LM", "masked LM", "span corruption", "ELECTRA")
CONTROLS = {"random weights, causal": "causal LM", "random weights, both ways": "masked LM"}
SENTINELS = 16
TOKENS_PER_STEP = 2048
LADDER: dict[str, Any] = {
    "sizes": (16_000, 26_000, 56_000, 86_000),
    "next": 186_000,
    "tokens_per_parameter": 10.0,
    "rows_per_batch": 4,
}
LABELLED_EVERY = 32
"""Of the labelled training documents so many-th are those that the classifier learns from."""


def measured(values: Sequence[float]) -> dict[str, Any]:
    """The mean of one value a seed and its standard error; None for what is not finite or, of one seed, not known."""
    finite = [float(value) if np.isfinite(value) else None for value in values]
    known = None not in finite
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5 if known and len(values) > 1 else None
    return {"mean": float(np.mean(values)) if known else None, "error": error, "values": finite}


@dataclass(frozen=True, eq=False)
class Corpus:
    """Token documents to train on and held out, each ending with `symbols.start`; those with a topic, by its number."""

    training: TokenList
    held_out: TokenList
    labelled: Sequence[tuple[np.ndarray, int]]
    unseen: Sequence[tuple[np.ndarray, int]]
    topics: tuple[str, ...]
    symbols: Symbols


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all studies share. `tokens` are those that a causal model trains on; others get the same compute."""

    size: ModelConfig
    seeds: Sequence[int]
    tokens: int
    optimiser: OptimiserName = "muon"
    learning_rate: float = 5e-3
    length: int = 128
    fine_tuning_epochs: int = 4
    precision: Any = "bfloat16"

    def training(self, steps: int, seed: int, **changes: Any) -> TrainConfig:
        """A run of so many steps."""
        chosen: dict[str, Any] = {"optimiser": self.optimiser, "learning_rate": self.learning_rate, **changes}
        every: dict[str, Any] = {"checkpoint_every": steps, "validate_every": max(1, steps // 15)}
        return TrainConfig(steps=steps, seed=seed, warmup=0.1, precision=self.precision, **every, **chosen)


class Topic(SingleTerm):
    """The `Objective` of naming a document's topic: examples are (ids, number of the topic), the model a sequence
    classifier on the mean of a document's states."""

    def prepare(self, examples: Sequence[Any], keys: Sequence[tuple[int, ...]]) -> EncoderBatch:
        """Lay the documents end to end."""
        rows = [Row(np.asarray(ids), np.full(len(ids), IGNORED)) for ids, _ in examples]
        return EncoderBatch.from_rows(rows, labels=torch.tensor([topic for _, topic in examples]))

    def counts(self, batch: EncoderBatch) -> Mapping[str, int]:
        """Documents."""
        return {"loss": len(batch.segment_lengths)}

    def loss_sum(self, model: nn.Module, batch: EncoderBatch) -> tuple[Tensor, int]:
        """Summed cross-entropy in nats over the documents, and their number."""
        assert batch.labels is not None
        return F.cross_entropy(self.logits(model, batch), batch.labels, reduction="sum"), len(batch.labels)

    @staticmethod
    def logits(model: Any, batch: EncoderBatch) -> Tensor:
        """(documents, topics)."""
        states = segment_vectors(encoder_states(model.body, batch), batch.segment_lengths, "mean")
        found: Tensor = model.head.out(states)
        return found.float()


def read(vocabulary: int) -> Corpus:
    """The summaries, with a byte-pair vocabulary trained on the training side."""
    sides = split(read_wikipedia_summaries(assets.get("wikipedia-summaries")), 0.1)
    specials = ["<|end|>", "[CLS]", "[SEP]", "[MASK]", *(f"<extra_id_{number}>" for number in range(SENTINELS))]
    tokenizer = train_bpe((document.text for document in sides[0]), vocabulary, special_tokens=specials)
    end, cls, sep, mask, *sentinels = (tokenizer.backend.token_to_id(name) for name in specials)
    size, marks = tokenizer.vocab_size, tuple(sentinels)
    symbols = Symbols(size=size, cls=cls, sep=sep, mask=mask, start=end, sentinels=marks, sentence_ends=frozenset())
    topics = sorted({document.metadata["topic"] for document in sides[0]} - {"Uncategorized"})
    sources, tagged = [], []
    for side in sides:
        ids = [np.array([*found, end]) for found in tokenizer.encode_batch([document.text for document in side])]
        names = [document.metadata["topic"] for document in side]
        sources.append(TokenList([(found, None) for found in ids], vocab_size=size))
        tagged.append([(found, topics.index(n)) for found, n in zip(ids, names, strict=True) if n in topics])
    return Corpus(sources[0], sources[1], tagged[0][::LABELLED_EVERY], tagged[1], tuple(topics), symbols)


def run(
    model: Any, objective: Objective, loader: Any, config: TrainConfig, label: str, checks: Any = None
) -> list[Any]:
    """Train in place; the records of metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        train(model, objective, loader, config, Path(folder), validation=checks, description=label)
        model.eval()
        return [record for _, record in read_jsonl(Path(folder) / "metrics.jsonl")]


def held_out(model: Transformer, source: TokenList) -> float:
    """Nats per token of a causal model over documents, each a segment of its own (cut at the model's context)."""
    loader = PackedLoader(source, row_length=model.config.context, rows_per_batch=8, seed=0, shuffle=False)
    return held_out_loss(model, loader)[0]


def build(name: str, size: ModelConfig, symbols: Symbols) -> tuple[Objective, Any]:
    """An objective and the model it trains. The stack that is kept has the same depth and width for all of them."""
    masked = HeadConfig(kind="masked_lm", dense="gelu", norm=True)
    encoder = replace(size, causal=False)
    if name == "causal LM":
        return CausalLM(), Transformer(size)
    if name == "masked LM":
        return build_objective("BERT-style", "encoder", symbols), Headed(Encoder(encoder), masked)
    if name == "span corruption":
        pair = EncoderDecoderConfig(
            encoder=encoder, decoder=replace(size, cross_attention=True), decoder_start_token_id=symbols.start
        )
        return build_objective("sentinel masking", "encoder_decoder", symbols), EncoderDecoder(pair)
    quarter = replace(
        encoder,
        hidden_size=size.hidden_size // 4,
        num_attention_heads=size.num_attention_heads // 4 or 1,
        num_key_value_heads=size.num_key_value_heads // 4 or 1,
        intermediate_size=size.intermediate_size // 4,
        embedding=replace(size.embedding, size=size.hidden_size),
    )
    judge = Headed(Encoder(encoder), HeadConfig(kind="replaced_token", dense="gelu"))
    return ReplacedToken(symbols.vocabulary), Electra(Headed(Encoder(quarter), masked), judge)


def kept(model: nn.Module) -> Stack:
    """What is fine-tuned of a pretrained model: the decoder, the encoder, or ELECTRA's discriminator."""
    whole = model.discriminator if isinstance(model, Electra) else model
    stack: Stack = whole.encoder if isinstance(whole, EncoderDecoder) else getattr(whole, "body", whole)
    return stack


def classify(body: Stack, corpus: Corpus, settings: Settings, seed: int) -> float:
    """Fine-tune a copy of a stack to name topics; the share of unseen documents whose topic it names."""
    head = HeadConfig(kind="sequence_classifier", labels=corpus.topics, pooling="mean")
    model = Headed(type(body)(body.config), head)
    model.initialise(seed)
    model.body.load_state_dict(body.state_dict())
    objective = Topic()
    cut = [(ids[: settings.length], topic) for ids, topic in corpus.labelled]
    loader = ExampleLoader(cut, examples_per_batch=16, seed=seed, prepare=objective.prepare)
    steps = settings.fine_tuning_epochs * loader.batches_per_epoch
    tuning = settings.training(steps, seed, optimiser="adamw", learning_rate=1e-3)
    run(model, objective, loader, tuning, "fine-tuning")
    right = 0
    for start in range(0, len(corpus.unseen), 64):
        some = [(ids[: settings.length], topic) for ids, topic in corpus.unseen[start : start + 64]]
        batch = objective.prepare(some, [()] * len(some))
        with torch.no_grad():
            right += int((objective.logits(model, batch).argmax(1) == batch.labels).sum())
    return right / len(corpus.unseen)


def objectives(corpus: Corpus, settings: Settings, names: Sequence[str] = (*OBJECTIVES, *CONTROLS)) -> dict[str, Any]:
    """Accuracy of the classification after each objective at equal compute, and from random weights."""

    rows: dict[str, Any] = {"row_length": settings.length, "rows_per_batch": TOKENS_PER_STEP // settings.length}

    def cost(name: str) -> tuple[float, float]:
        """FLOPs and corpus tokens of a step, the mean of some."""
        objective, model = build(name, settings.size, corpus.symbols)
        loader = PackedLoader(corpus.training, seed=0, prepare=objective.prepare, **rows)
        numbers = range(min(8, loader.batches_per_epoch))
        flops = np.mean([step_flops(model, loader.batch(number)) for number in numbers])
        texts = np.mean([sum(len(ids) for ids, _ in loader.segments(*loader.order.deal(n))[0]) for n in numbers])
        return float(flops), float(texts)

    costs = {name: cost(name) for name in OBJECTIVES}
    budget = costs["causal LM"][0] / costs["causal LM"][1] * settings.tokens
    found: dict[str, Any] = {}
    for label in names:
        name = CONTROLS.get(label, label)
        steps = 0 if label in CONTROLS else round(budget / costs[name][0])
        scores = []
        for seed in settings.seeds:
            objective, model = build(name, settings.size, corpus.symbols)
            model.initialise(seed)
            if steps:
                loader = PackedLoader(corpus.training, seed=seed, prepare=objective.prepare, **rows)
                run(model, objective, loader, settings.training(steps, seed), f"{label}, {seed}")
            scores.append(classify(kept(model), corpus, settings, seed))
            print(f"{label}, seed {seed}: {scores[-1]:.3f}", file=sys.stderr)
        flops, text = (steps * each for each in costs[name])
        found[label] = {"accuracy": measured(scores), "flops": flops, "text": text}
    frequent = np.bincount([topic for _, topic in corpus.unseen]).max() / len(corpus.unseen)
    counts = {"labelled": len(corpus.labelled), "unseen": len(corpus.unseen), "most_frequent_topic": float(frequent)}
    return {"results": found, **counts}


def within(rows: Sequence[Sequence[Segment]], keys: Sequence[tuple[int, ...]]) -> Batch:
    """Rows as batches are made by default: each document sees itself."""
    return PackedBatch.from_segments([segment for row in rows for segment in row])


def across(rows: Sequence[Sequence[Segment]], keys: Sequence[tuple[int, ...]]) -> Batch:
    """The same rows, each one segment: documents see those that stand before them."""
    return PackedBatch.from_segments([(np.concatenate([ids for ids, _ in row]), None) for row in rows])


def documents(corpus: Corpus, settings: Settings) -> dict[str, Any]:
    """Held-out loss on separate documents after training within documents and across rows, of the same rows."""
    length = settings.size.context
    packing = pack(corpus.training.lengths, length, seed=0)
    rows = [corpus.training.read(packing.pieces_of(np.array([row]))) for row in range(len(packing))]
    steps = round(settings.tokens / (TOKENS_PER_STEP * packing.utilisation))
    losses: dict[str, list[float]] = {"within": [], "across": []}
    for seed in settings.seeds:
        for label, prepare in (("within", within), ("across", across)):
            model = Transformer(settings.size)
            model.initialise(seed)
            loader = ExampleLoader(rows, examples_per_batch=TOKENS_PER_STEP // length, seed=seed, prepare=prepare)
            run(model, CausalLM(), loader, settings.training(steps, seed), f"{label}, {seed}")
            losses[label].append(held_out(model, corpus.held_out))
            print(f"{label}, seed {seed}: {losses[label][-1]:.4f}", file=sys.stderr)
    gain = [a - w for w, a in zip(losses["within"], losses["across"], strict=True)]
    found = {label: {"loss": measured(values)} for label, values in losses.items()}
    return {"results": found, "gain": measured(gain), "documents_per_row": len(packing.pieces) / len(packing)}


def optimisers(corpus: Corpus, settings: Settings, rates: Sequence[float] = (2e-3, 5e-3, 1.25e-2)) -> dict[str, Any]:
    """Held-out loss of Muon and AdamW at equal tokens, each at the rate that was best with the first seed; and after
    how many tokens Muon has the loss that AdamW ends with."""
    rows: dict[str, Any] = {"row_length": 256, "rows_per_batch": TOKENS_PER_STEP // 256}
    some = TokenList(_whole(corpus.held_out)[:50], vocab_size=corpus.held_out.vocab_size)
    checking = PackedLoader(some, row_length=256, rows_per_batch=8, seed=0, shuffle=False)

    def one(name: str, rate: float, seed: int) -> tuple[float, list[tuple[int, float]]]:
        """The final loss on all held-out documents, and the curve on some of them: (tokens, loss)."""
        model = Transformer(settings.size)
        model.initialise(seed)
        loader = PackedLoader(corpus.training, seed=seed, **rows)
        steps = round(settings.tokens / (TOKENS_PER_STEP * loader.utilisation))
        config = settings.training(steps, seed, optimiser=name, learning_rate=rate)
        records = run(model, CausalLM(), loader, config, f"{name} {rate:g}, {seed}", checking)
        loss = held_out(model, corpus.held_out)
        print(f"{name} {rate:g}, seed {seed}: {loss:.4f}", file=sys.stderr)
        return loss, [(r["tokens"], r["validation_loss"]) for r in records if "validation_loss" in r]

    first, *others = settings.seeds
    found: dict[str, Any] = {}
    curves: dict[str, list[list[tuple[int, float]]]] = {}
    for name in ("adamw", "muon"):
        tried = {rate: one(name, rate, first) for rate in rates}
        rate = min(tried, key=lambda r: tried[r][0])
        ends = [tried[rate], *(one(name, rate, seed) for seed in others)]
        curves[name] = [curve for _, curve in ends]
        search = {f"{r:g}": loss for r, (loss, _) in tried.items()}
        found[name] = {"loss": measured([loss for loss, _ in ends]), "rate": rate, "search": search}
    pairs = list(zip(curves["adamw"], curves["muon"], strict=True))
    shares = [tokens_to(muon, adamw[-1][1]) / adamw[-1][0] for adamw, muon in pairs]
    return {"results": found, "share_of_tokens": measured(shares)}


def tokens_to(curve: Sequence[tuple[int, float]], loss: float) -> float:
    """Tokens after which a curve (tokens, loss) first has a loss, in straight lines between its points; infinite where
    it never has."""
    for (seen, before), (tokens, after) in pairwise([curve[0], *curve]):
        if after <= loss:
            return seen if before <= loss else seen + (before - loss) / (before - after) * (tokens - seen)
    return float("inf")


def scaling(corpus: Corpus, config: LadderConfig) -> dict[str, Any]:
    """Climb the ladder of `gristmill plan ladder` on the corpus and read the exponents with their bands.

    By size: parameters without embedding and head; tokens grow with them, so this is no law at unlimited data.
    """
    for part, source in (("data", corpus.training), ("held_out", corpus.held_out)):
        directory = Path(getattr(config, part))
        if not directory.exists():
            ids: dict[str, int] = {"vocab_size": source.vocab_size, "eos_token_id": corpus.symbols.start}
            write_shards(_whole(source), directory, tokenizer_hash="effects", **ids)
    ladder = climb(config)

    def inner(rung: Rung) -> int:
        return rung.parameters - corpus.training.vocab_size * rung.hidden_size

    losses = [rung.loss for rung in ladder.rungs]
    columns = {"compute": [rung.flops for rung in ladder.rungs], "size": [inner(rung) for rung in ladder.rungs]}
    exponents = {name: exponent(column, losses, config.confidence) for name, column in columns.items()}
    results = {}
    for size, rungs in groupby((*ladder.rungs, *ladder.checks), key=inner):
        same = list(rungs)
        results[str(size)] = {**asdict(same[0]), "loss": measured([rung.loss for rung in same])}
    forecast = {**asdict(ladder.forecast), "measured": ladder.measured, "held": ladder.held}
    return {"results": results, "exponents": exponents, "forecast": forecast}


def exponent(sizes: Sequence[float], losses: Sequence[float], level: float) -> dict[str, float]:
    """The slope of log loss over log size, and the bounds between which `level` of the refits have it."""

    def slope(x: Any, y: Any) -> Callable[..., Any]:
        found = fit_power_law(x, y).b
        return lambda at: np.full(np.shape(at), found)

    law = fit_power_law(sizes, losses)
    options: dict[str, Any] = {"law": law, "constants": 2, "samples": 500, "level": level}
    low, high = bootstrap(slope, (sizes, losses), ([1.0],), **options)
    return {"exponent": law.b, "low": float(low[0]), "high": float(high[0])}


def table(study: str, found: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    columns = {
        "objectives": ("objective", "accuracy", 100.0, ("flops", "text")),
        "documents": ("attention", "loss", 1.0, ()),
        "optimisers": ("optimiser", "loss", 1.0, ("rate",)),
        "scaling": ("parameters", "loss", 1.0, ("layers", "hidden_size", "tokens", "flops")),
    }
    first, figure, unit, others = columns[study]
    lines = [f"| {' | '.join((first, figure, *others))} |", f"|{'---|' * (2 + len(others))}"]
    for label, result in found["results"].items():
        value = result[figure]
        told = f"{unit * value['mean']:.4g}" + (f" ± {unit * value['error']:.2g}" if value["error"] is not None else "")
        lines.append(f"| {' | '.join((label, told, *(f'{result[name]:.4g}' for name in others)))} |")
    return "\n".join(lines)


def _whole(source: TokenList) -> list[Segment]:
    return [source.piece(number, 0, length) for number, length in enumerate(source.lengths.tolist())]


def main() -> None:
    """Parse the options, run one study, print its table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("objectives", "documents", "optimisers", "scaling"))
    parser.add_argument("--tokens", type=int, default=300_000, help="of a run of a causal model (default 300000)")
    parser.add_argument("--seeds", type=int, default=3, help="(default 3)")
    parser.add_argument("--optimiser", choices=("adamw", "muon"), default="muon", help="(default muon)")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="(default 0.005)")
    parser.add_argument("--out", type=Path, default=Path("runs/effects"), help="where the ladder lives")
    options = parser.parse_args()
    chosen = {name: getattr(options, name) for name in ("tokens", "optimiser", "learning_rate")}
    settings = Settings(size=preset("nano"), seeds=tuple(range(options.seeds)), **chosen)
    if options.study == "scaling":
        folders: dict[str, Any] = {name: str(options.out / name) for name in ("data", "held_out")}
        ladder = LadderConfig(**folders, out=str(options.out / "ladder"), seeds=options.seeds, **LADDER)
        found = scaling(read(512), ladder)
    else:
        study = {"objectives": objectives, "documents": documents, "optimisers": optimisers}[options.study]
        found = study(read(settings.size.vocab_size), settings)
    print(table(options.study, found))
    print(json.dumps({"study": options.study, **found}))


if __name__ == "__main__":
    main()

"""A cascade of two models: the small one answers what it is sure of, the large one the rest.

    python examples/cascade.py                       # about two minutes on two cores
    python examples/cascade.py --plot cascade.svg    # accuracy over cost as a picture; needs matplotlib

Two decoders learn sums of numbers with one to three digits. The small one gets the easy sums right and many of the hard
ones wrong, and its doubt tells which. The threshold is chosen on one set of sums and measured on another, beside each
model alone and beside sending sums to the large model at random, at the same cost. Cost is in floating-point operations
an answer, as the planner counts them. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from gristmill.core import RequestOutput, SamplingParams
from gristmill.corpus.loader import PackedLoader
from gristmill.corpus.shards import TokenList
from gristmill.engine.engine import Engine
from gristmill.engine.stopping import generation_flops
from gristmill.model.config import ModelConfig
from gristmill.model.transformer import Transformer
from gristmill.objectives.causal import CausalLM
from gristmill.serve.routing.cascade import Outcomes, Routed, choose_threshold, curve, random_accuracy, route
from gristmill.serve.routing.difficulty import mean_doubt
from gristmill.tokens.tokenizer import Tokenizer
from gristmill.train.config import TrainConfig
from gristmill.train.loop import train

ALPHABET = "0123456789+=;"
END = ALPHABET.index(";")


@dataclass(frozen=True)
class Settings:
    """What a run needs. small, large: layers and width."""

    digits: int = 3
    small: tuple[int, int] = (1, 32)
    large: tuple[int, int] = (3, 96)
    steps: int = 500
    rows_per_batch: int = 32
    questions: int = 1500
    give_up: float = 0.005
    """Accuracy that the choice of the threshold may lose on the validation set."""


@dataclass(frozen=True)
class Sum:
    """A question and its answer, written from the last digit on, as one adds by hand."""

    question: str
    answer: str


@dataclass(frozen=True)
class Report:
    """Accuracy, its standard error and mean cost of all ways to answer; the whole curve of thresholds."""

    small: Routed
    large: Routed
    cascade: Routed
    random_at_that_cost: float
    saved: float
    """Share of the large model's cost that the cascade does not spend."""
    points: Sequence[Routed]


def sums(count: int, digits: int, seed: int) -> Iterator[Sum]:
    """Sums of two numbers of equally many digits; each number of digits comes equally often."""
    draw = random.Random(seed)
    for number in range(count):
        length = number % digits + 1
        a, b = (draw.randrange(10 ** (length - 1) if length > 1 else 0, 10**length) for _ in range(2))
        yield Sum(f"{a}+{b}=", str(a + b)[::-1])


def tokenizer() -> Tokenizer:
    """A token for each character; the semicolon ends an answer."""
    backend = Backend(models.WordLevel({character: number for number, character in enumerate(ALPHABET)}, unk_token=";"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend=backend, eos_token_id=END, stop_token_ids=(END,))


def learn(shape: tuple[int, int], settings: Settings, *, seed: int = 0) -> Transformer:
    """Train a decoder of so many layers and such a width on sums; only the answers are learned."""
    layers, width = shape
    heads = width // 16
    model = Transformer(
        ModelConfig(
            vocab_size=16,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=16,
            intermediate_size=3 * width,
            max_position_embeddings=64,
        )
    )
    model.initialise(seed)
    documents = []
    for item in sums(64 * settings.steps, settings.digits, seed=1):
        ids = [ALPHABET.index(character) for character in f"{item.question}{item.answer};"]
        documents.append((ids, [int(place >= len(item.question)) for place in range(len(ids))]))
    source = TokenList(documents, vocab_size=16)
    loader = PackedLoader(source, row_length=64, rows_per_batch=settings.rows_per_batch, seed=seed)
    config = TrainConfig(
        steps=settings.steps,
        optimiser="muon",
        learning_rate=2e-2,
        schedule="cosine",
        weight_decay=0.0,
        checkpoint_every=settings.steps,
    )
    with tempfile.TemporaryDirectory() as directory:
        train(model, CausalLM(), loader, config, Path(directory), show_progress=False)
    return model


def answer(model: Transformer, questions: Sequence[Sum]) -> list[RequestOutput]:
    """What the engine answers, most probable token by token."""
    engine = Engine(model, tokenizer(), prefix_caching=False)
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=0)
    order = {
        engine.add([ALPHABET.index(character) for character in item.question], params): place
        for place, item in enumerate(questions)
    }
    found: dict[int, RequestOutput] = {}
    while engine.has_unfinished():
        found |= {order[output.request_id]: output for output in engine.step() if output.finished}
    return [found[place] for place in range(len(questions))]


def measure(small: Transformer, large: Transformer, questions: Sequence[Sum]) -> Outcomes:
    """Both models on the same questions. The small one's answer tells the difficulty."""
    right, cost = [], []
    for model in (small, large):
        outputs = answer(model, questions)
        right.append([output.outputs[0].text == item.answer for output, item in zip(outputs, questions, strict=True)])
        cost.append(
            [
                generation_flops(model.config, len(output.prompt_token_ids))(len(output.outputs[0].token_ids))
                for output in outputs
            ]
        )
        if model is small:
            doubt = [mean_doubt(output.outputs[0]) for output in outputs]
    return Outcomes(doubt, right[0], right[1], cost[0], cost[1])


def compare(settings: Settings) -> Report:
    """Train both, choose the threshold on one set of sums, measure on another."""
    small, large = learn(settings.small, settings), learn(settings.large, settings)
    validation, test = (
        measure(small, large, list(sums(settings.questions, settings.digits, seed=seed))) for seed in (2, 3)
    )
    threshold = choose_threshold(validation, give_up=settings.give_up)
    cascade, alone = route(test, threshold), Outcomes(**(vars(test) | {"probe": [0.0] * settings.questions}))
    ends = route(alone, 1.0), route(alone, -1.0)  # a model alone is not preceded by the other
    random_accuracy_there = random_accuracy(test, cascade.cost)
    return Report(*ends, cascade, random_accuracy_there, 1 - cascade.cost / ends[1].cost, curve(test))


def plot(report: Report, path: Path) -> None:
    """Accuracy over cost: the curve of the cascade, the line of random routing, each model alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [p.cost / 1e6 for p in report.points], [p.accuracy for p in report.points], label="cascade, every threshold"
    )
    ends = (report.small, report.large)
    axes.plot([p.cost / 1e6 for p in ends], [p.accuracy for p in ends], "--o", label="either model, or one at random")
    chosen = report.cascade
    axes.errorbar([chosen.cost / 1e6], [chosen.accuracy], [chosen.error], fmt="s", capsize=3, label="chosen threshold")
    axes.set_xlabel("million operations an answer")
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="write a picture there; its ending says the format")
    parser.add_argument("--digits", type=int, default=Settings.digits)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    arguments = parser.parse_args()
    report = compare(Settings(digits=arguments.digits, steps=arguments.steps))
    print("| answered by | accuracy | million operations |\n|---|---|---:|")
    for name, way in (("small", report.small), ("large", report.large), ("cascade", report.cascade)):
        print(f"| {name} | {way.accuracy:.1%} ± {way.error:.1%} | {way.cost / 1e6:.2f} |")
    print(f"| one at random | {report.random_at_that_cost:.1%} | {report.cascade.cost / 1e6:.2f} |")
    print(f"\nThe cascade asks the large model {report.cascade.to_large:.0%} of the time and saves {report.saved:.0%}.")
    if arguments.plot:
        plot(report, arguments.plot)
    print(json.dumps({**asdict(report), "points": len(report.points)}))


if __name__ == "__main__":
    main()

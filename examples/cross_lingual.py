"""Fine-tune on one language, classify another: what pretraining on both brings.

    python examples/cross_lingual.py             # about half a minute

Two made-up languages name the same things with words of their own, and the second one turns the order around. An
encoder is pretrained to fill in masked words, on sentences of both languages and on translated pairs side by side; the
control sees the first language alone, for as many steps. Both are then fine-tuned on topics of sentences of the first
language, and tested on the second, of which no label was ever seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from gristmill.model.config import ModelConfig
from gristmill.model.encoder import Encoder
from gristmill.model.heads import HeadConfig, Headed
from gristmill.objectives.masked import Masking
from gristmill.objectives.translation import Tagged, TranslationLM
from gristmill.objectives.vocabulary import EncoderVocabulary
from gristmill.train.transfer import accuracy, fit, transfer

TOPICS, THINGS = 4, 32
"""A thing belongs to the topic of its number modulo TOPICS."""
BEGIN, SEPARATOR, MASK = 0, 1, 2
FIRST, SECOND = 3, 3 + THINGS
"""Token of thing 0 in each language."""
WORDS = 8
"""In a sentence."""
SEEDS = (0, 1, 2)
CONFIG = ModelConfig(
    vocab_size=SECOND + THINGS,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=64,
    max_position_embeddings=2 * WORDS + 3,
    causal=False,
    initializer_range=0.1,
)
TOPIC = HeadConfig(
    kind="sequence_classifier", labels=tuple(f"topic {number}" for number in range(TOPICS)), pooling="mean"
)


def draw_things(rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """What is said, (rows, WORDS), and its topic (rows,): five things in eight belong to it."""
    topics = torch.randint(TOPICS, (rows,), generator=generator)
    things = torch.randint(THINGS, (rows, WORDS), generator=generator)
    own = torch.rand(rows, WORDS, generator=generator) < 0.6
    return torch.where(own, things - things % TOPICS + topics[:, None], things), topics


def words(things: Tensor, language: int) -> Tensor:
    """In the words and the order of a language, FIRST or SECOND: token ids of the same shape."""
    return language + (things if language == FIRST else things.flip(1))


def framed(things: Tensor, language: int) -> Tensor:
    """The sentences as a classifier reads them, (rows, WORDS + 2)."""
    return F.pad(F.pad(words(things, language), (1, 0), value=BEGIN), (0, 1), value=SEPARATOR)


def pretrain(languages: Sequence[int], seed: int, steps: int = 300, rows: int = 16) -> Headed:
    """Two words in five are masked: in sentences of the one language, or of both, and in pairs half of the time."""
    vocabulary = EncoderVocabulary(size=CONFIG.vocab_size, mask_id=MASK, cls_id=BEGIN, sep_id=SEPARATOR)
    objective = TranslationLM(vocabulary, Masking(rate=0.4, mask_share=1.0, random_share=0.0))
    model = Headed(Encoder(CONFIG), HeadConfig(kind="masked_lm", dense="gelu"))
    model.initialise(seed)
    generator = Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0, fused=True)
    kinds = [(language,) for language in languages] + [tuple(languages)] * 2 * (len(languages) > 1)
    for step in range(steps):
        things, _ = draw_things(rows, generator)
        texts = [words(things, language).numpy() for language in kinds[step % len(kinds)]]
        examples = [[Tagged(text) for text in pair] for pair in zip(*texts, strict=True)]
        total, count = objective.loss_sum(model, objective.prepare(examples, [(seed, step, n) for n in range(rows)]))
        optimiser.zero_grad()
        (total / count).backward()
        optimiser.step()
    return model


def fine_tune(pretrained: Headed, seed: int, labels: int = 200, steps: int = 60) -> Headed:
    """A classifier of topics, from labelled sentences of the first language."""
    things, topics = draw_things(labels, Generator().manual_seed(2000 + seed))
    model = transfer(pretrained, TOPIC, seed)
    fit(model, framed(things, FIRST), topics, steps=steps, learning_rate=1e-3, seed=seed)
    return model


def evaluate(model: Headed, seed: int) -> tuple[float, float]:
    """Accuracy on unseen sentences, said in the first and in the second language."""
    things, topics = draw_things(500, Generator().manual_seed(3000 + seed))
    return accuracy(model, framed(things, FIRST), topics), accuracy(model, framed(things, SECOND), topics)


def main() -> None:
    """Both models, several seeds."""
    torch.set_num_threads(1)  # products this small are slower on more
    print("| pretrained on | seed | first language | second language |\n|---|---:|---:|---:|")
    for name, languages in (("both", (FIRST, SECOND)), ("the first alone", (FIRST,))):
        for seed in SEEDS:
            first, second = evaluate(fine_tune(pretrain(languages, seed), seed), seed)
            print(f"| {name} | {seed} | {first:.1%} | {second:.1%} |")
    print(f"\nBy chance: {1 / TOPICS:.1%}. Labels of the second language: none.")


if __name__ == "__main__":
    main()

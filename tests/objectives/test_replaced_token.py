"""Replaced-token detection: labels, what teaches whom, and what is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gristmill.errors import CheckpointError
from gristmill.model.formats.huggingface import load_huggingface, save_huggingface
from gristmill.model.heads import HeadConfig, Headed
from gristmill.objectives.encoder_batch import encoder_states
from gristmill.objectives.replaced_token import (
    DISCRIMINATOR,
    GENERATOR,
    Electra,
    ReplacedToken,
    draw_tokens,
    fill_in,
    replaced_labels,
)
from gristmill.tokens.batch import IGNORED
from objectives.cases_encoder import CONFIG, MASK, VOCABULARY, Words, electra, headed, segment

OBJECTIVE = ReplacedToken(VOCABULARY)


def prepared(count: int = 6) -> Any:
    return OBJECTIVE.prepare([segment(n) for n in range(count)], [(0, n) for n in range(count)])


def test_a_token_drawn_as_it_was_counts_as_original() -> None:
    words = Words("The boy spent hours working on toys . decades")
    original = torch.from_numpy(words.ids("[CLS] The boy spent hours working on toys ."))
    drawn = torch.from_numpy(words.ids("[CLS] The boy spent decades working on toys ."))  # toys was drawn again
    assert replaced_labels(original, drawn).tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]


@torch.no_grad()
def test_only_masked_places_are_filled_in_and_labels_say_what_changed() -> None:
    model, batch = electra(), prepared()
    hidden = encoder_states(model.generator.body, batch)
    shown = fill_in(model.generator.head, hidden, batch)  # type: ignore[arg-type]
    masked = batch.target_ids != IGNORED
    original = batch.input_ids.where(~masked, batch.target_ids)
    assert torch.equal(batch.input_ids == MASK, masked)
    assert torch.equal(shown[~masked], batch.input_ids[~masked])
    assert torch.equal(replaced_labels(original, shown).bool(), shown != original)
    assert bool((shown != original).any())
    assert OBJECTIVE.counts(batch) == {GENERATOR: int(masked.sum()), DISCRIMINATOR: batch.tokens}


@torch.no_grad()
def test_tokens_are_drawn_with_the_probabilities_of_the_generator() -> None:
    """Evenly spaced numbers meet each token as often as its probability says, to one in all of them."""
    model, batch, count = headed(), prepared(1), 20_000
    state = encoder_states(model.body, batch)[3]
    drawn = draw_tokens(model.head, state.expand(count, -1), (torch.arange(count) + 0.5) / count)  # type: ignore[arg-type]
    wanted = model.head.decoder(model.head.transform(state)).softmax(-1)  # type: ignore[union-attr]
    found = torch.bincount(drawn, minlength=len(wanted)) / count
    assert float((found - wanted).abs().max()) < 2 / count
    assert draw_tokens(model.head, state[None], torch.tensor([1.0 - 2**-24])).item() < len(wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("shared", [False, True])
def test_the_generator_learns_nothing_from_the_discriminator(shared: bool) -> None:
    model = electra(share_embeddings=shared)
    OBJECTIVE.loss_sums(model, prepared())[DISCRIMINATOR].backward()
    own = {id(p) for p in model.discriminator.parameters()}
    for name, parameter in model.generator.named_parameters():
        if id(parameter) in own:
            assert shared
            assert name == "body.embed_tokens.weight"
        else:
            assert parameter.grad is None or not parameter.grad.any()
    grads = [p.grad for p in model.discriminator.parameters()]
    assert all(grad is not None and bool(grad.any()) for grad in grads)


def test_shared_embeddings_are_one_matrix() -> None:
    apart, shared = electra(share_embeddings=False), electra()
    size = CONFIG.vocab_size * CONFIG.hidden_size
    assert apart.count_parameters() - shared.count_parameters() == size
    shared.initialise(3)
    assert shared.generator.head.decoder.weight is shared.discriminator.body.embed_tokens.weight  # type: ignore[union-attr]
    alone = headed(HeadConfig(kind="replaced_token", dense="gelu"), seed=3)
    assert torch.equal(shared.discriminator.body.embed_tokens.weight, alone.body.embed_tokens.weight)
    narrow = headed(config=replace(CONFIG, embedding=replace(CONFIG.embedding, size=16)))
    with pytest.raises(CheckpointError, match="one width, got 16 and 32"):
        Electra(narrow, alone)
    with pytest.raises(CheckpointError, match="the generator has 32 tokens, the discriminator 64"):
        Electra(headed(config=replace(CONFIG, vocab_size=32)), alone)
    with pytest.raises(CheckpointError, match="kind replaced_token, got a head of kind 'masked_lm'"):
        Electra(headed(), headed())
    with pytest.raises(CheckpointError, match="trains an Electra, got Headed"):
        OBJECTIVE.loss_sums(alone, prepared(1))


@pytest.mark.peer
@torch.no_grad()
def test_what_is_kept_is_an_electra_of_transformers_without_the_generator(tmp_path: Path) -> None:
    from transformers import ElectraForPreTraining

    model, batch = electra(), prepared(1)
    save_huggingface(model.discriminator, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert not [name for name in stored if "generator" in name]
    assert sum(tensor.numel() for tensor in stored.values()) == model.discriminator.count_parameters()
    back = load_huggingface(tmp_path, torch.float32)
    assert isinstance(back, Headed)
    theirs = ElectraForPreTraining.from_pretrained(tmp_path).eval()
    shown = fill_in(model.generator.head, encoder_states(model.generator.body, batch), batch)  # type: ignore[arg-type]
    original = batch.input_ids.where(batch.target_ids == IGNORED, batch.target_ids)
    expected = theirs(shown[None], labels=replaced_labels(original, shown)[None]).loss
    sums, counts = OBJECTIVE.loss_sums(model, batch), OBJECTIVE.counts(batch)
    assert float(sums[DISCRIMINATOR]) / counts[DISCRIMINATOR] == pytest.approx(float(expected), rel=1e-5)
    assert OBJECTIVE.weights == {GENERATOR: 1.0, DISCRIMINATOR: 50.0}

"""Perplexity, the figure of quality beside those of speed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from engine import helpers
from gristmill.engine.scoring import PackedForward, score_completions
from gristmill.evaluate.metrics import perplexity
from model import tiny


def test_three_tokens() -> None:
    assert perplexity(-sum(math.log(p) for p in (0.5, 0.25, 0.125)), 3) == pytest.approx(4.0)


@torch.no_grad()
def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    model = tiny.model(tie_word_embeddings=False)
    model.lm_head.weight.zero_()
    (score,) = score_completions(PackedForward(model), [(helpers.prompt(4), helpers.prompt(9, 1))])
    assert perplexity(-score.logprob, 9) == pytest.approx(tiny.CONFIG.vocab_size, rel=1e-5)


@pytest.mark.peer
def test_it_is_the_exponential_of_the_loss_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(helpers.save(tmp_path)).eval()
    ids = helpers.prompt(30)
    with torch.no_grad():
        loss = peer(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    (score,) = score_completions(PackedForward(helpers.model()), [(ids[:1], ids[1:])])
    assert perplexity(-score.logprob, 29) == pytest.approx(math.exp(loss), rel=1e-4)

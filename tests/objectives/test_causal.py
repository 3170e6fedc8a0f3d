"""Next-token prediction over packed documents: what it sums, and what may not change it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.model.formats.huggingface import load_huggingface, save_huggingface
from gristmill.objectives.causal import CausalLM
from gristmill.tokens.batch import PackedBatch
from gristmill.train.loop import loss_and_gradients
from model import tiny


def documents(seed: int, count: int) -> list[list[int]]:
    choose = random.Random(seed)
    return [tiny.ids(choose.randint(2, 30), seed=choose.randrange(1000)).tolist() for _ in range(count)]


def pack(parts: list[list[int]]) -> PackedBatch:
    return PackedBatch.from_segments([(part, None) for part in parts])


def test_loss_is_the_negative_log_probability_token_by_token() -> None:
    model, tokens = tiny.model().double(), tiny.ids(12)
    total, count = CausalLM().loss_sum(model, pack([tokens.tolist()]))
    expected = 0.0
    with torch.no_grad():
        for at in range(1, 12):  # 12 tokens, 11 predictions
            expected -= float(model(tokens[:at])[-1].double().log_softmax(-1)[tokens[at]])
    assert count == 11
    assert total.item() == pytest.approx(expected, abs=1e-5)


def test_a_uniform_model_loses_the_logarithm_of_the_vocabulary() -> None:
    model = tiny.model(vocab_size=1000, tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    total, count = CausalLM().loss_sum(model, pack([tiny.ids(9, vocab_size=1000).tolist()]))
    assert total.item() / count == pytest.approx(6.907755, abs=1e-5)


def test_one_batch_can_be_learned_by_heart() -> None:
    model, batch = tiny.model(initializer_range=0.1), pack(documents(0, 3))
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(120):
        total, count = CausalLM().loss_sum(model, batch)
        optimiser.zero_grad()
        (total / count).backward()
        optimiser.step()
    # nothing predicts a document's second token but its first
    assert total.item() / count < 0.05


@pytest.mark.peer
def test_loss_and_gradient_equal_transformers_on_one_document(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, tokens = tiny.model(), tiny.ids(30)
    save_huggingface(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    total, count = CausalLM().loss_sum(model, pack([tokens.tolist()]))
    expected = theirs(tokens[None], labels=tokens[None]).loss
    assert total.item() / count == pytest.approx(expected.item(), abs=1e-4)
    (total / count).backward()
    expected.backward()
    wanted = theirs.model.embed_tokens.weight.grad
    assert model.embed_tokens.weight.grad is not None
    assert float((model.embed_tokens.weight.grad - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


@pytest.mark.peer
def test_masked_loss_equals_transformers_with_ignored_labels(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, tokens = tiny.model(), tiny.ids(14)
    save_huggingface(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    mask = [0] * 9 + [1] * 5  # a context and the five tokens of its answer
    total, count = CausalLM().loss_sum(model, PackedBatch.from_segments([(tokens.tolist(), mask)]))
    labels = torch.where(torch.tensor(mask) == 1, tokens, -100)
    assert count == 5
    expected = theirs(tokens[None], labels=labels[None]).loss.detach()
    assert total.item() / count == pytest.approx(expected.item(), abs=1e-4)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=131, n_embd=48, n_layer=2, n_head=4, n_positions=64))


def gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": 16, "sliding_window": 8}
    caps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "attn_implementation": "eager"}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 131, "initializer_range": 0.2}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, **caps, **heads, max_position_embeddings=64))


def gptj() -> Any:
    from transformers import GPTJConfig, GPTJForCausalLM

    model = GPTJForCausalLM(
        GPTJConfig(vocab_size=131, n_embd=64, n_layer=2, n_head=4, n_positions=64, rotary_dim=8, initializer_range=0.2)
    )
    torch.nn.init.normal_(model.lm_head.bias)
    return model


@pytest.mark.peer
@pytest.mark.parametrize("make", [gpt2, gemma2, gptj])
def test_loss_and_gradients_equal_transformers_whatever_the_head(make: Any, tmp_path: Path) -> None:
    """A context of 64 is shorter than what rounding up adds; softcaps and a head with bias take the other way."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = make().eval()
    theirs.save_pretrained(tmp_path)
    model = load_huggingface(tmp_path, torch.float32)
    tokens = tiny.ids(60, vocab_size=131)
    total, count = CausalLM().loss_sum(model, pack([tokens.tolist()]))
    expected = theirs(tokens[None], labels=tokens[None]).loss
    assert total.item() / count == pytest.approx(expected.item(), abs=1e-4)
    (total / count).backward()
    expected.backward()
    mine, wanted = model.embed_tokens.weight.grad, theirs.get_input_embeddings().weight.grad
    assert float((mine - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    if theirs.lm_head.bias is not None:
        assert torch.allclose(model.lm_head.bias.grad, theirs.lm_head.bias.grad, atol=1e-5)


def test_only_rows_that_predict_a_learned_token_get_gradient() -> None:
    model, tokens = tiny.model(), tiny.ids(14)
    states: list[torch.Tensor] = []
    handle = model.norm.register_forward_hook(lambda _, __, out: (out.retain_grad(), states.append(out))[1])
    before = model.layers[0].register_forward_hook(lambda _, __, out: (out.retain_grad(), states.append(out))[1])
    mask = [0] * 9 + [1] * 5
    CausalLM().loss_sum(model, PackedBatch.from_segments([(tokens.tolist(), mask)]))[0].backward()
    handle.remove()
    before.remove()
    first_layer, last = (state.grad.abs().sum(-1) for state in states)
    assert [at for at, some in enumerate(last.bool().tolist()) if some] == [*range(8, 13)]  # 8 predicts the first
    assert bool((first_layer[:13] > 0).all())  # the context is reached through attention


def test_masking_every_token_teaches_nothing() -> None:
    model = tiny.model()
    total, count = CausalLM().loss_sum(model, PackedBatch.from_segments([([1, 2, 3], [0, 0, 0])]))
    assert (total.item(), count) == (0.0, 0)


def gradient(batches: list[PackedBatch]) -> tuple[float, list[torch.Tensor]]:
    model = tiny.model().double()  # in float32 the first norm can make a rounding error a hundred times larger
    loss = loss_and_gradients(model, CausalLM(), batches)["loss"]
    return loss, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@given(st.integers(0, 1000), st.integers(1, 6), st.randoms(use_true_random=False))
@settings(max_examples=15, deadline=None)
def test_gradient_does_not_depend_on_order_or_dealing(seed: int, micro_batches: int, dealer: random.Random) -> None:
    parts = documents(seed, 6)
    loss, expected = gradient([pack(parts)])
    dealer.shuffle(parts)
    dealt = [pack(parts[start::micro_batches]) for start in range(micro_batches)]
    other, found = gradient(dealt)
    assert other == pytest.approx(loss, rel=1e-5)
    for mine, theirs in zip(found, expected, strict=True):
        assert float((mine - theirs).abs().max()) <= 1e-6 * max(1.0, float(theirs.abs().max()))

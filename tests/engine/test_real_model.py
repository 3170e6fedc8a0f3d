"""A real model through every way the engine has of computing: the tokens are transformers'."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from gristmill import assets
from gristmill.core import SamplingParams
from gristmill.engine.llm import LLM

MODEL = "smollm2-135m"
GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
STARTS = (
    "The water mill", "In 1815 the", "def sort(items):", "Once upon a time", "The capital of France is",
    "To bake bread,", "Q: What is 12 times 12?\nA:", "Photosynthesis is", "Dear Sir or Madam,", "The three laws of",
    "Yesterday, stock",
    "SELECT name FROM", "A haiku about rain:\n", "Le chat est", "1, 1, 2, 3, 5, 8,", "If it rains tomorrow",
)  # fmt: skip
PROMPTS = [f"{lead}{start}" for lead in ("", "Notes. ", "Chapter 1\n\n", "He said: ") for start in STARTS]


@functools.cache
def theirs() -> Any:
    transformers = pytest.importorskip("transformers")
    path = assets.get(MODEL)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


@torch.inference_mode()
def check(prompt_ids: list[int], output_ids: list[int]) -> None:
    """Each token is the most probable one by transformers' own forward over all before it.

    That is what its greedy `generate` does token by token, at a fraction of the time. Where its two best are nearer
    than float32 can tell, either will do.
    """
    logits = theirs()(torch.tensor([prompt_ids + output_ids])).logits[0, len(prompt_ids) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(output_ids)[:, None])[:, 0]
    assert float((logits.amax(-1) - chosen).max()) < 1e-4


@pytest.mark.asset
@pytest.mark.peer
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("count", "options"),
    [
        (64, {}),
        (4, {"fast_kernels": False}),
        (8, {"block_size": 5, "max_num_batched_tokens": 24, "kv_cache_tokens": 200, "max_model_len": 128}),
        (8, {"speculation": "ngram", "prefix_caching": False}),
    ],
    ids=["64 prompts", "plain PyTorch", "chunks and preemption", "n-gram speculation"],
)
def test_greedy_tokens_are_those_of_transformers(count: int, options: dict[str, Any]) -> None:
    llm = LLM(MODEL, **options)
    step = len(PROMPTS) // count
    outputs = llm.generate(PROMPTS[::step], GREEDY)
    for output in outputs:
        assert len(output.outputs[0].token_ids) == 64
        check(output.prompt_token_ids, output.outputs[0].token_ids)
    if "kv_cache_tokens" in options:
        assert llm.engine.metrics.preempted > 0
    if "speculation" in options:
        assert llm.engine.metrics.accepted_tokens > 0
    again = llm.generate(PROMPTS[::16], GREEDY)  # the prompts are in the prefix cache now, where there is one
    wanted = {tuple(o.prompt_token_ids): o.outputs[0].token_ids for o in outputs}
    assert [o.outputs[0].token_ids for o in again] == [wanted[tuple(o.prompt_token_ids)] for o in again]


@pytest.mark.asset
@pytest.mark.peer
def test_generate_of_transformers_itself_gives_these_tokens() -> None:
    llm = LLM(MODEL)
    for output in llm.generate(PROMPTS[:2], GREEDY):
        ids = torch.tensor([output.prompt_token_ids])
        length = {"max_new_tokens": 64, "min_new_tokens": 64}
        out = theirs().generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **length)
        assert out[0, ids.shape[1] :].tolist() == output.outputs[0].token_ids


@pytest.mark.asset
def test_a_shared_beginning_is_computed_once() -> None:
    llm = LLM(MODEL)
    system = llm.tokenizer.encode("You are a careful assistant who answers in one short sentence. " * 8)
    first, second = (llm.generate([[*system, token]], GREEDY)[0] for token in (300, 301))
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == len(system) // 16 * 16
    fresh = LLM(MODEL, prefix_caching=False).generate([[*system, 301]], GREEDY)[0]
    assert fresh.outputs[0].token_ids == second.outputs[0].token_ids

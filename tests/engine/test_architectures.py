"""The engine serves every kind of attention, position and mixture as a plain forward computes it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine import helpers
from engine.test_batching import count_preemptions
from gristmill.engine.engine import Engine
from gristmill.engine.scoring import PackedForward, score_completions
from gristmill.errors import RequestError
from gristmill.model.config import FeedForwardConfig, LayerConfig, ModelConfig, MoEConfig, NormConfig, PositionConfig
from gristmill.model.memory import SequenceCache
from gristmill.model.transformer import Transformer
from model import parts

MIXTURE = MoEConfig(num_experts=4, top_k=2, intermediate_size=16, shared_intermediate_size=8)
SIZES = {"vocab_size": helpers.VOCABULARY, "max_position_embeddings": 96}


def serving(position: str, attention: str, **changes: object) -> ModelConfig:
    config = parts.config(position, attention, **SIZES, **changes)
    return replace(config, positions=replace(config.positions, buckets=96)) if position == "relative" else config


CONFIGS: dict[str, ModelConfig] = {
    **{name: serving("rope", name) for name in parts.ATTENTIONS},
    **{
        f"{position}, grouped": serving(position, "grouped")
        for position in parts.POSITIONS
        if position not in parts.LENGTH_DEPENDENT
    },
    "alibi, all of them": serving("alibi", "all of them"),
    "t5, latent": serving("t5", "latent"),
    "fire, window": serving("fire", "window"),
    "latent with sinks and windows": replace(
        serving("rope", "latent"),
        attention=replace(parts.ATTENTIONS["latent"]["attention"], sinks=True, softcap=4.0),
        layers=(LayerConfig(window=5), LayerConfig(window=90)),
    ),
    "mixture": serving("rope", "grouped", feed_forward=FeedForwardConfig(moe=MIXTURE)),
    "capped logits": serving("rope", "softcap", logit_softcap=5.0, norm=NormConfig(placement="sandwich")),
    "scaled logits, head with bias": serving(
        "rope partial", "grouped", logit_scale=0.5, head_bias=True, parallel="one_norm"
    ),
}
REQUESTS = [(helpers.prompt(length, seed), count) for seed, (length, count) in enumerate([(3, 20), (40, 9), (1, 24)])]
REQUESTS += [(helpers.prompt(length, 7), 11) for length in (17, 33, 16)]


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_served_together_chunked_and_preempted_equals_a_plain_forward(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = parts.randomised(Transformer(CONFIGS[name]))
    engine = Engine(model, helpers.tokenizer(), kv_cache_tokens=80, max_num_batched_tokens=25)
    preempted = count_preemptions(engine, monkeypatch)
    outputs = helpers.run(
        engine, [(ids, helpers.greedy(max_tokens=count, logprobs=0, prompt_logprobs=0)) for ids, count in REQUESTS]
    )
    assert preempted
    found = [output.outputs[0] for output in outputs]
    scores = score_completions(
        PackedForward(model), [(ids, one.token_ids) for (ids, _), one in zip(REQUESTS, found, strict=True)]
    )
    for (ids, _), output, one, score in zip(REQUESTS, outputs, found, scores, strict=True):
        rows = model(torch.tensor(ids + one.token_ids[:-1])).log_softmax(-1)
        assert rows[len(ids) - 1 :].argmax(dim=-1).tolist() == one.token_ids
        assert score.is_greedy
        expected = rows[range(len(rows)), (ids + one.token_ids)[1:]].tolist()
        recorded = [*(output.prompt_logprobs or [])[1:], *(one.logprobs or [])]
        served = [entry[token].logprob for entry, token in zip(recorded, (ids + one.token_ids)[1:], strict=True)]  # type: ignore[index]
        assert served == pytest.approx(expected, abs=2e-4)
        assert score.token_logprobs == pytest.approx(expected[len(ids) - 1 :], abs=2e-4)


@pytest.mark.parametrize("name", ["latent with sinks and windows", "alibi, all of them", "mixture"])
@torch.inference_mode()
def test_served_in_bfloat16_equals_the_plain_memory(name: str) -> None:
    model = parts.randomised(Transformer(CONFIGS[name])).bfloat16()
    engine = Engine(model, helpers.tokenizer(), kv_cache_tokens=96)
    (output,) = helpers.run(engine, [(REQUESTS[0][0], helpers.greedy(max_tokens=12, logprobs=0))])
    ids, cache = REQUESTS[0][0] + output.outputs[0].token_ids, SequenceCache(model.config)
    served = [next(iter(entry.values())).logprob for entry in output.outputs[0].logprobs or []]
    tokens, positions = torch.tensor(ids[:-1]), cache.extend(len(ids) - 1)
    rows = model.logits(model.hidden_states(tokens, positions, cache)).float().log_softmax(-1)
    expected = rows[range(len(rows)), ids[1:]][-12:]
    assert float((torch.tensor(served) - expected).abs().mean()) < 0.1


def test_a_bias_per_distance_bounds_the_context() -> None:
    config = replace(serving("relative", "grouped"), positions=PositionConfig(bias="relative", buckets=24))
    engine = Engine(parts.randomised(Transformer(config)), helpers.tokenizer())
    assert engine.max_model_len == config.context == 24
    with pytest.raises(RequestError, match="max_tokens"):
        engine.add(helpers.prompt(20), helpers.greedy(max_tokens=5))
    assert len(helpers.only(engine, helpers.prompt(20), helpers.greedy(max_tokens=4)).token_ids) == 4

"""Left-padded batches on a model: every answer is what the prompt gets alone, and pads and idle places are counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import helpers
from gristmill.core import CAUSAL, AttentionRule
from gristmill.corpus.packing import pack
from gristmill.engine.scheduling.policies import POLICY_NAMES, policy_named
from gristmill.engine.scheduling.static import LeftPadded, count_pads, form_batches, generate_static
from gristmill.errors import RequestError
from gristmill.model.attention.packed import PackedAttention
from gristmill.model.config import AttentionConfig, LayerConfig, PositionConfig, RopeConfig
from model import tiny

PROMPTS = [helpers.prompt(length, length) for length in (3, 5, 2, 8)]
OUTPUTS = (4, 2, 6, 3)
LENGTHS = [len(prompt) for prompt in PROMPTS]


def alone(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor(ids))[-1].argmax()))
    return ids[len(prompt) :]


def test_pads_and_wasted_places_of_one_batch() -> None:
    found = generate_static(helpers.model(), PROMPTS, OUTPUTS, batch_size=4)
    assert (found.pads, found.prompt_slots) == (14, 32)
    assert (found.steps, found.wasted, found.decode_slots) == (6, 9, 24)
    assert found.busy == pytest.approx(15 / 24)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
@pytest.mark.parametrize("buckets", [False, True])
def test_every_row_is_what_it_is_alone_in_the_order_of_the_prompts(batch_size: int, buckets: bool) -> None:
    found = generate_static(helpers.model(), PROMPTS, OUTPUTS, batch_size=batch_size, buckets=buckets)
    assert found.outputs == [alone(helpers.model(), p, n) for p, n in zip(PROMPTS, OUTPUTS, strict=True)]


VARIANTS = {
    "windows": {"layers": (LayerConfig(), LayerConfig(window=3), LayerConfig(window=4))},
    "soft-capped scores and sinks": {"attention": AttentionConfig(softcap=5.0, sinks=True)},
    "learned positions": {"positions": PositionConfig(absolute="learned")},
    "biases": {"positions": PositionConfig(bias="alibi")},
    "shared keys": {"layers": (LayerConfig(), LayerConfig(keys_from=0), LayerConfig())},
    "partial rotation": {"positions": PositionConfig(rope=RopeConfig(theta=100.0, dim=8))},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_whatever_the_attention(changes: dict[str, Any]) -> None:
    model = tiny.model(**changes)
    found = generate_static(model, PROMPTS, OUTPUTS, batch_size=4)
    assert found.outputs == [alone(model, p, n) for p, n in zip(PROMPTS, OUTPUTS, strict=True)]


@pytest.mark.parametrize("attention", [AttentionConfig(), AttentionConfig(softcap=5.0)])  # fused, and written out
@torch.inference_mode()
def test_pads_give_numbers_and_change_nothing(attention: AttentionConfig) -> None:
    model, ids = tiny.model(attention=attention), torch.tensor(PROMPTS[0])
    plain = model(ids)
    for filler in (0, 7):
        cache = LeftPadded(model.config, [5, 0])
        padded = torch.stack((torch.cat((torch.full((5,), filler), ids)), torch.tensor(PROMPTS[3])))
        logits = model(padded, position_ids=cache.extend(8), cache=cache)
        assert logits.isfinite().all(), "a pad sees itself, so there is no softmax over nothing"
        torch.testing.assert_close(logits[0, 5:], plain, atol=1e-5, rtol=1e-5)


def test_an_answer_ends_at_an_end_token_and_its_place_is_wasted_from_then_on() -> None:
    first = alone(helpers.model(), PROMPTS[0], 6)
    end = first[1]
    found = generate_static(helpers.model(), PROMPTS[:2], (6, 6), batch_size=2, end_ids=[end])
    assert found.outputs[0] == first[: first.index(end) + 1]
    assert found.wasted == found.decode_slots - sum(map(len, found.outputs)) > 0


def test_buckets_of_like_length_need_fewer_pads() -> None:
    arrival, sorted_ = form_batches(LENGTHS, 2), form_batches(LENGTHS, 2, buckets=True)
    assert [[LENGTHS[i] for i in batch] for batch in arrival] == [[3, 5], [2, 8]]
    assert [[LENGTHS[i] for i in batch] for batch in sorted_] == [[2, 3], [5, 8]]
    assert (count_pads(LENGTHS, arrival), count_pads(LENGTHS, sorted_)) == (8, 4)
    pads = {b: generate_static(helpers.model(), PROMPTS, OUTPUTS, batch_size=2, buckets=b).pads for b in (False, True)}
    assert pads == {False: 8, True: 4}


class Recording(PackedAttention):
    """Packed attention that keeps what it was given."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__(lengths)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule = CAUSAL) -> Tensor:
        self.kept[layer] = (key, value)
        return super().attend(layer, query, key, value, rule)


@torch.inference_mode()
def test_packed_prompts_need_fewer_places_and_give_the_same() -> None:
    rows = [sorted((piece[0] for piece in row), key=lambda i: -LENGTHS[i]) for row in pack(LENGTHS, 8, seed=0)]
    assert sorted([LENGTHS[i] for i in row] for row in rows) == [[2], [5, 3], [8]]
    assert (len(rows) * 8, len(rows) * 8 - sum(LENGTHS)) == (24, 6)
    padded = count_pads(LENGTHS, form_batches(LENGTHS, 4))
    assert (sum(LENGTHS) + padded, padded) == (32, 14)
    model = helpers.model()
    for row in rows:
        lengths = [LENGTHS[i] for i in row]
        cache = Recording(lengths)
        positions = torch.cat([torch.arange(length) for length in lengths])
        ids = torch.tensor([token for i in row for token in PROMPTS[i]])
        logits = model(ids, position_ids=positions, cache=cache)
        begin = 0
        for i, length in zip(row, lengths, strict=True):
            own = Recording([length])
            single = model(torch.tensor(PROMPTS[i]), position_ids=torch.arange(length), cache=own)
            here = slice(begin, begin + length)
            torch.testing.assert_close(logits[here][-1], single[-1], atol=1e-4, rtol=1e-4)
            for layer, kept in own.kept.items():
                for packed, unpacked in zip(cache.kept[layer], kept, strict=True):
                    torch.testing.assert_close(packed[here], unpacked, atol=1e-4, rtol=1e-4)
            begin += length


@pytest.mark.parametrize("name", POLICY_NAMES)
@pytest.mark.parametrize("prefill_first", [False, True])
def test_swapping_schedulers_changes_the_timing_and_never_the_greedy_output(name: str, prefill_first: bool) -> None:
    prompts = [helpers.prompt(length, length) for length in (17, 3, 40, 9, 25)]
    params = [helpers.greedy(max_tokens=6, ignore_eos=True) for _ in prompts]
    reference = generate_static(helpers.model(), prompts, [6] * 5, batch_size=5)
    steps = set()
    for bounds in ({"max_num_seqs": 3, "max_num_batched_tokens": 16}, {"max_num_seqs": 1}, {}):
        policy = policy_named(name, prefill_first=prefill_first)
        engine = helpers.engine(policy=policy, **bounds)
        outputs = helpers.run(engine, list(zip(prompts, params, strict=True)))
        assert [output.outputs[0].token_ids for output in outputs] == reference.outputs
        steps.add(engine.metrics.steps)
    assert len(steps) == 3, "other bounds, other batches"


REFUSED: dict[str, Callable[[], object]] = {
    "empty prompt": lambda: generate_static(helpers.model(), [[]], [1], batch_size=1),
    "no prompts": lambda: generate_static(helpers.model(), [], [], batch_size=1),
    "no tokens": lambda: generate_static(helpers.model(), PROMPTS, [0] * 4, batch_size=1),
    "batch of none": lambda: generate_static(helpers.model(), PROMPTS, OUTPUTS, batch_size=0),
    "recurrent": lambda: LeftPadded(tiny.config(layers=(LayerConfig(mixer="linear"),) * 3), [0]),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
def test_what_makes_no_sense_is_refused(call: Callable[[], object]) -> None:
    with pytest.raises(RequestError):
        call()

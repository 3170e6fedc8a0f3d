"""The presets against a real model's loops."""

from __future__ import annotations

import pytest

from gristmill.core import SamplingParams
from gristmill.engine.llm import LLM
from gristmill.engine.sampling.presets import PRESETS, preset, repetition_rate

PROMPTS = ["Once upon a time in a small village by the sea,", "List of things to do in spring:", "The history of bread"]


@pytest.mark.asset
def test_presets_repeat_less_than_greedy_text() -> None:
    """Share of runs of four tokens that were there before, mean over texts of 96 tokens."""
    llm = LLM("smollm2-135m")

    def rate(params: SamplingParams) -> float:
        found = [repetition_rate(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, params)]
        return sum(found) / len(found)

    greedy = rate(SamplingParams(temperature=0.0, max_tokens=96, ignore_eos=True))
    rates = {name: rate(preset(name, seed=0, max_tokens=96, ignore_eos=True)) for name in PRESETS}
    print(f"repetition rate: greedy {greedy:.3f}, " + ", ".join(f"{name} {value:.3f}" for name, value in rates.items()))
    assert greedy > 0.1
    assert all(value < 0.1 for value in rates.values())
    assert rates["creative"] == 0.0  # no run of four comes twice

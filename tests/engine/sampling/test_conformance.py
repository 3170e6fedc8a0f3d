"""Every processor of the sampling parameters keeps the contract."""

from __future__ import annotations

import pytest

from conformance.logits_processor import ProcessorCase, ProcessorSuite
from engine.helpers import tokenizer
from gristmill.core import SamplingParams
from gristmill.engine.sampling.bad_words import BadWords
from gristmill.engine.sampling.bias import LogitBias
from gristmill.engine.sampling.length import LengthDecay, MinTokens
from gristmill.engine.sampling.ngrams import NoRepeatedNgrams
from gristmill.engine.sampling.penalties import Penalties
from gristmill.engine.sampling.thinking import Thinking


def both(first: dict[str, object], second: dict[str, object]) -> tuple[SamplingParams, SamplingParams]:
    return SamplingParams.from_dict({"max_tokens": 99, **first}), SamplingParams.from_dict({"max_tokens": 99, **second})


CASES = [
    ProcessorCase(
        "penalties",
        Penalties,
        both({"repetition_penalty": 1.7}, {"presence_penalty": 1.5, "frequency_penalty": 0.7}),
    ),
    ProcessorCase(
        "bias", lambda: LogitBias(40), both({"logit_bias": {5: 20.0, 7: -3.0}}, {"logit_bias": {6: float("-inf")}})
    ),
    ProcessorCase("n-grams", NoRepeatedNgrams, both({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 1})),
    ProcessorCase("long n-grams", NoRepeatedNgrams, both({"no_repeat_ngram_size": 3}, {"no_repeat_ngram_size": 2})),
    ProcessorCase(
        "bad words",
        lambda: BadWords(tokenizer(), 40),
        both({"bad_words": [[5, 6], [6, 7, 8], [9]]}, {"bad_words": [list(range(4, 20)), [7, 7], [30], [8]]}),
    ),
    ProcessorCase("minimum length", MinTokens, both({"min_tokens": 4}, {"min_tokens": 2})),
    ProcessorCase("length decay", LengthDecay, both({"length_decay": (2, 1.5)}, {"length_decay": (0, 0.5)})),
    ProcessorCase(
        "thinking limits",
        lambda: Thinking(tokenizer(), 40),
        both({"thinking_budget": 4, "think_end": [6, 7]}, {"min_thinking_tokens": 5, "think_end": [8]}),
    ),
    ProcessorCase(
        "thinking waits",
        lambda: Thinking(tokenizer(), 40),
        both(
            {"think_waits": 2, "think_wait": 5, "think_end": [8]},
            {"think_waits": 1, "think_wait": 7, "think_end": [6, 8], "min_thinking_tokens": 3, "thinking_budget": 5},
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
class TestProcessors(ProcessorSuite):
    """The suite, once per case."""

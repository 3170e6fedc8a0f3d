"""`LLM` on a tiny model passes the suite that every language model passes, with packed weights and without."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from conformance.language_model import LanguageModelSuite
from engine import helpers
from gristmill.core import LanguageModel
from gristmill.engine.llm import LLM


class LLMSuite(LanguageModelSuite):
    vocab_size = helpers.VOCABULARY
    context_length = 128
    fast_kernels = True

    def make(self) -> LanguageModel:
        with tempfile.TemporaryDirectory() as directory:
            return LLM(helpers.save(Path(directory)), fast_kernels=self.fast_kernels)

    def decode(self, model: LanguageModel, ids: Sequence[int]) -> str | None:
        return helpers.tokenizer().decode(ids)


class TestPlain(LLMSuite):
    fast_kernels = False


class TestPacked(LLMSuite):
    pass


del LLMSuite, LanguageModelSuite  # suites, not tests

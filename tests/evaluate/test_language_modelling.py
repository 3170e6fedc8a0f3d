"""Held-out figures count every token once and are those of the model's own distribution."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.core import LanguageModel, Prompt, Score, Task
from gristmill.errors import DataError
from gristmill.evaluate.language_modelling import HeldOutPerplexity, token_perplexity
from gristmill.scripted import ByteCodec, ScriptedLM

END = [256]
DOCUMENTS = ["The Danube flows east.", "Ein Haus.", "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich.", "x"]


class Recorder(ScriptedLM):
    """Keeps the pairs it scored."""

    def __init__(self) -> None:
        super().__init__([])
        self.pairs: list[tuple[Prompt, Prompt]] = []

    def score(self, prompt: Prompt, completion: Prompt) -> Score:
        self.pairs.append((prompt, completion))
        return super().score(prompt, completion)


class Uniform(ScriptedLM):
    """Every id is equally likely."""

    def next_logprobs(self, previous: int) -> np.ndarray:
        return np.full(ByteCodec.vocab_size, -math.log(ByteCodec.vocab_size))


def test_a_uniform_model_has_the_figures_of_its_vocabulary() -> None:
    task: Task = HeldOutPerplexity("held-out", DOCUMENTS, END)
    result = task.evaluate(Uniform([]))
    assert result.value == pytest.approx(math.log2(257))
    assert result.standard_error == pytest.approx(0.0, abs=1e-12)
    assert token_perplexity(result).value == pytest.approx(257)
    assert result.samples == len(DOCUMENTS)


def test_value_is_total_bits_over_total_bytes_of_the_text() -> None:
    model = ScriptedLM([])
    result = HeldOutPerplexity("held-out", DOCUMENTS, END).evaluate(model)
    nats = -sum(model.score(END, document).logprob for document in DOCUMENTS)
    size = sum(len(document.encode()) for document in DOCUMENTS)
    assert result.value == pytest.approx(nats / math.log(2) / size)
    assert result.standard_error > 0
    assert [record["bytes"] for record in result.records] == [len(document.encode()) for document in DOCUMENTS]
    per_token = token_perplexity(result)
    assert per_token.value == pytest.approx(math.exp(nats / size))  # one token per byte
    assert per_token.standard_error == pytest.approx(per_token.value * result.standard_error * math.log(2), rel=1e-6)


@given(st.lists(st.text(min_size=1, max_size=60), min_size=2, max_size=5), st.integers(3, 20), st.integers(1, 3))
def test_windows_score_every_token_once_and_stay_within_their_length(
    documents: list[str], window: int, starts: int
) -> None:
    start_ids = END * min(starts, window - 2)
    model = Recorder()
    task = HeldOutPerplexity("held-out", documents, start_ids, encode=ByteCodec().encode, window=window)
    result = task.evaluate(model)
    assert [b for _, ids in model.pairs for b in ids] == [b for document in documents for b in document.encode()]
    assert all(len(prompt) + len(ids) <= window and prompt and ids for prompt, ids in model.pairs)
    # The toy distribution looks back one token, so windows change nothing: the context given is the true one.
    whole = HeldOutPerplexity("held-out", documents, start_ids).evaluate(ScriptedLM([]))
    assert result.value == pytest.approx(whole.value)
    assert [r["tokens"] for r in result.records] == [r["tokens"] for r in whole.records]


def test_the_fingerprint_tells_what_was_scored() -> None:
    def fingerprint(documents: list[str], start_ids: list[int]) -> str:
        return HeldOutPerplexity("held-out", documents, start_ids).fingerprint

    assert fingerprint(DOCUMENTS, END) == fingerprint(list(DOCUMENTS), [256])
    assert len({fingerprint(DOCUMENTS, END), fingerprint(DOCUMENTS[:2], END), fingerprint(DOCUMENTS, [0])}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": []}, "two documents"),
        ({"documents": ["a", ""]}, "document 1 is empty"),
        ({"start_ids": []}, "start_ids"),
        ({"window": 16}, "window needs encode"),
        ({"window": 2, "encode": ByteCodec().encode}, "no room"),
    ],
)
def test_a_malformed_task_is_refused(changes: dict[str, object], message: str) -> None:
    arguments = {"name": "held-out", "documents": DOCUMENTS, "start_ids": END} | changes
    with pytest.raises(DataError, match=message):
        HeldOutPerplexity(**arguments)  # type: ignore[arg-type]


def test_a_score_that_is_no_number_names_the_document() -> None:
    class Broken(ScriptedLM):
        def next_logprobs(self, previous: int) -> np.ndarray:
            return np.full(ByteCodec.vocab_size, math.nan)

    model: LanguageModel = Broken([])
    with pytest.raises(DataError, match="document 0"):
        HeldOutPerplexity("held-out", DOCUMENTS, END).evaluate(model)

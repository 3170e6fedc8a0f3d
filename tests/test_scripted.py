"""The scripted model keeps the contract of a LanguageModel and says exactly what it is told."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from conformance.language_model import LanguageModelSuite
from gristmill.core import LanguageModel, SamplingParams
from gristmill.errors import GristmillError, RequestError
from gristmill.scripted import ByteCodec, ScriptedLM
from gristmill.tokens.tokenizer import Tokenizer


def upside_down(prompt: str) -> str:
    return f"{prompt[::-1]}, said the mirror."


def small_tokenizer() -> Tokenizer:
    """A byte-level tokenizer with one merge and an end token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*letters, "th", "<end>"])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, eos_token_id=backend.token_to_id("<end>"))


class TestScriptedBytes(LanguageModelSuite):
    vocab_size = ByteCodec.vocab_size
    greedy_is_argmax = False

    def make(self) -> LanguageModel:
        return ScriptedLM(upside_down)

    def decode(self, model: LanguageModel, ids: Sequence[int]) -> str | None:
        return ByteCodec().decode(ids)


class TestScriptedTokens(LanguageModelSuite):
    greedy_is_argmax = False

    def make(self) -> LanguageModel:
        return ScriptedLM(upside_down, small_tokenizer())

    def decode(self, model: LanguageModel, ids: Sequence[int]) -> str | None:
        return small_tokenizer().decode(ids)


LONG = SamplingParams(temperature=0, max_tokens=None)


def test_a_sequence_is_said_in_order_and_then_runs_out() -> None:
    model = ScriptedLM(["one", "two", "three"])
    pair = model.generate(["a", "b"], LONG)
    (last,) = model.chat([{"role": "user", "content": "c"}], LONG)
    assert [output.outputs[0].text for output in [*pair, last]] == ["one", "two", "three"]
    assert model.prompts == ["a", "b", "user: c\nassistant:"]
    with pytest.raises(GristmillError, match="no answer left"):
        model.generate("d", LONG)


def test_each_of_n_completions_takes_the_next_answer() -> None:
    (output,) = ScriptedLM(["x", "y"]).generate("a", SamplingParams(n=2))
    assert [completion.text for completion in output.outputs] == ["x", "y"]


def test_an_answer_said_to_its_end_stops_and_its_end_token_is_among_the_ids() -> None:
    (output,) = ScriptedLM(["abc"]).generate("p", LONG)
    completion = output.outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("abc", "stop", None)
    assert completion.token_ids == [97, 98, 99, 256]


def test_the_earliest_of_several_stops_wins() -> None:
    params = SamplingParams(stop=["\nUser:", "\n"], max_tokens=None)
    assert ScriptedLM(["yes\nUser: no"]).generate("p", params)[0].outputs[0].text == "yes"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 1.2),
        ("presence_penalty", 1.0),
        ("frequency_penalty", 1.0),
        ("logit_bias", {1: 2.0}),
        ("ignore_eos", True),
        ("min_tokens", 1),
    ],
)
def test_what_could_change_the_script_is_refused_by_name(name: str, value: object) -> None:
    model = ScriptedLM(["never said"])
    with pytest.raises(RequestError, match=name) as caught:
        model.generate("p", SamplingParams.from_dict({name: value}))
    assert caught.value.field == name
    assert model.prompts == []


@given(st.text(), st.text(min_size=1))
def test_any_text_goes_through_unchanged(answer: str, prompt: str) -> None:
    model = ScriptedLM([answer])
    (output,) = model.generate(prompt, LONG)
    assert output.outputs[0].text == answer
    assert model.prompts == [prompt]


@given(st.text(), st.text())
def test_embeddings_have_length_one_and_see_likeness(text: str, other: str) -> None:
    model = ScriptedLM([])
    near, far = model.embed([text, other])
    assert np.linalg.norm(near) == pytest.approx(1, abs=1e-5)
    assert float(near @ model.embed([text])[0]) >= float(near @ far) - 1e-5


def test_every_row_of_the_distribution_is_proper() -> None:
    model = ScriptedLM([])
    for previous in range(ByteCodec.vocab_size):
        assert np.exp(model.next_logprobs(previous)).sum() == pytest.approx(1.0, abs=1e-9)

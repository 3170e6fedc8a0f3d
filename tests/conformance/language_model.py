"""What every LanguageModel must do. Subclass the suite, implement `make`, and pytest runs it all.

    class TestScripted(LanguageModelSuite):
        def make(self) -> LanguageModel:
            return ScriptedLM(str.upper)

The suite assumes no more than the protocol in gristmill.core. A model may refuse a sampling parameter (RequestError
that names the field), but one that it accepts must show its effect.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from gristmill.core import CompletionOutput, LanguageModel, Prompt, RequestOutput, SamplingParams, StructuredOutput
from gristmill.errors import GristmillError, RequestError

PROBES: dict[str, Any] = {
    "n": 2,
    "temperature": 0.7,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.1,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.001,
    "eta_cutoff": 0.001,
    "top_n_sigma": 1.0,
    "temperature_last": True,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "no_repeat_ngram_size": 2,
    "bad_words": ["zq"],
    "logit_bias": {5: 1.0},
    "seed": 3,
    "stop": "zq",
    "stop_outside": ("zq", "qz"),
    "stop_token_ids": [5],
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "max_tokens": 4,
    "min_tokens": 2,
    "length_decay": (2, 1.1),
    "max_time": 60.0,
    "max_flops": 1e15,
    "stop_below_probability": 1e-9,
    "repetition_stop": (2, 3),
    "thinking_budget": 2,
    "min_thinking_tokens": 1,
    "think_end": "zq",
    "think_waits": 1,
    "think_wait": 5,
    "structured": StructuredOutput(choice=("a", "b")),
    "logprobs": 2,
    "prompt_logprobs": 1,
    "skip_special_tokens": False,
}
"""One value other than the default for every sampling parameter."""
COMPANIONS = {"think_waits": "think_wait"}
"""The parameter that a refusal names instead: the default text of the other is no single token of every vocabulary."""


class LanguageModelSuite:
    """Cases for one implementation. The prompts are class attributes, to be changed where a model needs others.

    The greedy answer to the first prompt must have at least four tokens that spell some text.
    """

    prompts: Sequence[str] = ("The river runs", "Two and two make four, and", "Once")
    vocab_size: int | None = None
    """Number of ids of a small vocabulary, to check that probabilities sum to one; None leaves that out."""
    context_length: int | None = None
    """Most tokens the model takes, to check that more are refused; None for no limit."""
    greedy_is_argmax = True
    """Whether greedy generation takes the most probable token of `score`'s distribution."""
    _model: LanguageModel

    def make(self) -> LanguageModel:
        """The model under test."""
        raise NotImplementedError

    def decode(self, model: LanguageModel, ids: Sequence[int]) -> str | None:
        """Text of the ids with special tokens left out, or None for a model that has no access to it."""
        return None

    @pytest.fixture
    def model(self) -> LanguageModel:
        # One model for the whole class: making one may be slow, and the cases must not leave traces in it.
        kind = type(self)
        if "_model" not in vars(kind):
            kind._model = self.make()
        return kind._model

    # Shapes of the call

    def test_satisfies_the_protocol(self, model: LanguageModel) -> None:
        assert isinstance(model, LanguageModel)

    def test_a_string_is_one_prompt_and_a_list_of_strings_is_many_in_order(self, model: LanguageModel) -> None:
        one = model.generate(self.prompts[0], greedy())
        many = model.generate(list(self.prompts), greedy())
        assert [output.prompt for output in one] == [self.prompts[0]]
        assert [output.prompt for output in many] == list(self.prompts)
        for output in [*one, *many]:
            assert output.finished
            assert output.prompt_token_ids
            assert len(output.outputs) == 1

    def test_ids_as_prompt_are_taken_as_they_are(self, model: LanguageModel) -> None:
        outputs = model.generate(list(self.prompts), greedy())
        flat = model.generate(outputs[0].prompt_token_ids, greedy())
        nested = model.generate([output.prompt_token_ids for output in outputs], greedy())
        assert len(flat) == 1
        assert [output.prompt_token_ids for output in nested] == [output.prompt_token_ids for output in outputs]
        assert [ids_of(output) for output in nested] == [ids_of(output) for output in outputs]
        assert ids_of(flat[0]) == ids_of(outputs[0])

    def test_no_prompts_give_no_outputs(self, model: LanguageModel) -> None:
        assert model.generate([], greedy()) == []
        assert model.score_many([]) == []

    def test_default_parameters_are_those_of_sampling_params(self, model: LanguageModel) -> None:
        (output,) = model.generate(self.prompts[0])
        assert 1 <= len(ids_of(output)) <= SamplingParams().max_tokens  # type: ignore[operator]

    def test_chat_takes_one_conversation_or_many(self, model: LanguageModel) -> None:
        conversations = [[{"role": "user", "content": prompt}] for prompt in self.prompts]
        one = model.chat(conversations[0], greedy())
        many = model.chat(conversations, greedy())
        assert len(one) == 1
        assert len(many) == len(conversations)
        assert ids_of(one[0]) == ids_of(many[0])

    # Ends

    def test_every_output_says_why_it_ended(self, model: LanguageModel) -> None:
        for output in model.generate(list(self.prompts), greedy(max_tokens=8)):
            assert output.outputs[0].finish_reason in ("stop", "length")

    @pytest.mark.parametrize("limit", [1, 3])
    def test_max_tokens_bounds_the_output_and_is_told(self, model: LanguageModel, limit: int) -> None:
        long = first(model, self.prompts[0], greedy(max_tokens=12))
        short = first(model, self.prompts[0], greedy(max_tokens=limit))
        assert len(long.token_ids) >= 4, "choose a first prompt with a longer greedy answer"
        assert short.token_ids == long.token_ids[:limit]
        assert short.finish_reason == "length"

    def test_a_stop_string_ends_the_text_and_is_not_part_of_it(self, model: LanguageModel) -> None:
        whole = first(model, self.prompts[0], greedy(max_tokens=16))
        stop = some_character(whole.text)
        for stops in (stop, [stop], ["\x00never\x00", stop]):
            cut = first(model, self.prompts[0], greedy(max_tokens=16, stop=stops))
            assert cut.text == whole.text[: whole.text.index(stop)]
            assert cut.finish_reason == "stop"
            assert cut.stop_reason == stop
            assert len(cut.token_ids) <= len(whole.token_ids)

    def test_a_stop_string_that_never_comes_changes_nothing(self, model: LanguageModel) -> None:
        whole = first(model, self.prompts[0], greedy())
        other = first(model, self.prompts[0], greedy(stop="\x00never\x00"))
        assert (other.text, other.token_ids, other.finish_reason) == (whole.text, whole.token_ids, whole.finish_reason)

    def test_text_is_the_detokenised_ids(self, model: LanguageModel) -> None:
        for prompt in self.prompts:
            output = first(model, prompt, greedy(max_tokens=12))
            text = self.decode(model, output.token_ids)
            assert text is None or output.text == text

    # Determinism

    def test_greedy_does_not_depend_on_the_other_prompts(self, model: LanguageModel) -> None:
        together = model.generate([*self.prompts, self.prompts[0]], greedy(max_tokens=8))
        alone = [model.generate(prompt, greedy(max_tokens=8))[0] for prompt in self.prompts]
        assert [ids_of(output) for output in together] == [ids_of(output) for output in [*alone, alone[0]]]

    def test_the_same_seed_gives_the_same_sample_in_any_company(self, model: LanguageModel) -> None:
        params = SamplingParams(temperature=1.0, seed=7, max_tokens=8)
        alone = first(model, self.prompts[0], params)
        again = first(model, self.prompts[0], params)
        in_company = model.generate([self.prompts[1], self.prompts[0]], params)[1].outputs[0]
        assert alone.token_ids == again.token_ids == in_company.token_ids

    def test_n_completions_are_numbered_and_repeat_with_the_seed(self, model: LanguageModel) -> None:
        params = SamplingParams(n=3, temperature=1.0, seed=11, max_tokens=6)
        (output,) = model.generate(self.prompts[0], params)
        (again,) = model.generate(self.prompts[0], params)
        assert [completion.index for completion in output.outputs] == [0, 1, 2]
        assert [c.token_ids for c in output.outputs] == [c.token_ids for c in again.outputs]
        assert all(completion.finish_reason in ("stop", "length") for completion in output.outputs)

    # Scores

    def test_score_many_equals_score_one_by_one(self, model: LanguageModel) -> None:
        pairs: list[tuple[Prompt, Prompt]] = [(p, c) for p in self.prompts for c in (" on", " and so it went", "!")]
        for (prompt, completion), score in zip(pairs, model.score_many(pairs), strict=True):
            alone = model.score(prompt, completion)
            assert score.token_ids == alone.token_ids
            assert score.token_logprobs == pytest.approx(alone.token_logprobs, abs=1e-4)

    def test_score_has_one_finite_logprob_of_at_most_zero_per_token(self, model: LanguageModel) -> None:
        score = model.score(self.prompts[0], " to the sea")
        assert score.token_ids
        assert len(score.token_logprobs) == len(score.token_ids)
        assert all(-math.inf < logprob <= 1e-6 for logprob in score.token_logprobs)

    def test_score_takes_ids_as_they_are(self, model: LanguageModel) -> None:
        text = model.score(self.prompts[0], " to the sea")
        ids = model.score(prompt_ids(model, self.prompts[0]), text.token_ids)
        assert ids.token_ids == text.token_ids
        assert ids.logprob == pytest.approx(text.logprob, abs=1e-3)

    def test_score_is_additive_over_a_split(self, model: LanguageModel) -> None:
        before = prompt_ids(model, self.prompts[0])
        after = model.score(self.prompts[0], " to the far sea").token_ids
        whole = model.score(before, after).logprob
        for cut in range(1, len(after)):
            parts = model.score(before, after[:cut]).logprob + model.score([*before, *after[:cut]], after[cut:]).logprob
            assert parts == pytest.approx(whole, abs=1e-3)

    def test_next_token_probabilities_sum_to_one_and_the_greedy_one_is_the_largest(self, model: LanguageModel) -> None:
        if self.vocab_size is None:
            pytest.skip("no small vocabulary to sum over")
        scores = model.score_many([(prompt_ids(model, self.prompts[0]), [i]) for i in range(self.vocab_size)])
        logprobs = [score.logprob for score in scores]
        assert sum(map(math.exp, logprobs)) == pytest.approx(1.0, abs=1e-3)
        best = [i for i, score in enumerate(scores) if score.is_greedy]
        assert best == [int(np.argmax(logprobs))]

    def test_greedy_output_is_greedy_under_score(self, model: LanguageModel) -> None:
        (output,) = model.generate(self.prompts[0], greedy(max_tokens=6))
        score = model.score(output.prompt_token_ids, ids_of(output))
        assert score.is_greedy or not self.greedy_is_argmax

    # Parameters: applied or refused

    def test_there_is_a_probe_for_every_sampling_parameter(self) -> None:
        fields = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
        assert fields.keys() == PROBES.keys()
        assert all(PROBES[name] != default for name, default in fields.items())

    @pytest.mark.parametrize("name", sorted(PROBES))
    def test_a_parameter_is_accepted_or_refused_by_its_name(self, model: LanguageModel, name: str) -> None:
        outcome = attempt(model, self.prompts[0], dataclasses.replace(greedy(), **{name: PROBES[name]}))
        if isinstance(outcome, RequestError):
            assert outcome.field in (name, COMPANIONS.get(name))
        else:
            assert outcome.finished

    def test_logprobs_agree_with_score(self, model: LanguageModel) -> None:
        output = applied(model, self.prompts[0], logprobs=2)
        chosen = output.outputs[0]
        assert chosen.logprobs is not None
        assert len(chosen.logprobs) == len(chosen.token_ids)
        values = [step[i].logprob for step, i in zip(chosen.logprobs, chosen.token_ids, strict=True)]
        score = model.score(output.prompt_token_ids, chosen.token_ids)
        assert values == pytest.approx(score.token_logprobs, abs=1e-3)
        assert chosen.cumulative_logprob == pytest.approx(sum(values), abs=1e-3)
        for step in chosen.logprobs:
            assert {1, 2} <= {entry.rank for entry in step.values()}
            ordered = sorted(step.values(), key=lambda entry: entry.rank)
            assert all(a.logprob >= b.logprob for a, b in itertools.pairwise(ordered))

    def test_prompt_logprobs_agree_with_score(self, model: LanguageModel) -> None:
        output = applied(model, self.prompts[1], prompt_logprobs=1)
        ids = output.prompt_token_ids
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == len(ids)
        assert output.prompt_logprobs[0] is None
        values = [step[i].logprob for step, i in zip(output.prompt_logprobs[1:], ids[1:], strict=True) if step]
        assert values == pytest.approx(model.score(ids[:1], ids[1:]).token_logprobs, abs=1e-3)

    def test_no_logprobs_unless_asked(self, model: LanguageModel) -> None:
        (output,) = model.generate(self.prompts[0], greedy())
        assert output.prompt_logprobs is None
        assert output.outputs[0].logprobs is None
        assert output.outputs[0].cumulative_logprob is None

    def test_stop_token_ids_end_the_output(self, model: LanguageModel) -> None:
        whole = first(model, self.prompts[0], greedy(max_tokens=12)).token_ids
        end = whole[2]
        cut = applied(model, self.prompts[0], max_tokens=12, stop_token_ids=[end]).outputs[0]
        assert cut.finish_reason == "stop"
        assert cut.stop_reason == end
        assert end not in cut.token_ids[:-1]
        assert cut.token_ids == whole[: len(cut.token_ids)]

    def test_include_stop_keeps_the_stop_string_and_nothing_after_it(self, model: LanguageModel) -> None:
        whole = first(model, self.prompts[0], greedy(max_tokens=16)).text
        stop = some_character(whole)
        output = applied(model, self.prompts[0], max_tokens=16, stop=stop, include_stop_str_in_output=True)
        assert output.outputs[0].text == whole[: whole.index(stop) + len(stop)]

    def test_ignore_eos_goes_on_to_max_tokens(self, model: LanguageModel) -> None:
        output = applied(model, self.prompts[0], max_tokens=20, ignore_eos=True).outputs[0]
        assert len(output.token_ids) == 20
        assert output.finish_reason == "length"

    def test_min_tokens_is_reached(self, model: LanguageModel) -> None:
        output = applied(model, self.prompts[0], max_tokens=20, min_tokens=19).outputs[0]
        assert len(output.token_ids) >= 19

    def test_logit_bias_can_ban_a_token(self, model: LanguageModel) -> None:
        banned = first(model, self.prompts[0], greedy()).token_ids[0]
        output = applied(model, self.prompts[0], logit_bias={banned: -100.0}).outputs[0]
        assert banned not in output.token_ids

    # Refusals

    @pytest.mark.parametrize("prompt", ["", [[]]], ids=["text", "ids"])
    def test_an_empty_prompt_is_refused(self, model: LanguageModel, prompt: Any) -> None:
        with pytest.raises(RequestError) as caught:
            model.generate(prompt, greedy())
        assert caught.value.field is not None

    def test_a_score_after_nothing_or_of_nothing_is_refused(self, model: LanguageModel) -> None:
        for prompt, completion, field in [
            ([], "text", "prompt"),
            ("text", "", "completion"),
            ("text", [], "completion"),
        ]:
            with pytest.raises(RequestError) as caught:
                model.score(prompt, completion)
            assert caught.value.field == field

    @pytest.mark.parametrize("token", [-1, 10**9])
    def test_an_id_outside_the_vocabulary_is_refused(self, model: LanguageModel, token: int) -> None:
        with pytest.raises(RequestError):
            model.generate([*prompt_ids(model, self.prompts[0]), token], greedy())
        with pytest.raises(RequestError):
            model.score(self.prompts[0], [token])

    def test_an_empty_conversation_is_refused(self, model: LanguageModel) -> None:
        with pytest.raises(GristmillError):
            model.chat([[]], greedy())

    def test_a_prompt_longer_than_the_context_is_refused(self, model: LanguageModel) -> None:
        if self.context_length is None:
            pytest.skip("no limit")
        token = prompt_ids(model, self.prompts[0])[-1:]
        with pytest.raises(RequestError):
            model.generate(token * (self.context_length + 1), greedy())
        with pytest.raises(RequestError):
            model.score(token, token * (self.context_length + 1))

    def test_a_refusal_leaves_the_model_usable(self, model: LanguageModel) -> None:
        before = first(model, self.prompts[0], greedy())
        with pytest.raises(RequestError):
            model.generate([self.prompts[0], ""], greedy())
        assert first(model, self.prompts[0], greedy()).token_ids == before.token_ids

    # Embeddings

    def test_embeddings_are_unit_vectors_in_order(self, model: LanguageModel) -> None:
        vectors = model.embed(list(self.prompts))
        assert vectors.dtype == np.float32
        assert vectors.ndim == 2
        assert vectors.shape[0] == len(self.prompts)
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-4)
        backwards = model.embed(list(reversed(self.prompts)))
        assert np.allclose(vectors, backwards[::-1], atol=1e-4)

    def test_embeddings_repeat_and_tell_texts_apart(self, model: LanguageModel) -> None:
        vectors = model.embed(list(self.prompts))
        assert np.allclose(vectors, model.embed(list(self.prompts)), atol=1e-6)
        assert not np.allclose(vectors[0], vectors[1], atol=1e-4)


def greedy(**changes: Any) -> SamplingParams:
    """Greedy parameters with a small default length."""
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 6, **changes})


def first(model: LanguageModel, prompt: Prompt, params: SamplingParams) -> CompletionOutput:
    """The first completion of one prompt."""
    return model.generate(prompt, params)[0].outputs[0]


def applied(model: LanguageModel, prompt: Prompt, **changes: Any) -> RequestOutput:
    """The output under changed parameters; skips when the model refuses one of them by its name."""
    outcome = attempt(model, prompt, greedy(**changes))
    if isinstance(outcome, RequestError):
        assert outcome.field in changes
        pytest.skip(f"{outcome.field} is refused")
    return outcome


def attempt(model: LanguageModel, prompt: Prompt, params: SamplingParams) -> RequestOutput | RequestError:
    """The output of one prompt, or the refusal."""
    try:
        return model.generate(prompt, params)[0]
    except RequestError as error:
        return error


def ids_of(output: RequestOutput) -> list[int]:
    """Ids of the first completion."""
    return output.outputs[0].token_ids


def prompt_ids(model: LanguageModel, prompt: str) -> list[int]:
    """The ids that the model makes of a prompt."""
    return model.generate(prompt, greedy(max_tokens=1))[0].prompt_token_ids


def some_character(text: str) -> str:
    """A whole character from the middle of the text, to stop at."""
    whole = [character for character in text if character != "\ufffd"]
    assert whole, "choose a first prompt whose greedy answer spells some text"
    return whole[len(whole) // 2]

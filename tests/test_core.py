"""Sampling parameters are applied or refused by name; `import gristmill` shows the public names."""

import pickle
from typing import Any

import pytest

import gristmill
from gristmill import SamplingParams
from gristmill.errors import MissingExtra, RequestError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", True),
        ("n", None),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("min_tokens", 17),
        ("logprobs", -1),
        ("prompt_logprobs", -1),
        ("stop", ""),
        ("stop", ["fine", ""]),
        ("top_p", "0.5"),
        ("typical_p", 0.0),
        ("epsilon_cutoff", 1.0),
        ("eta_cutoff", -0.1),
        ("top_n_sigma", float("inf")),
        ("no_repeat_ngram_size", -1),
        ("bad_words", "word"),
        ("bad_words", [5, 6]),
        ("bad_words", [[]]),
        ("length_decay", (3,)),
        ("length_decay", (1.5, 1.1)),
        ("length_decay", (3, 0.0)),
        ("length_decay", (16, 1.1)),
        ("max_time", 0.0),
        ("max_flops", -1.0),
        ("stop_below_probability", 1.1),
        ("repetition_stop", (2, 1)),
        ("repetition_stop", (0, 3)),
        ("repetition_stop", (1, 17)),
        ("thinking_budget", 16),
        ("thinking_budget", -1),
        ("min_thinking_tokens", 16),
        ("think_end", ""),
        ("think_end", 5),
        ("think_waits", -1),
        ("think_wait", ""),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("length_decay", {"length_decay": (3, 1.1), "ignore_eos": True}),
        ("min_thinking_tokens", {"min_thinking_tokens": 5, "thinking_budget": 4}),
        ("think_waits", {"think_waits": 5, "thinking_budget": 4}),
    ],
)
def test_settings_that_contradict_each_other_are_refused(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        SamplingParams(**values)
    assert caught.value.field == field


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0)  # type: ignore[call-arg]
    with pytest.raises(RequestError, match=r"temprature.*temperature"):
        SamplingParams.from_dict({"temprature": 0})


def test_from_dict_takes_every_field() -> None:
    params = SamplingParams(n=2, temperature=0.5, stop=["a"], seed=7)
    values = {name: getattr(params, name) for name in params.__dataclass_fields__}
    assert SamplingParams.from_dict(values) == params


def test_a_turns_end_is_added_unless_ends_are_ignored() -> None:
    assert SamplingParams(stop_token_ids=[5]).ending_at([7, 5]).stop_token_ids == (5, 7)
    assert SamplingParams(ignore_eos=True).ending_at([7]).stop_token_ids is None


def test_every_public_name_is_there() -> None:
    assert all(hasattr(gristmill, name) for name in gristmill.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        gristmill.nonsense  # noqa: B018


def test_errors_come_whole_out_of_another_process() -> None:
    for error in (MissingExtra("millstone", "serve"), RequestError("too long", field="prompt", code="long")):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))

"""Sampling parameters are applied or refused by name; `import gristmill` shows the public names."""

from typing import Any

import pytest

import gristmill
from gristmill import SamplingParams
from gristmill.errors import RequestError


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
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        SamplingParams(**{field: value})
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

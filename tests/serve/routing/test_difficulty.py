"""Difficulty by looks and by doubt, and where a router sends a conversation for it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.core import CompletionOutput, Logprob, Message
from gristmill.engine.async_engine import AsyncEngine
from gristmill.engine.llm import LLM
from gristmill.errors import GristmillError, RequestError
from gristmill.serve.routing.difficulty import first_margin, mean_doubt, surface_difficulty
from gristmill.serve.routing.router import Choice, RequestRouter, Route, parse_router
from serve.tiny import save_tiny_model

MARKS = ("```def f():```", "12 + 7 = x", "Prove it step by step.", "And why? And when?", "more " * 300)


@given(st.lists(st.sampled_from(MARKS), unique=True), st.sampled_from(MARKS))
def test_a_further_mark_is_never_easier(marks: list[str], another: str) -> None:
    text = "Hello there. " + " ".join(marks)
    assert 0 <= surface_difficulty(text) <= surface_difficulty(f"{text} {another}") < 1


def test_hard_looks_harder_than_easy() -> None:
    easy = ["Hi!", "What is the capital of France?", "Say hello in Spanish."]
    hard = [
        "Prove that the sum of two even numbers is even.",
        "Why does this fail?\n```python\ndef f(x):\n    return x[0]\n```",
        "Solve 3x + 17 = 125 and explain how you got there.",
        "为什么天空是蓝色的？",
    ]
    assert max(map(surface_difficulty, easy)) < min(map(surface_difficulty, hard))


def answer(*places: dict[int, float]) -> CompletionOutput:
    """The first of each place's tokens is the answer's."""
    logprobs = [{token: Logprob(math.log(p), 1, "") for token, p in place.items()} for place in places]
    return CompletionOutput(0, "", [next(iter(place)) for place in places], logprobs=logprobs)


def test_doubt_by_hand() -> None:
    assert mean_doubt(answer({5: 0.9, 6: 0.1}, {7: 0.4})) == pytest.approx(1 - 0.6)  # the root of 0.36
    assert first_margin(answer({5: 0.7, 6: 0.2, 8: 0.05}, {7: 0.4})) == pytest.approx(0.5)
    assert mean_doubt(answer()) == first_margin(answer()) == 1.0
    for score in (mean_doubt, first_margin):
        with pytest.raises(RequestError, match="logprobs"):
            score(CompletionOutput(0, "", [1]))
    with pytest.raises(RequestError, match="logprobs=2"):
        first_margin(answer({5: 0.7}))


def test_a_router_is_spelled_in_one_line() -> None:
    router = parse_router("name=auto,small=org/a:lora,large=b@1024,threshold=0.3,by=text")
    assert router == RequestRouter(
        name="auto", small=Route("org/a:lora"), large=Route("b", 1024), threshold=0.3, by="text"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name=auto,small=a,large=b", "threshold is missing"),
        ("name=auto,small=a,large=b,treshold=1", "Did you mean threshold"),
        ("name=auto,small=a,large=b,threshold=2", r"\[0, 1\]"),
        ("name=auto,small=a,large=b,threshold=x", "could not convert"),
        ("name=auto,small=a,large=a,threshold=0.5", "must differ"),
        ("name=a,small=a,large=b,threshold=0.5", "must differ"),
        ("name=auto,small=a,small=c,large=b,threshold=0.5", "once"),
        ("name=auto,small=a,large=b,threshold=0.5,by=luck", "confidence, text"),
        ("name=auto,small=a,large=b,threshold=0.5,probe_tokens=0", "at least 1"),
    ],
)
def test_a_wrong_one_says_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(GristmillError, match=said):
        parse_router(text)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    directory: Path = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    return LLM(directory, fast_kernels=False)


def test_the_small_models_doubt_decides(llm: LLM) -> None:
    messages: Sequence[Message] = [{"role": "user", "content": "Why?"}]
    small, large = Route("a", 0), Route("a", 64)
    engine = AsyncEngine(llm.engine)

    def chosen(threshold: float, **more: object) -> Choice:
        router = RequestRouter(name="auto", small=small, large=large, threshold=threshold, probe_tokens=3, **more)  # type: ignore[arg-type]
        return asyncio.run(router.choose(messages, engine, llm.renderer))

    try:
        choice = chosen(0.0)
        assert (choice.route, choice.probe_tokens) == (large, 3)
        assert 0 < choice.difficulty < 1
        assert choice.headers["x-gristmill-model"] == "a"
        assert chosen(choice.difficulty + 1e-6).route == small
        by_text = chosen(0.4, by="text")
        assert (by_text.route, by_text.probe_tokens) == (large, 0)
        assert by_text.difficulty == surface_difficulty("Why?")
        messages = [{"role": "user", "content": "x" * 300}]  # more than the small model's context
        too_long = chosen(1.0)
        assert (too_long.route, too_long.probe_tokens) == (large, 0)
    finally:
        engine.close()

"""litellm, langchain, llama-index and lm-eval, each as its users run it, against a running server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gristmill import LLM, SamplingParams
from gristmill.serve.app import create_app
from serve.clients.conftest import AFTER_CALL, CITY, HELLO, SCRIPTS, Place
from serve.running import running

pytestmark = pytest.mark.peer

Client = Callable[..., Any]
TOKENS = len(HELLO) + 1  # and the end of the turn


def test_litellm(place: Place, client: Client) -> None:
    found = client("litellm_client.py", place.url, "scripted", place.llm.model_name)
    assert found["whole"] == found["streamed"] == found["async"] == HELLO
    assert found["finish_reason"] == "stop"
    assert found["tokens"] == found["streamed_tokens"] == TOKENS
    assert found["call"] == {"a": 2, "b": 3}
    assert found["after_call"] == AFTER_CALL
    assert found["parsed"] == CITY
    assert found["text"] == HELLO[:5]
    assert found["dimensions"] == [32, 32]
    assert found["ranked"] == [0, 1]
    assert "temperature" in found["error"]


def test_langchain(place: Place, client: Client) -> None:
    found = client("langchain_client.py", place.url, "scripted", place.llm.model_name, place.path)
    assert found["whole"] == found["streamed"] == HELLO
    assert found["finish_reason"] == "stop"
    assert found["tokens"] == found["streamed_tokens"] == TOKENS
    assert found["call"] == found["streamed_call"] == {"a": 2, "b": 3}
    assert found["after_call"] == AFTER_CALL
    assert found["parsed"] == [CITY] * 3
    assert found["text"] == HELLO[:5]
    assert found["dimensions"] == [32] * 4
    assert found["vectors_differ"] < 1e-5


def test_llama_index(place: Place, client: Client) -> None:
    found = client("llama_index_client.py", place.url, "scripted", place.llm.model_name)
    assert found["whole"] == found["streamed"] == HELLO
    assert found["finish_reason"] == "stop"
    assert found["tokens"] == TOKENS
    assert found["call_result"] == "5"
    assert found["parsed"] == [CITY] * 2
    assert found["text"] == found["streamed_text"] == HELLO[:5]
    assert found["dimensions"] == [32, 32]


def compare_lm_eval(llm: LLM, tokenizer: str, client: Client) -> None:
    """What lm-eval measures through HTTP is what the library says in process."""
    items = [json.loads(line) for line in (SCRIPTS / "tasks" / "items.jsonl").read_text().splitlines()]
    pairs = [(item["question"], choice) for item in items for choice in item["choices"]]
    cuts = [(llm.tokenizer.encode(a + b), len(llm.tokenizer.encode(a))) for a, b in pairs]
    scores = llm.score_many([(ids[:cut], ids[cut:]) for ids, cut in cuts])
    params = SamplingParams(temperature=0, max_tokens=8, stop=["\n", "?"])
    questions = [item["question"] for item in items]
    generated = [output.outputs[0].text for output in llm.generate(questions, params)]
    turns = [[{"role": "user", "content": question}] for question in questions]
    chatted = [output.outputs[0].text for output in llm.chat(turns, params)]  # type: ignore[arg-type]
    with running(create_app(llm)) as url:
        found = client("lm_eval_client.py", url, llm.model_name, tokenizer, folder="tasks")
    for way in ("ids", "together", "texts"):
        asked = {(question, choice): answer for question, choice, answer in found[way]["mill_choice"]}
        assert set(asked) == set(pairs)
        for pair, score in zip(pairs, scores, strict=True):
            logprob, greedy = asked[pair]
            assert float(logprob) == pytest.approx(score.logprob, abs=1e-4), (way, pair)
            assert greedy in (score.is_greedy, str(score.is_greedy)), (way, pair)
        assert [answer for *_, answer in found[way]["mill_answer"]] == generated, way
    assert [answer for *_, answer in found["chat"]["mill_answer"]] == chatted


def test_lm_eval(place: Place, client: Client) -> None:
    compare_lm_eval(LLM(place.path), str(place.path), client)


@pytest.mark.asset
def test_lm_eval_with_smollm2(tmp_path: Path, client: Client) -> None:
    llm = LLM("smollm2-135m")
    llm.tokenizer.save(tmp_path)
    compare_lm_eval(llm, str(tmp_path), client)

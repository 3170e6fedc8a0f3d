"""/v1/completions, /tokenize and /detokenize over a real engine of a tiny model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from gristmill import LLM, SamplingParams
from gristmill.serve.app import create_app
from serve.conftest import Served
from serve.running import running
from serve.tiny import save_tiny_model

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.peer


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    model = LLM(save_tiny_model(tmp_path_factory.mktemp("tiny")), fast_kernels=False)
    model.model_name = "tiny"
    return model


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """The same model in this process, as the server owns the other's engine."""
    return LLM(save_tiny_model(tmp_path_factory.mktemp("twin")), fast_kernels=False)


@pytest.fixture(scope="module")
def url(llm: LLM) -> Iterator[str]:
    with running(create_app(llm)) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    own = {name: fields.pop(name) for name in list(fields) if name in ("return_token_ids", "add_special_tokens")}
    arguments = {"model": "tiny", "temperature": 0, "max_tokens": 6, **fields}
    return client.completions.create(**arguments, extra_body=own)


def test_equals_the_engine(client: openai.OpenAI, twin: LLM) -> None:
    texts = ["one", "another", "a third"]
    direct = twin.generate(texts, SamplingParams(temperature=0, max_tokens=6))
    whole = ask(client, prompt=texts)
    assert [choice.text for choice in whole.choices] == [output.outputs[0].text for output in direct]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert whole.usage.prompt_tokens == sum(len(output.prompt_token_ids) for output in direct)
    assert whole.usage.completion_tokens == 18
    ids = [list(output.prompt_token_ids) for output in direct]
    assert [c.text for c in ask(client, prompt=ids).choices] == [c.text for c in whole.choices]
    assert ask(client, prompt=ids[0]).choices[0].text == ask(client, prompt="one").choices[0].text
    assert {choice.finish_reason for choice in whole.choices} == {"length"}


def test_several_answers_to_several_prompts(client: openai.OpenAI, twin: LLM) -> None:
    params = SamplingParams(temperature=1, seed=5, n=2, max_tokens=6)
    direct = [answer.text for output in twin.generate(["one", "two"], params) for answer in output.outputs]
    found = ask(client, prompt=["one", "two"], temperature=1, seed=5, n=2)
    assert [choice.text for choice in found.choices] == direct
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]


@pytest.mark.parametrize("prompts", ["one", ["one", "two", "three"]])
def test_a_stream_adds_up_to_the_whole_answer(client: openai.OpenAI, prompts: str | list[str]) -> None:
    fields: dict[str, Any] = {"prompt": prompts, "n": 2, "temperature": 1, "seed": 3, "logprobs": 2, "echo": True}
    whole = ask(client, **fields)
    texts = [""] * len(whole.choices)
    tokens: list[list[int]] = [[] for _ in texts]
    offsets: list[list[int]] = [[] for _ in texts]
    reasons = [None] * len(texts)
    usages = []
    for chunk in ask(client, **fields, stream=True, stream_options={"include_usage": True}):
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.token_ids
            offsets[choice.index] += choice.logprobs.text_offset
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.token_ids for choice in whole.choices]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usages[-1].total_tokens == whole.usage.total_tokens
    assert set(usages[:-1]) == {None}


def test_echo_scores_the_prompt(client: openai.OpenAI, twin: LLM) -> None:
    """What evaluation harnesses do: the log-probabilities of a continuation that is part of the prompt."""
    context, continuation = twin.tokenizer.encode("The water "), twin.tokenizer.encode("wheel", add_bos=False)
    score = twin.score(context, continuation)
    for max_tokens in (0, 1):
        found = ask(client, prompt=[*context, *continuation], echo=True, logprobs=1, max_tokens=max_tokens)
        (choice,) = found.choices
        ended = len(context) + len(continuation)
        assert len(choice.logprobs.tokens) == ended + max_tokens
        assert choice.logprobs.token_logprobs[0] is None
        ours = choice.logprobs.token_logprobs[len(context) : ended]
        np.testing.assert_allclose(ours, score.token_logprobs, atol=1e-5)
        top = choice.logprobs.top_logprobs[len(context) : ended]
        greedy = [max(places, key=places.__getitem__) for places in top]
        assert (greedy == choice.logprobs.tokens[len(context) : ended]) == score.is_greedy
        assert choice.text.startswith("The water wheel")
        assert found.usage.completion_tokens == max_tokens
    assert ask(client, prompt="The ", echo=True).choices[0].text.startswith("The ")


def test_best_of_returns_the_likeliest(client: openai.OpenAI, twin: LLM) -> None:
    params = SamplingParams(temperature=1, seed=9, n=6, max_tokens=6, logprobs=0)
    outputs = twin.generate("one", params)[0].outputs
    best = sorted(outputs, key=lambda o: -(o.cumulative_logprob or 0) / len(o.token_ids))[:2]
    found = ask(client, prompt="one", temperature=1, seed=9, n=2, best_of=6)
    assert [choice.text for choice in found.choices] == [output.text for output in best]
    assert found.choices[0].logprobs is None
    assert found.usage.completion_tokens == sum(len(output.token_ids) for output in outputs)
    with pytest.raises(openai.BadRequestError, match="best_of"):
        ask(client, prompt="one", n=3, best_of=2)
    with pytest.raises(openai.BadRequestError, match="best"):
        ask(client, prompt="one", n=1, best_of=2, stream=True)


def test_token_ids_can_be_asked_for(client: openai.OpenAI, twin: LLM) -> None:
    direct = twin.generate("one", SamplingParams(temperature=0, max_tokens=6))[0]
    (choice,) = ask(client, prompt="one", return_token_ids=True).choices
    assert (choice.prompt_token_ids, choice.token_ids) == (direct.prompt_token_ids, direct.outputs[0].token_ids)
    messages: Any = [{"role": "user", "content": "one"}]
    extra = {"return_token_ids": True}
    arguments: dict[str, Any] = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 6}
    whole: Any = client.chat.completions.create(**arguments, extra_body=extra)
    assert whole.prompt_token_ids == twin.renderer.render_prompt(messages)
    answer = twin.chat(messages, SamplingParams(temperature=0, max_tokens=6))[0].outputs[0]
    assert whole.choices[0].token_ids == answer.token_ids
    streamed: list[int] = []
    prompts = []
    for chunk in client.chat.completions.create(**arguments, extra_body=extra, stream=True):
        prompts += [chunk.prompt_token_ids] if hasattr(chunk, "prompt_token_ids") else []
        streamed += [i for choice in chunk.choices for i in getattr(choice, "token_ids", None) or ()]
    assert (streamed, prompts) == (answer.token_ids, [whole.prompt_token_ids])


def test_the_start_token_can_be_left_out(url: str, client: openai.OpenAI, llm: LLM) -> None:
    tokenizer = llm.tokenizer
    before = tokenizer.bos_token_id
    assert before is None  # the tiny one has none, so give it one
    llm.tokenizer = dataclasses.replace(tokenizer, bos_token_id=7)
    try:
        answer = httpx.post(f"{url}/tokenize", json={"model": "tiny", "prompt": "one"}).json()
        assert answer["tokens"] == tokenizer.encode("one")  # a start token that the model does not begin with
        (choice,) = ask(client, prompt="one", return_token_ids=True).choices
        assert choice.prompt_token_ids == tokenizer.encode("one")
        llm.tokenizer = dataclasses.replace(tokenizer, bos_token_id=7, add_bos_token=True)
        for add in (True, False):
            own: Any = {"add_special_tokens": add}
            answer = httpx.post(f"{url}/tokenize", json={"model": "tiny", "prompt": "one", **own}).json()
            assert answer["tokens"] == llm.tokenizer.encode("one", add_bos=add)
        (choice,) = ask(client, prompt="one", return_token_ids=True, add_special_tokens=False).choices
        assert choice.prompt_token_ids == llm.tokenizer.encode("one", add_bos=False)
    finally:
        llm.tokenizer = tokenizer


def test_thinking_fields_reach_the_engine(served: Served, thinker: Served) -> None:
    for field in ("thinking_budget", "min_thinking_tokens", "think_waits"):
        answer = served.http.post("/v1/completions", json={"model": "scripted", "prompt": "x", field: 1})
        assert answer.status_code == 400  # this one does not reason
        assert "does not reason" in answer.json()["error"]["message"]
    fields = {"thinking_budget": 5, "min_thinking_tokens": 2, "think_waits": 1, "think_wait": "."}
    answer = thinker.http.post("/v1/completions", json={"model": "scripted", "prompt": "x", **fields})
    assert answer.status_code == 200, answer.text
    (params,) = thinker.engine.added.values()
    assert {name: getattr(params, name) for name in fields} == fields
    assert params.think_end == "</think>"


def test_tokens_and_back(url: str, twin: LLM) -> None:
    messages: Any = [{"role": "user", "content": "wheel \u00e9"}]
    by_text = httpx.post(f"{url}/tokenize", json={"model": "tiny", "prompt": "wheel", "return_token_strs": True}).json()
    assert by_text["tokens"] == twin.tokenizer.encode("wheel")
    assert by_text["count"] == len(by_text["token_strs"]) == 5
    assert by_text["max_model_len"] == twin.max_model_len
    chat = httpx.post(f"{url}/tokenize", json={"model": "tiny", "messages": messages}).json()
    assert chat["tokens"] == twin.renderer.render_prompt(messages)
    back = httpx.post(f"{url}/detokenize", json={"model": "tiny", "tokens": chat["tokens"]}).json()
    assert back["prompt"] == twin.tokenizer.decode(chat["tokens"], skip_special_tokens=False)
    for path, body, param in [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": messages}, "prompt"),
        ("/tokenize", {"prompt": "x", "tools": []}, "tools"),
        ("/tokenize", {"messages": messages, "add_special_tokens": True}, "add_special_tokens"),
        ("/detokenize", {"tokens": [5, 10**6]}, "tokens[1]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ]:
        answer = httpx.post(f"{url}{path}", json={"model": "tiny", **body})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": "x" * 300}, "prompt"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "structured_outputs": {}}, "structured_outputs"),
        ({"prompt": "x", "structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"prompt": "x", "structured_outputs": {"regex": "("}}, "structured_outputs"),
    ],
    ids=str,
)
def test_wrong_requests_are_told(url: str, fields: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{url}/v1/completions", json={"model": "tiny", **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].split(".")[0] == param

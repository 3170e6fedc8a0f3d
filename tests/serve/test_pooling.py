"""Embeddings, rerank, score and classify over HTTP: equal to the models in process, fields applied or refused."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from engine import helpers
from engine.classifiers import save_decoder, save_encoder, with_keys
from gristmill.engine.classifier import TextClassifier, load_servable
from gristmill.engine.llm import LLM
from gristmill.model.sentence import SentenceEncoder
from gristmill.serve.access.keys import create_key
from gristmill.serve.access.protection import Protection
from gristmill.serve.api import pooling
from gristmill.serve.app import create_app
from model.test_sentence import encoder, wordpiece
from serve.running import leave, running, wait_for
from serve.scripted_engine import ScriptedEngine, ScriptedLLM

TEXTS = ["It is raining.", "cat", "I need an umbrella.", "Cats sleep"]
CHAT = [{"role": "user", "content": "two and two"}, {"role": "assistant", "content": "make four"}]


class Served:
    """A server with a model of each kind."""

    def __init__(self, url: str, app: FastAPI, models: Mapping[str, Any]) -> None:
        self.app, self.models = app, models
        self.http = httpx.Client(base_url=url, timeout=20)
        self.openai: Any = None
        if find_spec("openai") is not None:  # the oldest-versions job leaves it out
            import openai

            self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def post(self, path: str, **body: Any) -> Any:
        """The parsed answer to a request that is served."""
        answer = self.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refused(self, path: str, **body: Any) -> Any:
        """The error of a request that is refused with 400."""
        # not json=, which cannot spell half of a surrogate pair
        answer = self.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        assert answer.status_code == 400, answer.text
        return answer.json()["error"]


def load(where: Path) -> dict[str, Any]:
    for name in ("embedder", "nested"):
        SentenceEncoder(encoder(), wordpiece()).save(where / name)
    with_keys(where / "nested", matryoshka_dimensions=[4, 8])
    paths = {
        "embedder": where / "embedder",
        "nested": where / "nested",
        "cross": save_encoder(where / "cross", "fits"),
        "moods": save_encoder(where / "moods", "bad", "fair", "good"),
        "reward": save_decoder(where / "reward", "reward"),
    }
    models = {name: load_servable(path) for name, path in paths.items()}
    models["chat"] = load_servable(helpers.save(where / "chat"), kv_cache_tokens=512)
    for name, model in models.items():
        model.model_name = name
    return models


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    models = load(tmp_path_factory.mktemp("models"))
    app = create_app(list(models.values()))
    with running(app) as url:
        found = Served(url, app, models)
        with found.http, found.openai or nullcontext():
            yield found


def floats(encoded: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(encoded), dtype="<f4")


@pytest.mark.peer
@pytest.mark.parametrize("name", ["embedder", "chat"])
def test_embeddings_are_those_of_the_model_bit_for_bit(served: Served, name: str) -> None:
    model: LLM = served.models[name]
    wanted = model.embed(TEXTS)
    found = served.openai.embeddings.create(model=name, input=TEXTS)  # which asks for base64
    assert [item.index for item in found.data] == [0, 1, 2, 3]
    assert np.array_equal(np.array([item.embedding for item in found.data], dtype=np.float32), wanted)
    tokens = sum(len(ids) for ids in model.embedding_ids(TEXTS))
    assert found.usage.model_dump() == {"prompt_tokens": tokens, "total_tokens": tokens}
    plain = served.post("/v1/embeddings", model=name, input=TEXTS)["data"]
    coded = served.post("/v1/embeddings", model=name, input=TEXTS, encoding_format="base64")["data"]
    assert [item["embedding"] for item in plain] == [floats(item["embedding"]).tolist() for item in coded]


def test_an_input_may_be_a_text_texts_ids_or_lists_of_ids(served: Served) -> None:
    ids = served.models["embedder"].embedding_ids(TEXTS)
    wanted = served.post("/v1/embeddings", model="embedder", input=TEXTS)
    assert served.post("/v1/embeddings", model="embedder", input=ids) == wanted
    one = served.post("/v1/embeddings", model="embedder", input=TEXTS[1])
    assert served.post("/v1/embeddings", model="embedder", input=ids[1]) == one
    assert one["object"] == "list"
    assert one["data"][0]["object"] == "embedding"
    assert one["data"][0]["embedding"] == pytest.approx(wanted["data"][1]["embedding"], abs=1e-6)


@pytest.mark.peer
def test_vectors_are_cut_only_where_the_model_was_trained_for_it(served: Served) -> None:
    whole = served.models["nested"].embed(TEXTS)
    for dimensions in (4, 8, 16):
        data = served.openai.embeddings.create(model="nested", input=TEXTS, dimensions=dimensions).data
        found = np.array([item.embedding for item in data])
        assert found.shape == (4, dimensions)
        assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
        cosines = (found * whole[:, :dimensions]).sum(1) / np.linalg.norm(whole[:, :dimensions], axis=1)
        assert np.allclose(cosines, 1, atol=1e-5)
    for name, dimensions in (("nested", 5), ("nested", 17), ("embedder", 8), ("chat", 8)):
        error = served.refused("/v1/embeddings", model=name, input="cat", dimensions=dimensions)
        assert error["param"] == "dimensions"
        assert "not made to be cut" in error["message"]
    assert served.post("/v1/embeddings", model="embedder", input="cat", dimensions=16)["data"]


@pytest.mark.parametrize("name", ["embedder", "chat"])
def test_a_long_input_is_refused_or_cut_as_asked(served: Served, name: str) -> None:
    model: LLM = served.models[name]
    long = "cat " * 200
    error = served.refused("/v1/embeddings", model=name, input=["cat", long])
    assert error["param"] == "input"
    assert "text 1 has" in error["message"]
    for asked, length in ((-1, model.max_input_len), (7, 7)):
        found = served.post("/v1/embeddings", model=name, input=long, truncate_prompt_tokens=asked)
        assert found["usage"]["prompt_tokens"] == length
        wanted = model.embed(model.embedding_ids([long], length))[0]
        assert np.array_equal(np.float32(found["data"][0]["embedding"]), wanted)
    for asked in (0, 10_000):
        error = served.refused("/v1/embeddings", model=name, input="cat", truncate_prompt_tokens=asked)
        assert error["param"] == "truncate_prompt_tokens"


@pytest.mark.parametrize("name", ["cross", "embedder", "chat"])
def test_rerank_puts_the_best_first(served: Served, name: str) -> None:
    model = served.models[name]
    query, documents = "it is rain", [*TEXTS, TEXTS[0]]
    if name == "cross":
        wanted = model.score([(query, document) for document in documents])
    else:
        wanted = (model.embed(documents) @ model.embed([query])[0]).tolist()
    found = served.post("/v1/rerank", model=name, query=query, documents=documents)
    scores = [item["relevance_score"] for item in found["results"]]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) > 1
    assert {item["index"]: item["relevance_score"] for item in found["results"]} == pytest.approx(
        dict(enumerate(wanted)), abs=1e-5
    )
    assert all(item["document"] == {"text": documents[item["index"]]} for item in found["results"])
    assert found["usage"]["total_tokens"] > len(documents)
    short = served.post(
        "/rerank",
        model=name,
        query=query,
        documents=[{"text": text} for text in documents],
        top_n=2,
        return_documents=False,
    )
    assert [item["index"] for item in short["results"]] == [item["index"] for item in found["results"]][:2]
    assert all(set(item) == {"index", "relevance_score"} for item in short["results"])


def test_scores_pair_one_with_one_one_with_each_or_each_with_its_own(served: Served) -> None:
    model: TextClassifier = served.models["cross"]
    shapes: list[tuple[Any, Any, list[tuple[str, str]]]] = [
        ("cat", "Cats sleep", [("cat", "Cats sleep")]),
        ("cat", TEXTS, [("cat", text) for text in TEXTS]),
        (["cat"], TEXTS, [("cat", text) for text in TEXTS]),
        (TEXTS, TEXTS[::-1], list(zip(TEXTS, TEXTS[::-1], strict=True))),
    ]
    for left, right, pairs in shapes:
        found = served.post("/v1/score", model="cross", text_1=left, text_2=right)
        assert [item["index"] for item in found["data"]] == list(range(len(pairs)))
        assert [item["score"] for item in found["data"]] == pytest.approx(model.score(pairs), abs=1e-6)
        assert (found["object"], found["data"][0]["object"]) == ("list", "score")
    same = served.post("/v1/score", model="embedder", text_1=TEXTS, text_2=TEXTS)
    assert [item["score"] for item in same["data"]] == pytest.approx([1.0] * 4, abs=1e-5)
    for left, right in ((TEXTS[:2], TEXTS), (TEXTS, "cat")):
        error = served.refused("/v1/score", model="cross", text_1=left, text_2=right)
        assert error["param"] == "text_1"
    error = served.refused("/v1/score", model="moods", text_1="cat", text_2="cat")
    assert "3 labels" in error["message"]
    cut = served.post("/v1/score", model="cross", text_1="it", text_2="cat " * 50, truncate_prompt_tokens=-1)
    assert cut["usage"]["prompt_tokens"] == 20
    assert served.refused("/v1/score", model="cross", text_1="it", text_2="cat " * 50)["param"] == "text_2"


def test_classify_tells_label_and_probabilities(served: Served) -> None:
    model: TextClassifier = served.models["moods"]
    for inputs, judged in (
        (TEXTS, TEXTS),
        (TEXTS[0], TEXTS[:1]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6, 7], [8]], [[5, 6, 7], [8]]),
        ({"text": "it", "text_pair": "cat"}, [("it", "cat")]),
        ([{"text": "it", "text_pair": "cat"}], [("it", "cat")]),
    ):
        wanted = model.classify(judged)  # type: ignore[arg-type]
        found = served.post("/v1/classify", model="moods", input=inputs)
        bare = served.post("/v1/classify", model="moods", input=inputs, use_activation=False)
        for index, (item, raw, one) in enumerate(zip(found["data"], bare["data"], wanted, strict=True)):
            assert (item["index"], item["label"], item["num_classes"]) == (index, one.label, 3)
            assert item["probs"] == pytest.approx(one.scores, abs=1e-6)
            assert sum(item["probs"]) == pytest.approx(1, abs=1e-6)
            assert raw["probs"] == pytest.approx(one.logits, abs=1e-6)
        tokens = sum(len(item.ids) for item in model.encode(judged))  # type: ignore[arg-type]
        assert found["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_a_reward_model_values_conversations(served: Served) -> None:
    model: TextClassifier = served.models["reward"]
    other = [CHAT[0], {"role": "assistant", "content": "once, twice"}]
    wanted = model.rewards([CHAT, other])  # type: ignore[list-item]
    found = served.post("/v1/classify", model="reward", messages=[CHAT, other])
    assert [item["probs"] for item in found["data"]] == [pytest.approx([value], abs=1e-6) for value in wanted]
    assert abs(wanted[0] - wanted[1]) > 1e-3
    one = served.post("/v1/classify", model="reward", messages=CHAT)
    assert one["data"][0]["probs"] == pytest.approx(wanted[:1], abs=1e-6)
    assert served.refused("/v1/classify", model="moods", messages=CHAT)["param"] == "messages"
    assert served.refused("/v1/classify", model="reward", messages=CHAT[:1])["param"] == "messages"
    long = [CHAT[0], {"role": "assistant", "content": "four " * 200}]
    error = served.refused("/v1/classify", model="reward", messages=[CHAT, long])
    assert error["param"] == "messages"
    assert "input 1 has" in error["message"]
    error = served.refused("/v1/classify", model="reward", messages=CHAT, truncate_prompt_tokens=5)
    assert error["param"] == "truncate_prompt_tokens"
    for body in ({}, {"input": "cat", "messages": CHAT}):
        assert served.refused("/v1/classify", model="reward", **body)["param"] == "input"


def test_a_model_of_another_kind_is_refused_with_the_names_of_those_that_can(served: Served) -> None:
    for path, name, body, able in (
        ("/v1/embeddings", "moods", {"input": "cat"}, ["embedder", "nested", "chat"]),
        ("/v1/classify", "chat", {"input": "cat"}, ["cross", "moods", "reward"]),
        ("/v1/classify", "embedder", {"input": "cat"}, ["cross", "moods", "reward"]),
    ):
        error = served.refused(path, model=name, **body)
        assert (error["param"], error["code"]) == ("model", "unsupported_model")
        assert ", ".join(able) in error["message"]
    nobody = served.http.post("/v1/embeddings", json={"model": "nobody", "input": "cat"})
    assert (nobody.status_code, nobody.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"input": "cat", "encoding": "float"}, "encoding"),
        ("/v1/embeddings", {"input": "cat", "encoding_format": "int8"}, "encoding_format"),
        ("/v1/embeddings", {"input": "cat", "dimensions": 0}, "dimensions"),
        ("/v1/embeddings", {"input": "cat", "dimensions": "8"}, "dimensions"),
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": None}, "input"),
        ("/v1/embeddings", {"input": ""}, "input"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": ["cat", ""]}, "input[1]"),
        ("/v1/embeddings", {"input": ["cat", 1]}, "input[1]"),
        ("/v1/embeddings", {"input": [1, "cat"]}, "input[1]"),
        ("/v1/embeddings", {"input": [[1], []]}, "input[1]"),
        ("/v1/embeddings", {"input": {"text": "cat"}}, "input"),
        ("/v1/embeddings", {"input": ["cat"] * 2049}, "input"),
        ("/v1/embeddings", {"input": "\ud800"}, "input"),
        ("/v1/embeddings", {"input": [99]}, "input"),
        ("/v1/embeddings", {"input": [2**40]}, "input[0]"),
        ("/v1/embeddings", {"input": [True]}, "input[0]"),
        ("/v1/rerank", {"query": "cat", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "cat", "documents": ["cat", {"body": "x"}]}, "documents[1].body"),
        ("/v1/rerank", {"query": "cat", "documents": ["cat"], "top_n": 0}, "top_n"),
        ("/v1/rerank", {"query": "cat", "documents": ["cat"], "max_chunks_per_doc": 2}, "max_chunks_per_doc"),
        ("/v1/rerank", {"query": "cat", "documents": ["cat", "cat " * 50]}, "documents"),
        ("/v1/score", {"text_1": "cat", "text_2": []}, "text_2"),
        ("/v1/score", {"text_1": "cat"}, "text_2"),
        ("/v1/classify", {"input": [{"text": "cat"}]}, "input[0].text_pair"),
        ("/v1/classify", {"input": "cat", "activation": False}, "activation"),
        ("/v1/classify", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("/v1/classify", {"messages": [[]]}, "messages[0]"),
    ],
)
def test_what_is_wrong_is_refused_by_name(served: Served, path: str, body: dict[str, Any], param: str) -> None:
    model = "moods" if path == "/v1/classify" else "embedder"
    assert served.refused(path, model=model, **body)["param"] == param


def test_a_null_is_an_absent_field(served: Served) -> None:
    body = {"model": "embedder", "input": "cat"}
    nulls = dict.fromkeys(("encoding_format", "dimensions", "truncate_prompt_tokens", "user"))
    assert served.post("/v1/embeddings", **body, **nulls) == served.post("/v1/embeddings", **body, user="me")


def test_the_schema_describes_bodies_and_answers(served: Served) -> None:
    document = served.http.get("/openapi.json").json()
    for path, fields in {
        "/v1/embeddings": {"input", "encoding_format", "dimensions"},
        "/v1/rerank": {"query", "documents", "top_n", "return_documents"},
        "/v1/score": {"text_1", "text_2"},
        "/v1/classify": {"input", "messages", "use_activation"},
    }.items():
        operation = document["paths"][path]["post"]
        body = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        schema = document["components"]["schemas"][body]
        assert set(schema["properties"]) == fields | {"model", "truncate_prompt_tokens", "user"}
        assert schema["additionalProperties"] is False
        assert operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]


def test_a_client_that_leaves_ends_its_request_and_others_go_between(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: LLM = served.models["embedder"]
    gate, calls, embed = threading.Event(), [], model.embed

    def slow(texts: Any, **options: Any) -> np.ndarray:
        calls.append(len(texts))
        gate.wait(60)
        return embed(texts, **options)

    monkeypatch.setattr(pooling, "SLICE_TOKENS", 12)
    monkeypatch.setattr(model, "embed", slow)
    long = {"model": "embedder", "input": ["cat"] * 40}
    leave(str(served.http.base_url), "/v1/embeddings", long, when=lambda: calls)
    wait_for(lambda: served.app.state.traffic.left["embedder"])
    gate.set()
    found = served.post("/v1/embeddings", model="embedder", input=["cat"] * 10)
    assert len(found["data"]) == 10
    assert calls == [4, 4, 4, 2]  # one piece of the first request, then the second one's


def test_tokens_count_against_the_key_and_other_keys_models_stay_unnamed(served: Served, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    secret = create_key(keys, "ann", tokens_per_day=100, models=["embedder", "moods"])
    models = [served.models[name] for name in ("embedder", "nested", "moods")]
    app = create_app(models, protection=Protection(keys=keys))
    headers = {"authorization": f"Bearer {secret}"}
    with running(app) as url, httpx.Client(base_url=url, headers=headers, timeout=20) as http:
        answer = http.post("/v1/embeddings", json={"model": "embedder", "input": ["cat"] * 20})
        assert answer.json()["usage"]["total_tokens"] == 60
        left = http.get("/v1/engine").headers["x-ratelimit-remaining-tokens"]
        assert int(left) == 40
        assert http.post("/v1/embeddings", json={"model": "embedder", "input": ["cat"] * 20}).status_code == 429
        error = http.post("/v1/classify", json={"model": "embedder", "input": "cat"}).json()["error"]
        assert error["message"].endswith("those that can: moods")
        error = http.post("/v1/embeddings", json={"model": "moods", "input": "cat"}).json()["error"]
        assert error["message"].endswith("those that can: embedder")
        assert app.state.traffic.tokens["embedder", "prompt"] == 60


def test_a_model_that_only_generates_is_told_from_one_that_embeds_too() -> None:
    with running(create_app(ScriptedLLM(ScriptedEngine()))) as url:
        answer = httpx.post(f"{url}/v1/embeddings", json={"model": "scripted", "input": "cat"})
    assert answer.status_code == 400
    assert "no model of this server can" in answer.json()["error"]["message"]


@pytest.mark.asset
@pytest.mark.peer
def test_a_real_encoder_through_the_openai_client() -> None:
    import openai

    model = load_servable("all-minilm-l6-v2")
    model.model_name = "minilm"
    texts = ["A cat sleeps on the sofa.", "The kitten naps on the couch.", "Interest rates rose again."]
    with running(create_app(model)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        data = client.embeddings.create(model="minilm", input=texts).data
        plain = client.embeddings.create(model="minilm", input=texts, encoding_format="float").data
        ranked = client.post(
            "/rerank", body={"model": "minilm", "query": texts[0], "documents": texts[1:]}, cast_to=httpx.Response
        ).json()
    vectors = np.array([item.embedding for item in data], dtype=np.float32)
    assert isinstance(model, LLM)
    assert np.array_equal(vectors, model.embed(texts))
    assert [item.embedding for item in plain] == [item.embedding for item in data]
    assert [item["index"] for item in ranked["results"]] == [0, 1]
    assert ranked["results"][0]["relevance_score"] > 0.5 > ranked["results"][1]["relevance_score"] + 0.3


def test_a_long_request_outlives_the_unloading_of_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_servable(save_encoder(tmp_path / "moods", "bad", "good"))
    model.model_name = "moods"
    monkeypatch.setattr(pooling, "SLICE_TOKENS", 1)
    begun, go = threading.Event(), threading.Event()
    judge = model.judge

    def slowly(items: Any) -> Any:
        begun.set()
        assert go.wait(20)
        return judge(items)

    monkeypatch.setattr(model, "judge", slowly)
    with running(create_app([model])) as url, httpx.Client(base_url=url, timeout=20) as http:
        answers: list[httpx.Response] = []
        body = {"model": "moods", "input": TEXTS}
        reader = threading.Thread(target=lambda: answers.append(http.post("/v1/classify", json=body)))
        reader.start()
        assert begun.wait(10)
        unloading = threading.Thread(target=lambda: http.post("/v1/models/unload", json={"model": "moods"}))
        unloading.start()
        wait_for(lambda: not http.get("/v1/models").json()["data"])
        go.set()
        reader.join(10)
        unloading.join(10)
        assert answers[0].status_code == 200, answers[0].text
        assert len(answers[0].json()["data"]) == len(TEXTS)


@pytest.mark.parametrize(("drain_seconds", "statuses"), [(0, [200, 503]), (20, [200, 200])])
def test_a_closing_server_answers_those_that_wait_for_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drain_seconds: int, statuses: list[int]
) -> None:
    model = load_servable(save_encoder(tmp_path / "moods", "bad", "good"))
    model.model_name = "moods"
    begun, go, judge = threading.Event(), threading.Event(), model.judge

    def slowly(items: Any) -> Any:
        begun.set()
        assert go.wait(20)
        return judge(items)

    monkeypatch.setattr(model, "judge", slowly)
    app, answers = create_app([model]), list[httpx.Response]()

    def ask(url: str) -> None:
        answers.append(httpx.post(f"{url}/v1/classify", json={"model": "moods", "input": "x"}, timeout=20))

    def open_the_gate() -> None:
        wait_for(lambda: app.state.host._closing if drain_seconds else not hosted.is_running)
        go.set()

    with running(app, drain_seconds) as url:
        readers = [threading.Thread(target=ask, args=(url,)) for _ in range(2)]
        readers[0].start()
        assert begun.wait(10)
        readers[1].start()
        hosted = app.state.host.find("moods").hosted
        wait_for(lambda: app.state.traffic.running["moods"] == 2 and hosted._thread._work_queue.qsize())
        opening = threading.Thread(target=open_the_gate)
        opening.start()
    for reader in readers:
        reader.join(10)
    opening.join(10)
    assert sorted(answer.status_code for answer in answers) == statuses, [answer.text for answer in answers]

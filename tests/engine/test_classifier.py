"""Classifiers, cross-encoders and reward models, against a forward of each input alone and against transformers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.family import randomise
from engine import helpers
from engine.classifiers import save_decoder, save_encoder, with_keys
from gristmill.engine.classifier import TextClassifier, load_servable
from gristmill.engine.llm import LLM
from gristmill.errors import CheckpointError, DataError, RequestError
from gristmill.model.config import AttentionConfig
from gristmill.model.formats.huggingface import load_huggingface, save_huggingface
from gristmill.model.heads import HeadConfig, Headed
from gristmill.model.sentence import SentenceEncoder
from gristmill.model.transformer import Stack
from gristmill.tokens.renderer import JinjaRenderer
from model import tiny
from model.test_sentence import encoder, wordpiece

TEXTS = ["It is raining.", "cat", "I need an umbrella. " * 2, "Cats sleep", "cat cat"]
PAIRS = [("It is raining.", "I need an umbrella."), ("cat", "Cats sleep"), ("cats", "rain")]
CHATS: Any = [
    [{"role": "user", "content": "two and two"}, {"role": "assistant", "content": "make four"}],
    [{"role": "user", "content": "the river"}, {"role": "assistant", "content": "runs to the far sea"}],
]


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    return save_encoder(tmp_path, "bad", "fair", "good")


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    return save_decoder(tmp_path, "reward")


@pytest.fixture(scope="module")
def shared_reward(tmp_path_factory: pytest.TempPathFactory) -> TextClassifier:
    return TextClassifier.load(save_decoder(tmp_path_factory.mktemp("reward"), "reward"))


@pytest.fixture(scope="module")
def shared_cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> TextClassifier:
    return TextClassifier.load(save_encoder(tmp_path_factory.mktemp("cross"), "fits"))


@torch.inference_mode()
def alone(model: TextClassifier, ids: list[int], types: list[int]) -> torch.Tensor:
    """The module's own forward of one input."""
    kinds = torch.tensor([types]) if model.network.config.embedding.token_types else None
    found = model.network(torch.tensor([ids]), token_type_ids=kinds)
    assert isinstance(found, torch.Tensor)
    return found[0]


def test_a_batch_gives_what_each_input_alone_gives(classes: Path) -> None:
    model = TextClassifier.load(classes)
    inputs: list[Any] = [*TEXTS, *PAIRS, [2, 7, 8, 3]]
    found = model.classify(inputs)
    assert model.labels == ("bad", "fair", "good")
    spread = torch.tensor([each.logits for each in found]).std()
    for each, item in zip(found, model.encode(inputs), strict=True):
        logits = alone(model, item.ids, item.types)
        assert torch.allclose(torch.tensor(each.logits), logits, atol=1e-5)
        assert spread > 0.01
        assert torch.allclose(torch.tensor(each.scores), logits.softmax(dim=-1), atol=1e-5)
        assert each.label == model.labels[int(logits.argmax())]
    assert model.classify([]) == []


def test_pairs_are_framed_as_the_model_was_trained(classes: Path) -> None:
    model = TextClassifier.load(classes)
    (ids, types), (given_ids, _) = model.encode([("it is", "rain ."), [5, 6]])
    assert ids == [2, 5, 6, 3, 7, 9, 3]
    assert types == [0, 0, 0, 0, 1, 1, 1]
    assert given_ids == [5, 6]


@pytest.mark.parametrize(
    ("labels", "decoder", "keys", "problem"),
    [
        (2, False, {}, "single_label"),
        (2, True, {}, "single_label"),
        (1, False, {}, "multi_label"),
        (1, True, {}, "regression"),
        (3, False, {"problem_type": "multi_label_classification"}, "multi_label"),
        (1, False, {"problem_type": "regression"}, "regression"),
        (1, False, {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, "regression"),
        (1, True, {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, "multi_label"),
        (3, False, {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, "single_label"),
        (1, False, {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, "regression"),
    ],
)
def test_what_the_logits_become_is_the_checkpoints_choice(
    tmp_path: Path, labels: int, decoder: bool, keys: dict[str, Any], problem: str
) -> None:
    save = save_decoder if decoder else save_encoder
    model = TextClassifier.load(save(tmp_path, *(f"l{index}" for index in range(labels)), **keys))
    assert model.problem == problem
    found = model.classify(["cat"])[0]
    logits = torch.tensor(found.logits)
    wanted = {"single_label": logits.softmax(0), "multi_label": logits.sigmoid(), "regression": logits}[problem]
    assert torch.allclose(torch.tensor(found.scores), wanted)


@pytest.mark.parametrize(
    "keys", [{"problem_type": "ranking"}, {"sentence_transformers": {"activation_fn": "torch.nn.modules.Tanh"}}]
)
def test_an_unknown_activation_is_refused_by_name(tmp_path: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"(problem_type = .*ranking|activation_fn = .*Tanh)"):
        TextClassifier.load(save_encoder(tmp_path, "yes", **keys))


def test_settings_of_todays_sentence_transformers_are_read(tmp_path: Path) -> None:
    path = save_encoder(tmp_path, "fits") / "config_sentence_transformers.json"
    path.write_text('{"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.linear.Identity"}')
    assert TextClassifier.load(tmp_path).problem == "regression"
    path.write_text('{"default_prompt_name": "query", "prompts": {"query": "find: "}}')
    with pytest.raises(CheckpointError, match="default_prompt_name"):
        TextClassifier.load(tmp_path)


def test_a_score_needs_one_label(tmp_path: Path, classes: Path) -> None:
    model = TextClassifier.load(save_encoder(tmp_path / "cross", "fits"))
    scores = model.score(PAIRS)
    assert scores == [found.scores[0] for found in model.classify(PAIRS)]
    assert all(0 < score < 1 for score in scores)
    with pytest.raises(RequestError, match="3 labels") as caught:
        TextClassifier.load(classes).score(PAIRS)
    assert caught.value.field == "model"


def test_a_reward_is_read_at_the_last_token_that_is_no_padding(reward: Path) -> None:
    model, end = TextClassifier.load(reward), helpers.tokenizer().eos_token_id
    assert end is not None
    ids = helpers.prompt(9)
    plain, padded, only = model.classify([ids, [*ids, end, end], [end]])
    assert plain.logits == pytest.approx(padded.logits, abs=1e-5)
    assert plain.scores == plain.logits
    assert only.logits == pytest.approx(alone(model, [end], []).tolist(), abs=1e-5)
    inner = model.classify([[end, *ids]])[0]
    assert inner.logits == pytest.approx(alone(model, [end, *ids], []).tolist(), abs=1e-5)
    assert abs(inner.logits[0] - plain.logits[0]) > 1e-3


def test_messages_are_rendered_with_the_models_own_template(reward: Path) -> None:
    model = TextClassifier.load(reward)
    rendered = [JinjaRenderer(helpers.tokenizer()).render(chat).token_ids for chat in CHATS]
    assert [item.ids for item in model.encode_chats(CHATS)] == rendered
    wanted = [alone(model, ids, []).item() for ids in rendered]
    assert model.rewards(CHATS) == pytest.approx(wanted, abs=1e-5)
    assert abs(wanted[0] - wanted[1]) > 1e-3
    with pytest.raises(DataError, match="assistant"):
        model.rewards([CHATS[0][:1]])


def test_without_a_template_messages_are_refused(classes: Path) -> None:
    with pytest.raises(RequestError, match="no chat template") as caught:
        TextClassifier.load(classes).encode_chats(CHATS)
    assert caught.value.field == "messages"


def test_long_inputs_are_refused_or_cut_as_asked(classes: Path) -> None:
    model = TextClassifier.load(classes)
    long = "cat " * 30
    with pytest.raises(RequestError, match="input 1 has 32 tokens, the model reads 20") as caught:
        model.encode(["cat", long])
    assert (caught.value.field, caught.value.code) == ("inputs", "context_length_exceeded")
    text, pair, ids = model.encode([long, ("it is", long), [7] * 30], max_tokens=10)
    assert text.ids == [2, *[14] * 8, 3]
    assert pair.ids == [2, 5, 6, 3, *[14] * 5, 3]
    assert pair.types == [0] * 4 + [1] * 6
    assert ids.ids == [7] * 10
    for limit, pairs in ((0, TEXTS), (21, TEXTS), (2, TEXTS), (3, PAIRS)):
        with pytest.raises(RequestError) as caught:
            model.encode(pairs, max_tokens=limit)
        assert caught.value.field == "max_tokens"


def test_what_is_no_input_is_refused(classes: Path) -> None:
    model = TextClassifier.load(classes)
    for wrong, message in ((["cat", []], "input 1 has no token"), ([[5, 17]], "17"), ([[-1]], "-1"), ("cat", "list")):
        with pytest.raises(RequestError, match=message) as caught:
            model.classify(wrong)  # type: ignore[arg-type]
        assert caught.value.field == "inputs"
    with pytest.raises(DataError, match=r"text 1 .*surrogate"):
        model.classify(["cat", "\ud800"])


@settings(max_examples=20)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_neighbours_in_a_batch_change_nothing(shared_reward: TextClassifier, batch: list[str], random: Any) -> None:
    model = shared_reward
    texts = ["the river", *batch]
    wanted = {
        text: found.logits[0] for text, found in zip(texts, model.classify([f"{t}." for t in texts]), strict=True)
    }
    random.shuffle(texts)
    for text in texts:
        assert model.classify([f"{text}."])[0].logits[0] == pytest.approx(wanted[text], abs=1e-4)


def test_a_name_decides_what_is_loaded(tmp_path: Path) -> None:
    judge = load_servable(save_encoder(tmp_path / "judge", "yes"), kv_cache_dtype=None)
    assert isinstance(judge, TextClassifier)
    generator = load_servable(helpers.save(tmp_path / "generator"), kv_cache_tokens=64)
    SentenceEncoder(encoder(), wordpiece()).save(tmp_path / "encoder")
    embedder = load_servable(tmp_path / "encoder")
    assert isinstance(generator, LLM)
    assert isinstance(embedder, LLM)
    assert (judge.kind, generator.kind, embedder.kind) == ("classify", "generate", "embed")
    with pytest.raises(RequestError, match="is a classifier") as caught:
        load_servable(tmp_path / "judge", kv_cache_tokens=64)
    assert caught.value.field == "kv_cache_tokens"


def test_checkpoints_that_do_not_judge_are_refused(tmp_path: Path, classes: Path) -> None:
    with pytest.raises(CheckpointError, match="not a classifier"):
        TextClassifier.load(helpers.save(tmp_path / "generator"))
    (classes / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        TextClassifier.load(classes)
    headless = with_keys(helpers.save(tmp_path / "headless"), architectures=["LlamaForSequenceClassification"])
    with pytest.raises(CheckpointError, match="score"):
        TextClassifier.load(headless)
    with pytest.raises(CheckpointError, match="not a model that generates"):
        LLM(save_decoder(tmp_path / "reward", "reward"))


def save_family(directory: Path, model_type: str) -> Headed:
    attention = {"qwen2": AttentionConfig(qkv_bias=True), "qwen3": AttentionConfig(qk_norm="head")}
    config = dataclasses.replace(tiny.CONFIG, attention=attention.get(model_type, AttentionConfig()))
    model = Headed(Stack(config), HeadConfig(kind="sequence_classifier", labels=("a", "b"), pooling="last", bias=False))
    save_huggingface(randomise(model), directory, prefer=model_type)
    assert json.loads((directory / "config.json").read_text())["model_type"] == model_type
    return model


IDS = torch.tensor([helpers.prompt(9)])


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_decoders_with_a_head_are_written_and_read_back(tmp_path: Path, model_type: str) -> None:
    model = save_family(tmp_path, model_type)
    assert torch.equal(load_huggingface(tmp_path, torch.float32)(IDS), model(IDS))


@pytest.mark.peer
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@torch.inference_mode()
def test_decoders_with_a_head_are_those_of_transformers(tmp_path: Path, model_type: str) -> None:
    from transformers import AutoModelForSequenceClassification

    model = save_family(tmp_path, model_type)
    wanted = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()(IDS).logits
    assert torch.allclose(model(IDS), wanted, atol=1e-4)


@pytest.mark.peer
@pytest.mark.parametrize("save", [save_encoder, save_decoder], ids=["encoder", "decoder"])
@pytest.mark.parametrize("labels", [1, 3])
def test_logits_are_those_of_transformers_with_its_own_padding_and_tokenizer(
    tmp_path: Path, save: Any, labels: int
) -> None:
    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

    directory = save(tmp_path, *(f"l{index}" for index in range(labels)))
    theirs = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    model = TextClassifier.load(directory)
    for inputs in (TEXTS, PAIRS):
        columns: Any = [inputs] if inputs is TEXTS else zip(*inputs, strict=True)
        types = save is save_encoder
        batch = tokenizer(*columns, padding=True, return_tensors="pt", return_token_type_ids=types)
        with torch.inference_mode():
            wanted = theirs(**batch).logits
        found = torch.tensor([each.logits for each in model.classify(inputs)])
        assert wanted.std() > 0.01
        assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.peer
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 25), st.integers(1, 25), st.integers(5, 20))
def test_pairs_are_cut_as_transformers_cuts_them(
    shared_cross_encoder: TextClassifier, first: int, second: int, limit: int
) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=wordpiece().backend)
    pair = ("cat " * first, "it " * second)
    wanted = theirs(*pair, truncation="longest_first", max_length=limit)["input_ids"]
    assert shared_cross_encoder.encode([pair], max_tokens=limit)[0].ids == wanted


@pytest.mark.peer
@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "Roberta", "pad_token_id": 0},
        {"kind": "XLMRoberta", "pad_token_id": 1},
        {"kind": "DistilBert", "intermediate_size": None, "hidden_dim": 24},
        {"kind": "Electra", "embedding_size": 16},
        {"kind": "Albert", "embedding_size": 12},
        {"kind": "ModernBert", "classifier_pooling": "mean"},
    ],
    ids=lambda changes: changes["kind"],
)
def test_other_encoders_judge_as_in_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    import transformers

    kind = changes.pop("kind")
    sizes = {"vocab_size": 17, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_labels": 3}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 40}
    values = {name: value for name, value in (sizes | tokens | heads | changes).items() if value is not None}
    config = getattr(transformers, f"{kind}Config")(**values)
    theirs = randomise(getattr(transformers, f"{kind}ForSequenceClassification")(config))
    theirs.save_pretrained(tmp_path)
    wordpiece().save(tmp_path)
    lists = [[2, 7, 8, 9, 3], [2, 14, 3], [2, *[10, 11] * 6, 3]]
    found = TextClassifier.load(tmp_path).classify(lists)
    with torch.inference_mode():
        wanted = torch.cat([theirs(torch.tensor([ids])).logits for ids in lists])
    assert wanted.std() > 0.01
    assert torch.allclose(torch.tensor([each.logits for each in found]), wanted, atol=1e-4)

"""BERT: packing, pairs, and two losses in one."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conformance.encoder_family import build_twin
from gristmill.corpus.loader import ExampleLoader
from gristmill.errors import CheckpointError, DataError, RequestError
from gristmill.model.config import EmbeddingConfig
from gristmill.model.formats.huggingface import load_huggingface
from gristmill.objectives.bert import BertPretraining
from gristmill.objectives.pairs import IS_NEXT, NOT_NEXT, SentencePair, SentencePairs, pack_pair, pack_single
from gristmill.train.config import TrainConfig
from gristmill.train.loop import train
from objectives.cases_encoder import CONFIG, MASKED_HEAD, PRETRAINING_HEAD, SIZE, VOCABULARY, Words, headed, pair

RAIN = Words("It is raining . I need an umbrella . The cat sleeps on the windowsill Apples grow trees")
BERT = BertPretraining(VOCABULARY)


def prepared(objective: BertPretraining, numbers: range) -> Any:
    return objective.prepare([pair(n) for n in numbers], [(0, n) for n in numbers])


def test_pairs_and_single_texts_are_packed_as_bert_reads_them() -> None:
    ids, types = pack_pair(RAIN.ids("It is raining ."), RAIN.ids("I need an umbrella ."), RAIN.vocabulary)
    assert RAIN.text(ids) == "[CLS] It is raining . [SEP] I need an umbrella . [SEP]"
    assert types.tolist() == [0] * 6 + [1] * 6
    ids, types = pack_single(RAIN.ids("It is raining ."), RAIN.vocabulary)
    assert RAIN.text(ids) == "[CLS] It is raining . [SEP]"
    assert types.tolist() == [0] * 6
    other = pack_pair(
        RAIN.ids("The cat sleeps on the windowsill ."), RAIN.ids("Apples grow on trees ."), RAIN.vocabulary
    )
    assert len(other.ids) == 7 + 5 + 3
    batch = BertPretraining(RAIN.vocabulary).prepare(
        [SentencePair(RAIN.ids("It is raining ."), RAIN.ids("I need an umbrella ."), IS_NEXT)], [(0,)]
    )
    assert batch.tokens == 12
    assert batch.position_ids.tolist() == list(range(12))
    assert batch.token_type_ids is not None
    assert batch.token_type_ids.tolist() == [0] * 6 + [1] * 6


@pytest.mark.peer
def test_packing_is_that_of_transformers() -> None:
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(RAIN.words)}, do_lower_case=False)
    first, second = "It is raining .", "I need an umbrella ."
    both, one = tokenizer(first, second), tokenizer(first)
    packed = pack_pair(RAIN.ids(first), RAIN.ids(second), RAIN.vocabulary)
    assert both["input_ids"] == packed.ids.tolist()
    assert both["token_type_ids"] == packed.token_type_ids.tolist()
    assert one["input_ids"] == pack_single(RAIN.ids(first), RAIN.vocabulary).ids.tolist()


def corpus(documents: int = 40) -> list[list[list[int]]]:
    """Every sentence is another: its document, its number in it, and up to five more tokens."""
    return [[[1000 + d, 100 + n, *range(n % 6)] for n in range(3 + d % 7)] for d in range(documents)]


def places(ids: np.ndarray) -> list[tuple[int, int]]:
    """(document, number) of the sentences of a text."""
    return [(int(a) - 1000, int(b) - 100) for a, b in itertools.pairwise(ids) if a >= 1000]


@pytest.mark.parametrize("max_tokens", [None, 24])
def test_wrong_second_parts_are_as_many_as_asked_for_and_never_what_follows(max_tokens: int | None) -> None:
    documents = corpus(400)
    pairs = SentencePairs(documents, seed=1, wrong=0.3, max_tokens=max_tokens)
    wrong = 0
    for example in pairs:
        first, second = places(example.first), places(example.second)
        document, last = first[-1]
        assert [n for _, n in first] == list(range(first[0][1], last + 1))
        assert max_tokens is None or len(example.first) + len(example.second) <= max_tokens
        if example.label == IS_NEXT:
            assert second[0] == (document, last + 1)
        else:
            assert second[0][0] != document
            wrong += 1
    assert abs(wrong / len(pairs) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / len(pairs))
    if max_tokens is not None:  # nothing is left out: all sentences are in pairs, were there no wrong ones
        everything = SentencePairs(documents, seed=1, wrong=0.0, max_tokens=max_tokens)
        found = {place for example in everything for part in (example.first, example.second) for place in places(part)}
        assert found == {(d, n) for d, sentences in enumerate(documents) for n in range(len(sentences))}


def test_pairs_follow_from_the_seed() -> None:
    def spelled(seed: int, **options: Any) -> list[Any]:
        return [(p.first.tolist(), p.second.tolist(), p.label) for p in SentencePairs(corpus(), seed=seed, **options)]

    assert spelled(0) == spelled(0) != spelled(1)
    straight, swapped = spelled(0, task="order", wrong=0.0), spelled(0, task="order", wrong=1.0)
    assert [(b, a, NOT_NEXT) for a, b, _ in straight] == swapped
    assert {label for *_, label in straight} == {IS_NEXT}


def test_documents_that_give_no_pairs_are_refused() -> None:
    with pytest.raises(DataError, match="no document has two sentences"):
        SentencePairs([[[1]], [[2]]], seed=0)
    with pytest.raises(DataError, match="document 1, sentence 0 has no tokens"):
        SentencePairs([[[1]], [[]]], seed=0)
    with pytest.raises(DataError, match="found no text of another place"):
        list(SentencePairs([[[1], [1]], [[1]]], seed=0, wrong=1.0))
    with pytest.raises(DataError, match="sentences 0 and 1 have more than 3 tokens together"):
        SentencePairs([[[1, 2], [3, 4]]], seed=0, max_tokens=3)
    alone = SentencePairs([[[1], [2], [3]]], seed=0, wrong=1.0)  # one document: another place in it
    assert all(place.second.tolist() != [int(place.first[-1]) + 1] for place in alone)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    from transformers import BertConfig

    sizes = {"vocab_size": SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    twin = build_twin("BertForPreTraining", BertConfig(**sizes, num_attention_heads=4))
    path = tmp_path_factory.mktemp("bert")
    twin.save_pretrained(path)
    return twin, load_huggingface(path, torch.float32)


def rows(batch: Any, value: torch.Tensor, padding: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(value.split(batch.segment_lengths), batch_first=True, padding_value=padding)


@pytest.mark.peer
@torch.no_grad()
def test_joint_loss_is_that_of_transformers(twins: tuple[Any, Any]) -> None:
    twin, model = twins
    batch = prepared(BERT, range(6))
    sums, counts = BERT.loss_sums(model, batch), BERT.counts(batch)
    inputs = {
        "input_ids": rows(batch, batch.input_ids, 0),
        "token_type_ids": rows(batch, batch.token_type_ids, 0),
        "attention_mask": rows(batch, torch.ones_like(batch.input_ids), 0),
    }
    labels = rows(batch, batch.target_ids, -100)
    theirs = twin(**inputs, labels=labels, next_sentence_label=batch.labels)
    ours = sum(float(sums[name]) / counts[name] for name in sums)
    assert ours == pytest.approx(float(theirs.loss), rel=1e-5)
    pairs = torch.nn.functional.cross_entropy(theirs.seq_relationship_logits, batch.labels)
    assert float(sums["pair"]) / 6 == pytest.approx(float(pairs), rel=1e-5)


@pytest.mark.peer
@torch.no_grad()
def test_pair_loss_is_that_of_next_sentence_prediction(twins: tuple[Any, Any]) -> None:
    from transformers import BertForNextSentencePrediction

    twin, model = twins
    nsp = BertForNextSentencePrediction(twin.config).eval()
    nsp.load_state_dict(twin.state_dict(), strict=False)
    batch = prepared(BERT, range(1))
    theirs = nsp(batch.input_ids[None], token_type_ids=batch.token_type_ids[None], labels=batch.labels)
    assert float(BERT.loss_sums(model, batch)["pair"]) == pytest.approx(float(theirs.loss), rel=1e-5)


@torch.no_grad()
def test_without_the_pair_the_masked_loss_is_the_same_and_no_weights_are_for_it() -> None:
    full, plain = headed(PRETRAINING_HEAD), headed(MASKED_HEAD)
    plain.load_state_dict(full.state_dict(), strict=False)
    alone = BertPretraining(VOCABULARY, pair=False)
    both, one = prepared(BERT, range(5)), prepared(alone, range(5))
    assert torch.equal(both.input_ids, one.input_ids)
    assert one.labels is None
    for model in (full, plain):
        found = alone.loss_sums(model, one)
        assert list(found) == ["masked_lm"]
        assert torch.equal(found["masked_lm"], BERT.loss_sums(full, both)["masked_lm"])
    size = CONFIG.hidden_size
    assert full.count_parameters() - plain.count_parameters() == size * size + size + 2 * size + 2
    with pytest.raises(CheckpointError, match="kind pretraining, got a head of kind 'masked_lm'"):
        BERT.loss_sums(plain, both)
    bare = headed(PRETRAINING_HEAD, replace(CONFIG, embedding=EmbeddingConfig(norm=True, token_types=1)))
    with pytest.raises(RequestError, match="uses 2 token types, the model has 1"):
        BERT.loss_sums(bare, both)


@torch.no_grad()
def test_an_undecided_model_loses_log_two_a_pair() -> None:
    model, batch = headed(PRETRAINING_HEAD), prepared(BERT, range(3))
    for parameter in model.head.pair.parameters():  # type: ignore[union-attr]
        parameter.zero_()
    assert float(BERT.loss_sums(model, batch)["pair"]) / 3 == pytest.approx(math.log(2))


def weights(directory: Path, steps: tuple[int, ...], *, pairs: bool = True) -> tuple[torch.Tensor, int]:
    """Weights of a run that is stopped after these steps and goes on, and its tokens."""
    objective = BertPretraining(VOCABULARY, pair=pairs)
    documents = [[[5 + (d + n + i) % 50 for i in range(4)] for n in range(4)] for d in range(12)]
    examples = SentencePairs(documents, seed=0)
    loader = ExampleLoader(examples, examples_per_batch=4, seed=0, prepare=objective.prepare)
    for end in steps:
        model = headed(PRETRAINING_HEAD if pairs else MASKED_HEAD)
        config = TrainConfig(steps=end, schedule="constant", warmup=0.0, micro_batches=2)
        position = train(model, objective, loader, config, directory)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), position.tokens


def test_a_run_repeats_itself_and_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    whole, tokens = weights(tmp_path / "a", (6,))
    assert torch.equal(whole, weights(tmp_path / "b", (6,))[0])
    assert torch.equal(whole, weights(tmp_path / "c", (3, 6))[0])
    assert weights(tmp_path / "d", (6,), pairs=False)[1] == tokens  # the budget of an ablation is the same

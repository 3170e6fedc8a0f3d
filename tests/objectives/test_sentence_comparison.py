"""Sentence comparison and token classification."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F

from conformance.encoder_family import build_twin
from gristmill.errors import CheckpointError, DataError
from gristmill.model.formats.huggingface import load_huggingface
from gristmill.model.heads import HeadConfig
from gristmill.objectives.encoder_batch import encoder_states, segment_vectors
from gristmill.objectives.sentence_comparison import ScoredPair, SentenceComparison
from gristmill.objectives.token_classification import LabelledTokens, TokenClassification
from gristmill.tokens.batch import IGNORED
from objectives.cases_encoder import SIZE, VOCABULARY, Words, encoder, headed, labelled, words


def batch_of(objective: SentenceComparison, *pairs: tuple[list[int], list[int]]) -> Any:
    return objective.prepare([ScoredPair(a, b, 0.5) for a, b in pairs], [(0,)] * len(pairs))


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("how", ["cosine", "dot"])
def test_scores_are_symmetric_and_vectors_apart(
    how: Literal["cosine", "dot"], pooling: Literal["mean", "cls", "last"]
) -> None:
    model, a, b, c = encoder().eval(), words(1), words(2), words(3)
    objective = SentenceComparison(VOCABULARY, how=how, loss="logistic", pooling=pooling)
    ab, ba, aa = objective.scores(model, batch_of(objective, (a, b), (b, a), (a, a)))
    assert ab.item() == pytest.approx(ba.item(), abs=1e-5)
    if how == "cosine":
        assert aa.item() == pytest.approx(1.0, abs=1e-5)
    batches = [batch_of(objective, pair) for pair in ((a, b), (a, c))]
    vectors = [segment_vectors(encoder_states(model, x), x.segment_lengths, pooling)[0] for x in batches]
    assert torch.allclose(vectors[0], vectors[1], atol=1e-6)
    rows = model(torch.tensor([[1, *a, 2]]))[0]
    assert torch.allclose(vectors[0], {"mean": rows.mean(0), "cls": rows[0], "last": rows[-1]}[pooling], atol=1e-5)


@torch.no_grad()
def test_losses_are_those_of_their_formulas() -> None:
    model, pairs = encoder().eval(), [ScoredPair(words(n), words(n + 9), score) for n, score in ((0, 0.2), (1, 0.9))]
    for objective in (SentenceComparison(VOCABULARY), SentenceComparison(VOCABULARY, loss="logistic", scale=2.0)):
        batch = objective.prepare(pairs, [(0,), (1,)])
        scores, wanted = objective.scores(model, batch), torch.tensor([0.2, 0.9])
        likely = torch.sigmoid(2.0 * scores)
        logistic = -(wanted * likely.log() + (1 - wanted) * (1 - likely).log()).sum()
        expected = (scores - wanted).square().sum() if objective.loss == "squared" else logistic
        assert objective.loss_sum(model, batch)[0].item() == pytest.approx(expected.item(), rel=1e-4)
    with pytest.raises(DataError, match="compares a cosine"):
        SentenceComparison(VOCABULARY, how="dot")
    with pytest.raises(CheckpointError, match="trains an encoder, got Linear"):
        SentenceComparison(VOCABULARY).loss_sum(torch.nn.Linear(2, 2), batch)


@torch.no_grad()
def test_each_token_of_the_table_has_a_distribution() -> None:
    kitten = Words("The kitten is chasing the ball .")
    ids = kitten.ids("The kitten is chasing the ball .")
    objective = TokenClassification(kitten.vocabulary, 3)
    batch = objective.prepare([LabelledTokens(ids, [0, 1, 0, 2, 0, 1, 0])], [(0,)])
    model = kitten.model(HeadConfig(kind="token_classifier", labels=("a", "b", "c")))
    assert kitten.text(batch.input_ids) == "[CLS] The kitten is chasing the ball . [SEP]"
    learned = batch.target_ids != IGNORED
    assert learned.tolist() == [False] + [True] * 7 + [False]
    total, count = objective.loss_sum(model, batch)
    known = model(batch.input_ids[None])[0, learned].log_softmax(-1)
    assert count == 7
    assert total.item() / count == pytest.approx(F.nll_loss(known, batch.target_ids[learned]).item(), rel=1e-5)


@pytest.mark.peer
@torch.no_grad()
def test_token_loss_is_that_of_transformers(tmp_path: Any) -> None:
    from transformers import BertConfig

    sizes = {"vocab_size": SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    twin = build_twin("BertForTokenClassification", BertConfig(**sizes, num_attention_heads=4, num_labels=3))
    twin.save_pretrained(tmp_path)
    model, objective = load_huggingface(tmp_path, torch.float32), TokenClassification(VOCABULARY, 3)
    batch = objective.prepare([labelled(n) for n in range(3)], [(0,)] * 3)
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence(x.split(batch.segment_lengths), batch_first=True, padding_value=padding)
        for x, padding in ((batch.input_ids, 0), (batch.target_ids, IGNORED))
    )
    theirs = twin(ids, attention_mask=(ids != 0).long(), labels=labels).loss
    total, count = objective.loss_sum(model, batch)
    assert total.item() / count == pytest.approx(float(theirs), rel=1e-5)
    with pytest.raises(CheckpointError, match="the head has 3 labels, the objective 4"):
        TokenClassification(VOCABULARY, 4).loss_sum(model, batch)
    with pytest.raises(CheckpointError, match="kind token_classifier"):
        objective.loss_sum(headed(), batch)

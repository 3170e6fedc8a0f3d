"""Pairs of a source and a target: framing, teacher forcing, and the loss of T5 and BART."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gristmill.errors import DataError, RequestError
from gristmill.model.encoder_decoder import EncoderDecoder
from gristmill.model.formats.huggingface import load_huggingface
from gristmill.objectives.mass import Mass
from gristmill.objectives.sequence_pair import Framing, Pair, PairBatch, PairObjective, SequenceToSequence
from gristmill.objectives.vocabulary import EncoderVocabulary
from gristmill.tokens.batch import IGNORED
from model.families.test_bart import bart
from model.families.test_t5 import t5
from objectives.words import FRAMING, ids, show

PAIRS = [([11, 12, 13, 14, 15], [21, 22, 23]), ([31, 32], [41, 42, 43, 44, 45, 46]), ([51], [61])]


def test_the_decoder_reads_the_target_one_step_late() -> None:
    source, reads, labels = show(Pair(ids("The kitten"), ids("is chasing the ball")))
    assert (source, reads, labels) == ("[CLS] The kitten", "<s> is chasing the", "is chasing the ball")


def test_frames_of_the_two_published_families() -> None:
    pair = Pair([5, 6], [7, 8])
    batch = PairBatch.from_pairs([pair], Framing.t5(100))
    assert batch.source.input_ids.tolist() == [5, 6, 1]
    assert batch.target.input_ids.tolist() == [0, 7, 8]
    assert batch.target.target_ids.tolist() == [7, 8, 1]
    batch = PairBatch.from_pairs([pair], Framing.bart(100))
    assert batch.source.input_ids.tolist() == [0, 5, 6, 2]
    assert batch.target.input_ids.tolist() == [2, 0, 7, 8]
    assert batch.target.target_ids.tolist() == [0, 7, 8, 2]
    assert (Framing.t5(9).extra_tokens, Framing.bart(9).extra_tokens, FRAMING.extra_tokens) == (1, 2, 1)


@pytest.mark.peer
def test_the_shift_is_that_of_bart() -> None:
    from transformers.models.bart.modeling_bart import shift_tokens_right

    framing = Framing(vocab_size=10, decoder_start=2, source_before=(0,), target_after=(2,))
    batch = PairBatch.from_pairs([Pair([], [5, 6, 7])], framing)
    assert batch.target.target_ids.tolist() == [5, 6, 7, 2]
    assert batch.target.input_ids.tolist() == [2, 5, 6, 7]
    assert shift_tokens_right(torch.tensor([[5, 6, 7, 2]]), 1, 2).tolist() == [[2, 5, 6, 7]]


def theirs(twin: Any, batch: PairBatch) -> Any:
    """The loss of a transformers model on the pairs of a batch, padded as it wants them."""

    def padded(flat: torch.Tensor, lengths: tuple[int, ...], fill: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(flat.split(lengths)), batch_first=True, padding_value=fill)

    lengths = batch.source.segment_lengths
    return twin(
        input_ids=padded(batch.source.input_ids, lengths, 0),
        attention_mask=padded(torch.ones(sum(lengths)), lengths, 0),
        decoder_input_ids=padded(batch.target.input_ids, batch.target.segment_lengths, 0),
        labels=padded(batch.target.target_ids, batch.target.segment_lengths, IGNORED),
    ).loss


@pytest.mark.peer
@pytest.mark.parametrize("made", ["t5", "t5 untied", "bart", "mass"])
def test_loss_and_gradient_are_those_of_transformers(made: str, tmp_path: Path) -> None:
    twin = bart() if made == "bart" else t5(own_head=made == "t5 untied", tie_word_embeddings=made != "t5 untied")
    twin.save_pretrained(tmp_path)
    model = load_huggingface(tmp_path, torch.float32).eval()
    framing = Framing.bart(97) if made == "bart" else Framing.t5(97)
    objective: PairObjective = SequenceToSequence(framing)
    examples: list[Any] = PAIRS
    if made == "mass":
        objective, examples = (
            Mass(framing, EncoderVocabulary(size=97, mask_id=90)),
            [(source + target, None) for source, target in PAIRS],
        )
    batch = objective.prepare(examples, [(0, i) for i in range(3)])
    total, count = objective.loss_sum(model, batch)
    expected = theirs(twin, batch)
    assert count == objective.counts(batch)["loss"] == (batch.target.target_ids != IGNORED).sum()
    assert total.item() / count == pytest.approx(expected.item(), abs=1e-4)
    (total / count).backward()
    expected.backward()
    wanted = twin.get_input_embeddings().weight.grad
    mine = model.encoder.embed_tokens.weight.grad
    if made == "t5 untied":
        assert (model.decoder.lm_head.weight.grad - twin.lm_head.weight.grad).abs().max() < 1e-5
    assert (mine - wanted).abs().max() < 1e-3 * wanted.abs().max()


@pytest.mark.peer
def test_transformers_makes_the_same_decoder_inputs_of_the_labels(tmp_path: Path) -> None:
    twin = t5()
    batch = SequenceToSequence(Framing.t5(97)).prepare(PAIRS[:1], [(0,)])
    asked = twin(input_ids=batch.source.input_ids[None], labels=batch.target.target_ids[None]).loss
    assert asked.item() == pytest.approx(theirs(twin, batch).item(), abs=1e-6)


def test_only_learned_places_reach_the_head_and_the_source_gets_gradient_through_them() -> None:
    from objectives.cases_seq2seq import encoder_decoder

    model: EncoderDecoder = encoder_decoder()
    states: list[torch.Tensor] = []
    model.decoder.norm.register_forward_hook(lambda _, __, out: (out.retain_grad(), states.append(out))[1])
    learned = np.array([False, True, False, True])
    batch = PairBatch.from_pairs([Pair([5, 6], [7, 8, 9, 10], learned)], Framing.t5(64))
    total, count = SequenceToSequence(Framing.t5(64)).loss_sum(model, batch)
    total.backward()
    assert count == 2
    assert states[0].grad.abs().sum(-1).bool().tolist() == [False, True, False, True, False]
    assert model.encoder.embed_tokens.weight.grad[5].abs().sum() > 0


def test_what_does_not_fit_is_refused_by_name() -> None:
    bare = Framing(vocab_size=50, decoder_start=0)
    for pair, why in [
        (Pair([], [1]), "pair 0, source: no tokens"),
        (Pair([1], []), "pair 0, target: no tokens"),
        (Pair([50], [1]), "source: token 50 is outside the vocabulary of 50"),
        (Pair([1], [-2]), "target: token -2 is outside"),
        (Pair([1], [2, 3], shown=[2]), "shown has length 1, the target 2"),
        (Pair([1], [2, 3], learned=np.array([True])), "learned has length 1, the target 2"),
    ]:
        with pytest.raises(DataError, match=why):
            PairBatch.from_pairs([pair], bare)
    with pytest.raises(DataError, match="at least one pair"):
        PairBatch.from_pairs([], bare)


def test_a_pair_longer_than_the_context_is_refused_before_it_is_run() -> None:
    from objectives.cases_seq2seq import encoder_decoder

    objective = SequenceToSequence(Framing.t5(64))
    batch = objective.prepare([([5] * 70, [6])], [(0,)])
    with pytest.raises(RequestError, match="source of 71 tokens does not fit the model's context of 64"):
        objective.loss_sum(encoder_decoder(), batch)

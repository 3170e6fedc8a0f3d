"""Masked language modelling: which tokens are chosen, what replaces them, and what is lost on them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from conformance.encoder_family import build_twin
from gristmill.errors import CheckpointError, DataError, RequestError
from gristmill.model.config import LayerConfig
from gristmill.model.encoder import Encoder, row_states
from gristmill.model.formats.huggingface import load_huggingface
from gristmill.model.transformer import Transformer
from gristmill.objectives.causal import CausalLM
from gristmill.objectives.encoder_batch import EncoderBatch, Row, encoder_states, masked_loss_sum
from gristmill.objectives.masked import (
    PLAIN,
    Corrupted,
    MaskedLM,
    Masking,
    choose_units,
    masked_log_probs,
    replace_units,
    word_numbers,
)
from gristmill.objectives.token_classification import LabelledTokens, TokenClassification
from gristmill.objectives.vocabulary import EncoderVocabulary
from gristmill.tokens.batch import IGNORED
from gristmill.tokens.tokenizer import Tokenizer
from gristmill.tokens.train import train_bpe
from model import tiny
from objectives.cases_encoder import CONFIG, FIRST, MASK, SIZE, VOCABULARY, Words, headed, segment

WORM = Words("[CLS] The early bird catches the worm")
KITTEN = Words("The kitten is chasing the ball . playing")
RAIN = Words("It is raining . I need an umbrella . hat")


class Scripted:
    """A generator whose numbers are given: of `random`, then of `choice`."""

    def __init__(self, fates: list[float], drawn: list[int]) -> None:
        self.fates, self.drawn = fates, drawn

    def random(self, count: int) -> np.ndarray:
        assert count == len(self.fates)
        return np.array(self.fates)

    def choice(self, among: Any, count: int) -> np.ndarray:
        assert count == len(self.drawn)
        assert set(self.drawn) <= set(np.asarray(among).tolist())
        return np.array(self.drawn, dtype=np.int64)


def corrupted(words: Words, text: str, fates: dict[str, tuple[float, str]]) -> Corrupted:
    """The text with these words chosen, each with the number that decides and the word drawn, if any."""
    ids = words.ids(text)
    tokens = text.split()
    units = np.array([list(fates).index(token) if token in fates else -1 for token in tokens])
    order = [token for token in tokens if token in fates]
    drawn = [words.words.index(fates[token][1]) for token in order if fates[token][1]]
    script: Any = Scripted([fates[token][0] for token in order], drawn)
    return replace_units(ids, units, words.vocabulary, script)


def row_batch(*rows: tuple[np.ndarray, np.ndarray]) -> EncoderBatch:
    return EncoderBatch.from_rows([Row(*row) for row in rows])


def log_probs(model: Any, ids: np.ndarray) -> torch.Tensor:
    """(tokens, vocabulary) of the whole head, the plain way."""
    return model(torch.from_numpy(ids)[None])[0].log_softmax(dim=-1)


@torch.no_grad()
def test_the_objective_is_the_sum_of_the_log_probabilities_of_what_is_masked() -> None:
    text = "[CLS] The early bird catches the worm"
    found = corrupted(WORM, text, {"early": (0.0, ""), "worm": (0.0, "")})
    assert WORM.text(found.input_ids) == "[CLS] The [MASK] bird catches the [MASK]"
    assert np.flatnonzero(found.target_ids >= 0).tolist() == [2, 6]
    model = WORM.model()
    total, count = MaskedLM(WORM.vocabulary).loss_sum(model, row_batch(found))
    known = log_probs(model, found.input_ids)
    assert count == 2
    ids = WORM.ids(text)
    assert total.item() == pytest.approx(-float(known[2, ids[2]] + known[6, ids[6]]), rel=1e-5)


def test_only_chosen_positions_get_gradient_and_every_other_token_has_a_say() -> None:
    model, (ids, _) = headed(), segment(3)
    found = PLAIN.corrupt(np.array(ids), VOCABULARY, np.random.default_rng(0))
    batch = row_batch(found)
    hidden = encoder_states(model.body, batch)
    hidden.retain_grad()
    masked_loss_sum(model, hidden, batch.target_ids)[0].backward()
    assert hidden.grad is not None
    chosen = torch.from_numpy(found.target_ids >= 0)
    assert torch.equal(hidden.grad.abs().sum(dim=1) > 0, chosen)
    with torch.no_grad():
        before = log_probs(model, found.input_ids)[chosen]
        for place in np.flatnonzero(found.target_ids < 0):
            other = found.input_ids.copy()
            other[place] = FIRST + (other[place] - FIRST + 1) % (SIZE - FIRST)
            assert float((log_probs(model, other)[chosen] - before).abs().amax(dim=1).min()) > 1e-6


@pytest.mark.peer
@torch.no_grad()
def test_the_sum_is_the_mean_of_transformers_times_the_masked_positions(tmp_path: Any) -> None:
    from transformers import BertConfig

    sizes = {"vocab_size": SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    twin = build_twin("BertForMaskedLM", BertConfig(**sizes, num_attention_heads=4))
    twin.save_pretrained(tmp_path)
    model = load_huggingface(tmp_path, torch.float32)
    batch = MaskedLM(VOCABULARY).prepare([segment(n) for n in range(4)], [(0, n) for n in range(4)])
    total, count = MaskedLM(VOCABULARY).loss_sum(model, batch)
    expected = 0.0
    for ids, labels in zip(*(x.split(batch.segment_lengths) for x in (batch.input_ids, batch.target_ids)), strict=True):
        expected += float(twin(ids[None], labels=labels[None]).loss) * int((labels >= 0).sum())
    assert count == batch.target_count > 4
    assert total.item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_hidden_tokens_are_predicted_independently_of_each_other() -> None:
    """Their joint probability is the product, whatever the other one truly is."""
    model, ids = WORM.model(), WORM.ids("[CLS] The early bird catches the worm")
    both = masked_log_probs(model, ids, [2, 6], WORM.vocabulary)
    hidden = ids.copy()
    hidden[[2, 6]] = MASK
    expected = log_probs(model, hidden)
    assert torch.allclose(both, torch.stack((expected[2, ids[2]], expected[6, ids[6]])), atol=1e-5)
    other = ids.copy()
    other[6] = WORM.words.index("bird")
    assert masked_log_probs(model, other, [2, 6], WORM.vocabulary)[0] == both[0]
    assert masked_log_probs(model, other, [2], WORM.vocabulary)[0] != both[0]
    targets = np.full_like(ids, IGNORED)
    targets[[2, 6]] = ids[[2, 6]]
    total, _ = MaskedLM(WORM.vocabulary).loss_sum(model, row_batch((hidden, targets)))
    assert total.item() == pytest.approx(-float(both.sum()), rel=1e-5)
    with pytest.raises(DataError, match="positions must be different"):
        masked_log_probs(model, ids, [2, 2], WORM.vocabulary)


def test_mask_tokens_are_of_pretraining_alone() -> None:
    masked = MaskedLM(VOCABULARY).prepare([segment(0)], [(0,)])
    assert (masked.input_ids == MASK).any()
    ids, _ = segment(0)
    tuned = TokenClassification(VOCABULARY, 3).prepare([LabelledTokens(ids, [0] * len(ids))], [(0,)])
    causal = CausalLM().prepare([segment(0)], [(0,)])
    assert not (tuned.input_ids == MASK).any()
    assert not (causal.input_ids == MASK).any()


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 3])
def test_a_causal_model_is_a_masked_one_that_sees_nothing_to_the_right(layers: int) -> None:
    """With all from i on hidden from attention, the state before i predicts i as it does under a causal mask.

    One layer may see its whole context. Deeper ones also let the context see only what is to its left.
    """
    config = tiny.config(num_hidden_layers=layers, tie_word_embeddings=True)
    causal = tiny.model(num_hidden_layers=layers)
    blind = Encoder(replace(config, causal=False)) if layers == 1 else Transformer(config)
    blind.load_state_dict(causal.state_dict(), strict=layers > 1)
    tokens = tiny.ids(9)
    total = 0.0
    for place in range(1, 9):
        seen = (torch.arange(9) < place).long()[None]
        state = row_states(blind, tokens[None], seen)[0, place - 1]
        total -= float(causal.logits(state).log_softmax(-1)[tokens[place]])
    expected, count = CausalLM().loss_sum(causal, CausalLM().prepare([(tokens.tolist(), None)], [(0,)]))
    assert count == 8
    assert total == pytest.approx(expected.item(), rel=1e-5)


MANY = EncoderVocabulary(size=30_000, mask_id=3, cls_id=1, sep_id=2, special_ids=frozenset({0, 4}))


def shares(rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[int, list[float]]:
    """Tokens, and the shares of them that are masked, replaced and kept among the chosen."""
    ids, inputs, targets = (np.concatenate(part) for part in zip(*rows, strict=True))
    chosen = targets != IGNORED
    masked, kept = chosen & (inputs == MANY.mask_id), chosen & (inputs == ids)
    assert (inputs[~chosen] == ids[~chosen]).all()
    assert (targets[chosen] == ids[chosen]).all()
    return len(ids), [float(part.mean()) for part in (masked, chosen & ~masked & ~kept, kept)]


def assert_bert_shares(count: int, found: list[float]) -> None:
    assert count >= 100_000
    for share, expected in zip(found, (0.12, 0.015, 0.015), strict=True):
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / count)


def test_fifteen_percent_are_chosen_and_treated_80_10_10() -> None:
    draw = np.random.default_rng(0)
    segments = [draw.integers(5, MANY.size, 137) for _ in range(800)]
    rows = [(ids, *Masking().corrupt(ids, MANY, draw)) for ids in segments]
    assert_bert_shares(*shares(rows))


@pytest.mark.peer
def test_the_collator_of_transformers_has_the_same_shares() -> None:
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    names = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *(f"w{n}" for n in range(5, MANY.size))]
    backend = Backend(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]", pad_token="[PAD]")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=0)
    ids = np.random.default_rng(0).integers(5, MANY.size, (800, 137))
    batch = collator([{"input_ids": row.tolist()} for row in ids])
    inputs, labels = batch["input_ids"].numpy(), batch["labels"].numpy()
    assert_bert_shares(*shares([(ids.ravel(), inputs.ravel(), labels.ravel())]))


UNITS = ("token", "word", "span", "fragment")


@given(
    st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=60),
    st.sampled_from(UNITS),
    st.floats(0.01, 1.0),
    st.integers(0, 1000),
)
def test_special_symbols_are_never_chosen_and_the_text_can_be_restored(
    tokens: list[int], unit: Any, rate: float, seed: int
) -> None:
    ids = np.array(tokens)
    masking = Masking(unit=unit, rate=rate)
    units = choose_units(masking, ids, VOCABULARY, np.random.default_rng(seed))
    special, chosen = VOCABULARY.is_special[ids], units >= 0
    assert not (chosen & special).any()
    open_ = int((~special).sum())
    assert chosen.sum() >= min(1, open_)
    if unit == "token":
        assert math.floor(rate * open_) <= max(chosen.sum(), 1) <= math.ceil(rate * open_) + 1
    if unit in ("word", "span") and open_:
        words = word_numbers(~special, VOCABULARY.continues[ids])  # type: ignore[index]
        assert set(words[chosen]).isdisjoint(words[~chosen & ~special])
        biggest = int(np.bincount(words[words >= 0]).max())
        assert chosen.sum() <= max(math.ceil(rate * open_), biggest)
    if unit in ("span", "fragment"):
        for number in range(units.max(initial=-1) + 1):
            places = np.flatnonzero(units == number)
            assert (np.diff(places) == 1).all()
    if unit == "span" and open_:
        assert all(len(set(words[units == n])) <= masking.longest_span for n in range(units.max() + 1))
    if unit == "fragment":
        assert units.max(initial=-1) == min(open_, 1) - 1
    found = replace_units(ids, units, VOCABULARY, np.random.default_rng(seed), alike=unit in ("span", "fragment"))
    assert np.array_equal(found.restored(), ids)
    assert np.array_equal(found.target_ids >= 0, chosen)
    assert (found.input_ids == MASK).sum() <= chosen.sum() + (ids == MASK).sum()
    if unit in ("span", "fragment"):  # a unit is masked as a whole or not at all
        assert all(len(set((found.input_ids == MASK)[units == n])) == 1 for n in range(units.max(initial=-1) + 1))


def test_spans_are_of_joshis_mean_length_and_words_are_whole() -> None:
    """Weights 0.2 * 0.8^length up to 10 have a mean of 3.8 words."""
    ids, draw = np.full(4000, FIRST), np.random.default_rng(0)
    units = choose_units(Masking(unit="span", rate=0.15), ids, VOCABULARY, draw)
    lengths = np.bincount(units[units >= 0])
    weights = 0.8 ** np.arange(10)
    mean = float((weights * np.arange(1, 11)).sum() / weights.sum())
    assert mean == pytest.approx(3.797, abs=1e-3)
    assert abs(lengths.mean() - mean) < 4 * lengths.std() / math.sqrt(len(lengths))
    assert abs((units >= 0).sum() - 600) <= 1


def test_mass_style_hides_one_fragment() -> None:
    text = "[CLS] The kitten is chasing the ball ."
    found = corrupted(KITTEN, text, dict.fromkeys(("is", "chasing", "the"), (0.0, "")))
    assert KITTEN.text(found.input_ids) == "[CLS] The kitten [MASK] [MASK] [MASK] ball ."
    assert KITTEN.text(found.target_ids[1:]) == "_ _ is chasing the _ _"
    ids, draw = KITTEN.ids(text), np.random.default_rng(0)
    for rate, size in ((0.01, 1), (3 / 7 + 1e-9, 3), (1.0, 7)):
        fragment = Masking(unit="fragment", rate=rate, mask_share=1.0, random_share=0.0)
        inputs, targets = fragment.corrupt(ids, KITTEN.vocabulary, draw)
        places = np.flatnonzero(targets >= 0)
        assert np.array_equal(places, np.flatnonzero(inputs == MASK))
        assert places.tolist() == list(range(places[0], places[0] + size))


def test_bert_style_hides_replaces_and_keeps() -> None:
    text = "[CLS] The kitten is chasing the ball ."
    fates = {"kitten": (0.95, ""), "is": (0.1, ""), "chasing": (0.85, "playing"), "ball": (0.79, "")}
    found = corrupted(KITTEN, text, fates)
    assert KITTEN.text(found.input_ids) == "[CLS] The kitten [MASK] playing the [MASK] ."
    assert KITTEN.text(found.target_ids[1:]) == "_ kitten is chasing _ ball _"
    assert KITTEN.text(found.restored()) == text


@torch.no_grad()
def test_the_running_example_loses_at_every_chosen_token() -> None:
    text = "[CLS] It is raining . [SEP] I need an umbrella . [SEP]"
    fates = {"raining": (0.0, ""), "I": (0.9, ""), "an": (0.5, ""), "umbrella": (0.8, "hat")}
    found = corrupted(RAIN, text, fates)
    assert RAIN.text(found.input_ids) == "[CLS] It is [MASK] . [SEP] I need [MASK] hat . [SEP]"
    assert np.flatnonzero(found.target_ids >= 0).tolist() == [3, 6, 8, 9]
    model, ids = RAIN.model(), RAIN.ids(text)
    total, count = MaskedLM(RAIN.vocabulary).loss_sum(model, row_batch(found))
    known = log_probs(model, found.input_ids)
    assert total.item() == pytest.approx(-sum(float(known[i, ids[i]]) for i in (3, 6, 8, 9)), rel=1e-5)
    for parameter in model.parameters():
        parameter.zero_()
    total, count = MaskedLM(RAIN.vocabulary).loss_sum(model, row_batch(found))
    assert total.item() == pytest.approx(count * math.log(len(RAIN.words)), rel=1e-6)


def encoder_tokenizer() -> Tokenizer:
    specials = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
    named = (("cls_token", "[CLS]"), ("sep_token", "[SEP]"), ("mask_token", "[MASK]"))
    return replace(
        train_bpe(["I love the food here. It's amazing!"] * 3, 300, special_tokens=specials), named_tokens=named
    )


def test_a_tokenizer_says_which_symbols_are_special() -> None:
    """They are never split, and never chosen."""
    tokenizer = encoder_tokenizer()
    vocabulary = EncoderVocabulary.of(tokenizer)
    text = "[CLS] I love the food here.[SEP] It's amazing![SEP]"
    ids = np.array(tokenizer.encode(text, add_bos=False))
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text
    assert [int((ids == index).sum()) for index in (vocabulary.cls_id, vocabulary.sep_id)] == [1, 2]
    _, targets = Masking(rate=1.0).corrupt(ids, vocabulary, np.random.default_rng(0))
    specials = set(tokenizer.special_tokens.values())
    assert np.array_equal(targets == IGNORED, [index in specials for index in ids.tolist()])
    assert specials.isdisjoint(vocabulary.ordinary_ids.tolist())
    with pytest.raises(DataError, match="names no mask_token"):
        EncoderVocabulary.of(replace(tokenizer, named_tokens=()))


def wordpiece() -> Tokenizer:
    tokens = ["[UNK]", "[MASK]", "play", "##ing", "##ful", "the", "##"]
    backend = Backend(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["[UNK]", "[MASK]"])
    return Tokenizer(backend, named_tokens=(("mask_token", "[MASK]"),))


def test_words_are_told_from_their_pieces() -> None:
    vocabulary = EncoderVocabulary.of(wordpiece())
    assert vocabulary.continues is not None
    assert vocabulary.continues.tolist() == [False, False, False, True, True, False, False]
    ids = np.array(wordpiece().encode("the playing the playful"))
    assert word_numbers(~vocabulary.is_special[ids], vocabulary.continues[ids]).tolist() == [0, 1, 1, 2, 3, 3]
    bpe = encoder_tokenizer()
    found = EncoderVocabulary.of(bpe)
    ids = np.array(bpe.encode("I love, love it", add_bos=False))
    words = word_numbers(~found.is_special[ids], found.continues[ids])  # type: ignore[index]
    texts = [bpe.decode(ids[words == n].tolist()) for n in range(words.max() + 1)]
    assert texts == ["I", " love", ",", " love", " it"]


def test_what_does_not_fit_together_is_refused_by_name() -> None:
    bare = replace(VOCABULARY, cls_id=None)
    with pytest.raises(DataError, match="has no cls_id"):
        MaskedLM(bare)
    with pytest.raises(DataError, match="needs words"):
        Masking(unit="word").corrupt(np.array([7, 8]), KITTEN.vocabulary, np.random.default_rng(0))
    for changes in ({"rate": 0.0}, {"mask_share": 0.95}, {"longest_span": 0}, {"unit": "wrod"}, {"span_stop": 0.0}):
        with pytest.raises(DataError, match=next(iter(changes))):
            Masking(**changes)  # type: ignore[arg-type]
    objective = MaskedLM(VOCABULARY)
    with pytest.raises(CheckpointError, match=r"masked_lm or pretraining, got Encoder"):
        objective.loss_sum(headed().body, objective.prepare([segment(0)], [(0,)]))
    with pytest.raises(RequestError, match="of 71 tokens, framing included"):
        objective.loss_sum(headed(), objective.prepare([([7] * 69, None)], [(0,)]))
    with pytest.raises(DataError, match="special token 99 is outside"):
        EncoderVocabulary(size=64, mask_id=99)


def test_padding_that_rounds_shapes_up_changes_nothing() -> None:
    """A window, so that a state would notice another neighbour; a batch of more than one step of the shape."""
    layers = (LayerConfig(window=4), LayerConfig())
    model = headed(config=replace(CONFIG, layers=layers)).eval()
    objective = MaskedLM(VOCABULARY)
    batch = objective.prepare([segment(n) for n in range(24)], [(0, n) for n in range(24)])
    assert batch.tokens > 256
    with torch.no_grad():
        found = encoder_states(model.body, batch)
        rows = [model.body(ids[None])[0] for ids in batch.input_ids.split(batch.segment_lengths)]
    assert torch.allclose(found, torch.cat(rows), atol=1e-5)

"""Translation language modelling, and masked language modelling of many languages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from gristmill.errors import DataError
from gristmill.model.encoder import Encoder
from gristmill.model.formats.state import on_meta
from gristmill.model.heads import HeadConfig, Headed
from gristmill.model.presets import published
from gristmill.objectives.encoder_batch import EncoderBatch, Row
from gristmill.objectives.masked import MaskedLM, masked_log_probs
from gristmill.objectives.translation import Tagged, TranslationLM
from gristmill.objectives.vocabulary import EncoderVocabulary
from gristmill.tokens.batch import IGNORED
from gristmill.tokens.train import train_bpe
from objectives.cases_encoder import VOCABULARY, Words, headed, segment

SOURCE, TARGET = "鲸鱼 是 哺乳 动物 。", "Whales are mammals ."
WHALES = Words(SOURCE, TARGET, "Dogs")
PAIR = [Tagged(WHALES.ids(SOURCE), 0), Tagged(WHALES.ids(TARGET), 1)]
HIDDEN = [1, 3, 8, 9]


def masked_row(text: str) -> tuple[np.ndarray, np.ndarray]:
    ids = WHALES.ids(text)
    targets = np.full_like(ids, IGNORED)
    targets[HIDDEN] = TranslationLM(WHALES.vocabulary).packed(PAIR)[0][HIDDEN]
    return ids, targets


@torch.no_grad()
def test_the_objective_is_the_product_over_both_sides() -> None:
    objective = TranslationLM(WHALES.vocabulary, languages=2)
    ids, tags = objective.packed(PAIR)
    assert WHALES.text(ids) == f"[CLS] {SOURCE} [SEP] {TARGET} [SEP]"
    assert len(ids) == 12
    assert tags.tolist() == [0] * 7 + [1] * 5
    inputs, targets = masked_row("[CLS] [MASK] 是 [MASK] 动物 。 [SEP] Whales [MASK] [MASK] . [SEP]")
    model = WHALES.model()
    total, count = objective.loss_sum(model, EncoderBatch.from_rows([Row(inputs, targets, tags)], token_types=2))
    known = model(torch.from_numpy(inputs)[None], token_type_ids=torch.from_numpy(tags)[None])[0].softmax(dim=-1)
    product = torch.stack([known[place, ids[place]] for place in HIDDEN]).prod()
    assert count == 4
    assert torch.exp(-total).item() == pytest.approx(product.item(), rel=1e-4)


@torch.no_grad()
def test_one_language_is_predicted_from_the_other() -> None:
    model = WHALES.model()
    texts = [f"[CLS] {SOURCE} [SEP] {first} are mammals . [SEP]" for first in ("Whales", "Dogs")]
    found = [masked_log_probs(model, WHALES.ids(text), [1, 3], WHALES.vocabulary) for text in texts]
    assert float((found[0] - found[1]).abs().min()) > 1e-6


@torch.no_grad()
def test_tags_count_only_where_they_are_embedded() -> None:
    model, swapped = headed(), [replace_tags(PAIR, 1, 0)]
    for languages in (0, 2):
        objective = TranslationLM(WHALES.vocabulary, languages=languages)
        batches = [objective.prepare(examples, [(0,)]) for examples in ([PAIR], swapped)]
        losses = [objective.loss_sum(model, batch)[0] for batch in batches]
        assert torch.equal(batches[0].input_ids, batches[1].input_ids)
        assert (batches[0].token_type_ids is None) == (languages == 0)
        assert torch.equal(losses[0], losses[1]) == (languages == 0)
    with pytest.raises(DataError, match="languages must be 0 or more"):
        TranslationLM(WHALES.vocabulary, languages=-1)


def replace_tags(pair: list[Tagged], *languages: int) -> list[Tagged]:
    return [replace(text, language=language) for text, language in zip(pair, languages, strict=True)]


def test_text_that_mixes_languages_needs_no_tag() -> None:
    mixed = "周末 我们 打算 去 做 hiking ， 你 想 一起 来 吗 ？"
    specials = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
    named = tuple((f"{name}_token", f"[{name.upper()}]") for name in ("cls", "sep", "mask", "unk"))
    tokenizer = replace(
        train_bpe([SOURCE, TARGET, "we go hiking", mixed], 400, special_tokens=specials), named_tokens=named
    )
    ids = tokenizer.encode(mixed, add_bos=False)
    assert tokenizer.id_of("[UNK]") not in ids
    assert tokenizer.decode(ids) == mixed
    batch = TranslationLM(EncoderVocabulary.of(tokenizer)).prepare([[Tagged(ids)]], [(0,)])
    assert batch.token_type_ids is None
    assert batch.tokens == len(ids) + 2


@torch.no_grad()
def test_without_translations_it_is_the_masked_lm_of_one_language() -> None:
    """The same loss on the same ids, whatever languages the batch mixes."""
    both: list[Any] = [MaskedLM(VOCABULARY), TranslationLM(VOCABULARY)]
    examples = [[segment(n) for n in range(4)], [[Tagged(segment(n)[0], n % 2)] for n in range(4)]]
    keys = [(0, n) for n in range(4)]
    batches = [objective.prepare(given, keys) for objective, given in zip(both, examples, strict=True)]
    assert torch.equal(batches[0].input_ids, batches[1].input_ids)
    model = headed()
    losses = [objective.loss_sum(model, batch)[0] for objective, batch in zip(both, batches, strict=True)]
    assert torch.equal(losses[0], losses[1])


def test_multilingual_bert_is_bert_with_a_larger_vocabulary() -> None:
    base = published("bert-base")
    pooler = HeadConfig(kind="pooled_encoder", dense="tanh")
    counts = [
        on_meta(lambda size=size: Headed(Encoder(replace(base, vocab_size=size)), pooler)).count_parameters()
        for size in (base.vocab_size, 119_547)
    ]
    assert counts == [109_482_240, 177_853_440]
    assert counts[1] - counts[0] == (119_547 - base.vocab_size) * base.hidden_size

"""Conversations to ids and masks: exactly the answer and its stop token are learned."""

from __future__ import annotations

import pytest

from gristmill.align.encyclopedia import Article, conversations
from gristmill.align.sft import render_conversations
from gristmill.core import Message
from gristmill.corpus.shards import TokenList
from gristmill.errors import DataError
from gristmill.tokens.batch import IGNORED, PackedBatch
from gristmill.tokens.renderer import JinjaRenderer
from gristmill.tokens.tokenizer import Tokenizer
from gristmill.tokens.train import train_bpe

ARTICLE = Article("Mars", "fourth planet", "Astronomy", "Mars is the fourth planet from the Sun.")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([f"{ARTICLE.sentence} Which topic does this text belong to?"] * 3, 300)


def chat(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_exactly_the_answer_and_the_stop_token_are_learned(tokenizer: Tokenizer) -> None:
    chats = list(conversations(ARTICLE))
    rendered = list(render_conversations(chats, JinjaRenderer(tokenizer), max_tokens=512))
    assert len(rendered) == 3
    for (ids, mask), messages in zip(rendered, chats, strict=True):
        learned = [token for token, bit in zip(ids, mask, strict=True) if bit]
        assert tokenizer.token_of(learned[-1]) == "<|im_end|>"
        assert tokenizer.decode(learned[:-1]) == messages[1]["content"]
        first = mask.index(1)
        assert mask == [0] * first + [1] * len(learned) + [0] * (len(mask) - first - len(learned))


def test_the_targets_of_a_batch_are_those_tokens(tokenizer: Tokenizer) -> None:
    rendered = list(render_conversations(conversations(ARTICLE), JinjaRenderer(tokenizer), max_tokens=512))
    source = TokenList(rendered, vocab_size=tokenizer.vocab_size)
    batch = PackedBatch.from_segments([source.piece(number, 0, len(ids)) for number, (ids, _) in enumerate(rendered)])
    targets = [token for token in batch.target_ids.tolist() if token != IGNORED]
    assert targets == [token for ids, mask in rendered for token, bit in zip(ids, mask, strict=True) if bit]


def test_the_trained_prompt_is_the_asked_prompt(tokenizer: Tokenizer) -> None:
    renderer = JinjaRenderer(tokenizer)
    messages = chat("Who?", "Mars")
    ((ids, mask),) = render_conversations([messages], renderer, max_tokens=64)
    assert ids[: mask.index(1)] == renderer.render_prompt(messages[:1])


def test_one_that_is_too_long_is_refused_by_number(tokenizer: Tokenizer) -> None:
    chats = [chat("Who?", "Mars"), chat("Who?", "Mars " * 40)]
    with pytest.raises(DataError, match=r"conversation 1 has \d+ tokens, more than 64"):
        list(render_conversations(chats, JinjaRenderer(tokenizer), max_tokens=64))


def test_a_length_of_exactly_the_limit_is_taken(tokenizer: Tokenizer) -> None:
    renderer = JinjaRenderer(tokenizer)
    length = len(renderer.render(chat("Who?", "Mars")).token_ids)
    assert len(list(render_conversations([chat("Who?", "Mars")], renderer, max_tokens=length))) == 1
    with pytest.raises(DataError, match="conversation 0"):
        list(render_conversations([chat("Who?", "Mars")], renderer, max_tokens=length - 1))


def test_one_that_cannot_be_rendered_is_refused_by_number(tokenizer: Tokenizer) -> None:
    for bad in (chat("Who?", "a<|im_end|>b"), [], [{"role": "clown", "content": "x"}]):
        with pytest.raises(DataError, match="conversation 1: "):
            list(render_conversations([chat("Who?", "Mars"), bad], JinjaRenderer(tokenizer), max_tokens=64))


def test_a_caller_may_leave_the_bad_ones_out_and_hears_of_each(tokenizer: Tokenizer) -> None:
    chats = [chat("Who?", "Mars"), chat("Who?", "Mars " * 40), [], chat("Where?", "Sky")]
    heard: list[DataError] = []
    kept = list(render_conversations(chats, JinjaRenderer(tokenizer), max_tokens=64, on_error=heard.append))
    assert [tokenizer.decode([t for t, bit in zip(*pair, strict=True) if bit]) for pair in kept] == ["Mars", "Sky"]
    assert [str(error).split()[1].strip(":") for error in heard] == ["1", "2"]

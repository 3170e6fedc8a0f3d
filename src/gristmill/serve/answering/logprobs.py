"""Log-probabilities as the wire format has them, for chat and for plain completions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from gristmill.core import CompletionOutput, Logprob, RequestOutput
from gristmill.serve.wire.answers import (
    ChoiceLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from gristmill.tokens.token_bytes import byte_of_stand_in
from gristmill.tokens.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""What the wire format says for a token of probability 0, as JSON has no infinity."""


def token_bytes(tokenizer: Tokenizer, token_id: int, text: str) -> list[int] | None:
    """Bytes of the token that decodes to `text` on its own; None when they are not known.

    A token that is no complete text decodes to U+FFFD. Its bytes then come from its spelling in the vocabulary: one
    stand-in character per byte in a byte-level vocabulary, or <0xE2> in one that falls back to bytes.
    """
    if "\ufffd" not in text:
        return list(text.encode("utf-8"))
    spelling = tokenizer.token_of(token_id) or ""
    fallback = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", spelling)
    if fallback:
        return [int(fallback[1], 16)]
    table = byte_of_stand_in()
    return [table[character] for character in spelling] if spelling and table.keys() >= set(spelling) else None


def chat_logprobs(tokenizer: Tokenizer, output: CompletionOutput, start: int, count: int) -> ChoiceLogprobs:
    """Of the tokens from `start` on, each with the `count` most probable ones."""
    content = []
    for token_id, places in zip(output.token_ids[start:], (output.logprobs or [])[start:], strict=False):
        best = sorted(places.items(), key=lambda item: item[1].rank)
        by_id = {
            candidate: TopLogprob(
                token=place.decoded_token,
                logprob=max(place.logprob, LEAST_LOGPROB),
                bytes=token_bytes(tokenizer, candidate, place.decoded_token),
                token_id=candidate,
            )
            for candidate, place in best
        }
        top = [by_id[candidate] for candidate, place in best if place.rank <= count]
        content.append(TokenLogprob(**by_id[token_id].model_dump(), top_logprobs=top))
    return ChoiceLogprobs(content=content, refusal=None)


def prompt_logprobs(output: RequestOutput) -> PromptLogprobs:
    """Of the prompt's tokens."""
    places = output.prompt_logprobs or [None] * len(output.prompt_token_ids)
    return [
        None
        if place is None
        else {
            str(token): PromptLogprob(
                logprob=max(found.logprob, LEAST_LOGPROB), rank=found.rank, decoded_token=found.decoded_token
            )
            for token, found in place.items()
        }
        for place in places
    ]


class TextLogprobs:
    """Gathers the log-probabilities of a text, in the older form with one list per kind.

    count: how many of the most probable tokens to name. Offsets are in characters of the text that the tokens decode
    to one by one; a token in the middle of a character has its beginning.
    """

    def __init__(self, tokenizer: Tokenizer, count: int) -> None:
        self._tokenizer, self._count, self._offset = tokenizer, count, 0

    def take(self, token_ids: Sequence[int], places: Sequence[Mapping[int, Logprob] | None]) -> CompletionLogprobs:
        """The next tokens of the text."""
        entry = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[], token_ids=[])
        for token_id, place in zip(token_ids, places, strict=True):
            chosen = place[token_id] if place else None
            token = chosen.decoded_token if chosen else self._tokenizer.decode([token_id], skip_special_tokens=False)
            entry.tokens.append(token)
            entry.token_ids.append(token_id)
            entry.token_logprobs.append(max(chosen.logprob, LEAST_LOGPROB) if chosen else None)
            entry.top_logprobs.append(_named(place, token_id, self._count) if place else None)
            entry.text_offset.append(self._offset)
            self._offset += len(token)
        return entry


def _named(place: Mapping[int, Logprob], chosen: int, count: int) -> dict[str, float]:
    """The chosen token and the most probable ones, best first. Of two tokens of one text the better one stands."""
    named: dict[str, float] = {}
    for token, found in sorted(place.items(), key=lambda item: item[1].rank):
        if found.rank <= count or token == chosen:
            named.setdefault(found.decoded_token, max(found.logprob, LEAST_LOGPROB))
    return named

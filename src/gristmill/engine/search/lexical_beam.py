"""Lexically constrained beam search: required phrases are in every output, wherever they fit best.

Besides the best candidates of all paths, each path offers its own best token and the tokens that begin or continue
its missing phrases. The beam is shared out among banks, one for each number of required tokens that a candidate has
met, so that paths which met little and are likely do not push out those which met much.

Source: Post and Vilar 2018 (dynamic beam allocation), after Hokamp and Liu 2017 (grid beam search).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from gristmill.engine.search.driver import Choice, Prune, Search
from gristmill.engine.search.prune import beam, best
from gristmill.errors import RequestError

Phrase = tuple[int, ...]


def lexical(width: int, required: Sequence[Sequence[int]]) -> Prune:
    """Keep `width` candidates that go on, shared out among banks, and those of them that end with every phrase met.

    A path that could no longer meet all phrases within the limit of tokens is dropped, so whatever finishes holds
    them all. Phrases may overlap each other in the output. Without phrases this is `beam`.
    """
    phrases = list(dict.fromkeys(tuple(phrase) for phrase in required))
    plain = beam(width)

    def prune(search: Search, scores: Tensor) -> list[Choice]:
        if not phrases:
            return plain(search, scores)
        left = search.max_tokens - search.length - 1
        scores = scores.clone()
        for row, path in enumerate(search.paths):
            if tokens_missing(path.hypothesis.token_ids, phrases):
                scores[row, list(search.end_ids)] = -math.inf
        banks: dict[int, list[Choice]] = {}
        for choice in _candidates(search, scores, width, phrases):
            ids = (*search.paths[choice.row].hypothesis.token_ids, choice.token)
            missing = tokens_missing(ids, phrases)
            if missing <= left:
                banks.setdefault(missing, []).append(choice)
        ending = [c for c in banks.get(0, [])[:width] if c.token in search.end_ids]
        going = {missing: [c for c in bank if c.token not in search.end_ids] for missing, bank in banks.items()}
        return sorted(ending + _share_out(going, width), key=lambda choice: -choice.score)

    return prune


def check_phrases(required: Sequence[Sequence[int]], vocab_size: int, end_ids: frozenset[int]) -> None:
    """Raise RequestError for a phrase that no output can hold and go on."""
    for token in (token for phrase in required for token in phrase):
        if not 0 <= token < vocab_size:
            raise RequestError(f"required: token id {token} is not in the vocabulary of {vocab_size}", field="required")
        if token in end_ids:
            raise RequestError(f"required: token {token} ends the output; set ignore_eos", field="required")


def tokens_missing(ids: Sequence[int], phrases: Sequence[Phrase]) -> int:
    """Tokens that still suffice to bring every phrase into the output, less those of one that its end has begun."""
    absent = [phrase for phrase in phrases if not _holds(ids, phrase)]
    return sum(len(phrase) for phrase in absent) - max((_begun(ids, phrase) for phrase in absent), default=0)


def _candidates(search: Search, scores: Tensor, width: int, phrases: Sequence[Phrase]) -> list[Choice]:
    """The best of all paths, the best of each path, and what begins or continues a missing phrase; best first."""
    found = {(choice.row, choice.token): choice for choice in best(scores, (1 + max(1, len(search.end_ids))) * width)}
    for row, path in enumerate(search.paths):
        ids = tuple(path.hypothesis.token_ids)
        absent = [phrase for phrase in phrases if not _holds(ids, phrase)]
        tokens = {phrase[0] for phrase in absent} | {phrase[_begun(ids, phrase)] for phrase in absent}
        for token in (int(scores[row].argmax()), *tokens):
            score = float(scores[row, token])
            if score > -math.inf:
                found[row, token] = Choice(row, token, score)
    return sorted(found.values(), key=lambda choice: (-choice.score, choice.row, choice.token))


def _share_out(banks: dict[int, list[Choice]], width: int) -> list[Choice]:
    """`width` places in turn to each bank, the one with the fewest missing tokens first; places that a bank cannot
    fill go to the others."""
    kept: list[Choice] = []
    depth = 0
    while len(kept) < width and any(len(bank) > depth for bank in banks.values()):
        kept += [banks[missing][depth] for missing in sorted(banks) if len(banks[missing]) > depth]
        depth += 1
    return kept[:width]


def _holds(ids: Sequence[int], phrase: Phrase) -> bool:
    size = len(phrase)
    return any(tuple(ids[start : start + size]) == phrase for start in range(len(ids) - size + 1))


def _begun(ids: Sequence[int], phrase: Phrase) -> int:
    """Tokens of the phrase that the output ends with."""
    longest = min(len(ids), len(phrase) - 1)
    return next((size for size in range(longest, 0, -1) if tuple(ids[-size:]) == phrase[:size]), 0)

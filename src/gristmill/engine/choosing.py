"""From the hidden states of a step to the next tokens of its sequences: sampling, verification, log-probabilities."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from gristmill.core import LogitsProcessor, LogitsRow, Logprob
from gristmill.engine.request import Completion
from gristmill.engine.runner import Runner
from gristmill.engine.sampling.logprobs import token_logprobs, top_logprobs
from gristmill.engine.sampling.random import uniform
from gristmill.engine.sampling.sampler import Sampler
from gristmill.engine.speculation.verify import verify, verify_greedy
from gristmill.tokens.tokenizer import Tokenizer


class Chooser:
    """Chooses tokens for completions that are computed up to their last known token.

    Completions of one step are told apart by slots, which they keep until `leave`. own: the processor of requests that
    ask for a form. processors: further ones, which concern every request.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        vocab_size: int,
        own: LogitsProcessor,
        processors: Sequence[LogitsProcessor],
    ) -> None:
        self.runner, self.tokenizer = runner, tokenizer
        self.sampler = Sampler(vocab_size, tokenizer, runner.device, (own, *processors))
        self._plain_is_argmax = all(processor.is_argmax_invariant for processor in processors)
        self.model_seconds = 0.0
        """Of the last `choose`, the time the output head took: the model's, not the choice's."""
        self._free_slots: list[int] = []
        self.num_slots = 0

    @property
    def num_slots_free(self) -> int:
        """Of `num_slots`, those that no completion holds."""
        return len(self._free_slots)

    def enter(self, completion: Completion) -> None:
        """Give a completion a slot, unless it has one."""
        if completion.slot is not None:
            return
        if not self._free_slots:
            self._free_slots.append(self.num_slots)
            self.num_slots += 1
        completion.slot = self._free_slots.pop()
        request = completion.request
        self.sampler.add(
            completion.slot, request.params, request.prompt_ids, request.end_ids, request.seed, completion.index
        )

    def leave(self, completion: Completion) -> None:
        """Take the slot back."""
        if completion.slot is None:
            return
        self.sampler.remove(completion.slot)
        self._free_slots.append(completion.slot)
        completion.slot = None

    def choose(self, ready: Sequence[tuple[Completion, int]], hidden: Tensor) -> list[int]:
        """Append tokens to each completion; returns how many of its draft were accepted, by completion.

        ready: completions, each with the row of `hidden` (tokens, hidden) of its last token, drafted ones included.
        """
        rows = [row for completion, last in ready for row in range(last - _drafted(completion), last + 1)]
        selected = hidden if rows == list(range(len(hidden))) else hidden[rows]
        completions = [completion for completion, _ in ready]
        started = time.perf_counter()
        if self._plain_is_argmax and all(completion.request.is_plain for completion in completions):
            best = self.runner.greedy(selected)
            self.model_seconds = time.perf_counter() - started
            return self._settle(completions, best, None)
        logits = self.runner.logits(selected)
        self.model_seconds = time.perf_counter() - started
        if not any(_is_drawn(completion) for completion in completions):
            return self._settle(completions, self.sampler.sample(logits, _rows(completions)), logits)
        accepted, at = [], 0
        for completion in completions:
            part = logits[at : (at := at + _drafted(completion) + 1)]
            if _is_drawn(completion):
                accepted.append(self._verify(completion, part))
            else:
                accepted += self._settle([completion], self.sampler.sample(part, _rows([completion])), part)
        return accepted

    def _settle(
        self, completions: Sequence[Completion], chosen: Sequence[int | None], logits: Tensor | None
    ) -> list[int]:
        """Append what the target chose at each place, as far as drafts agree with it."""
        settled: list[_Settled] = []
        at = 0
        for completion in completions:
            places = _drafted(completion) + 1
            drafted = completion.draft.token_ids if completion.draft is not None else []
            settled.append(_Settled(completion, *verify_greedy(chosen[at : at + places], drafted), at))
            at += places
        self._take(settled, logits)
        return [one.accepted for one in settled]

    def _verify(self, completion: Completion, logits: Tensor) -> int:
        """Accept or refuse a draft that was drawn from distributions of its own; logits (drafted + 1, vocab)."""
        draft, request = completion.draft, completion.request
        assert draft is not None
        probs = self.sampler.distribution(logits, _rows([completion]))
        position = len(completion.output_ids)

        def draw(offset: int, stream: int) -> float:
            return uniform(request.seed, completion.index, position + offset, stream)

        tokens, count = verify(probs, draft, draw)
        self._take([_Settled(completion, tokens, count, 0)], logits)
        return count

    def _take(self, settled: Sequence[_Settled], logits: Tensor | None) -> None:
        """Append tokens one by one, with their log-probabilities where these are asked for; without one beyond the
        accepted ones, none could be chosen."""
        entries = {} if logits is None else self._top_logprobs(settled, logits)
        for completion, tokens, accepted, first in settled:
            for row, token in enumerate(tokens, start=first):
                probability = None
                if logits is not None and completion.stopper.needs_probability:
                    probability = float(token_logprobs(logits[row : row + 1], [token]).exp())
                if row in entries:
                    completion.logprobs.append(entries[row])
                completion.append(token, probability)
                if completion.finish_reason is not None:
                    break
            if len(tokens) == accepted and completion.finish_reason is None:
                completion.fail("no token can be chosen: the logits are not numbers, or all tokens are banned")

    def _top_logprobs(self, settled: Sequence[_Settled], logits: Tensor) -> dict[int, dict[int, Logprob]]:
        """By row, the log-probabilities of those that ask for them: one computation for all that ask for as many."""
        asked: dict[int, list[tuple[int, int]]] = {}
        for completion, tokens, _, first in settled:
            if (count := completion.request.params.logprobs) is not None:
                asked.setdefault(count, []).extend(enumerate(tokens, start=first))
        found: dict[int, dict[int, Logprob]] = {}
        for count, places in asked.items():
            if places:
                rows, chosen = zip(*places, strict=True)
                found |= zip(rows, top_logprobs(logits[list(rows)], chosen, count, self.tokenizer), strict=True)
        return found


class _Settled(NamedTuple):
    """Tokens that a completion takes, how many of them are its draft's, and the row of the first."""

    completion: Completion
    tokens: Sequence[int]
    accepted: int
    first: int


def _rows(completions: Sequence[Completion]) -> list[LogitsRow]:
    """What stands before each token to choose, drafts included."""
    rows = []
    for completion in completions:
        assert completion.slot is not None
        prompt_ids, output_ids = completion.request.prompt_ids, completion.output_ids
        rows.append(LogitsRow(completion.slot, prompt_ids, output_ids))
        drafted = completion.draft.token_ids if completion.draft is not None else []
        rows += [
            LogitsRow(completion.slot, prompt_ids, [*output_ids, *drafted[: count + 1]])
            for count in range(len(drafted))
        ]
    return rows


def _is_drawn(completion: Completion) -> bool:
    return completion.draft is not None and completion.draft.probs is not None


def _drafted(completion: Completion) -> int:
    return 0 if completion.draft is None else len(completion.draft.token_ids)

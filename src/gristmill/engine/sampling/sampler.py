"""From logits to tokens, for a whole batch at once.

Order: penalties, bias, n-grams, bad words, length decay, minimum length, thinking, the processors given from outside
(constraints); then temperature and filters (truncation.py); then the draw, whose number follows from the request's
seed, the completion's index and the position alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gristmill.core import BatchUpdate, LogitsProcessor, LogitsRow, SamplingParams
from gristmill.engine.sampling import truncation
from gristmill.engine.sampling.bad_words import BadWords
from gristmill.engine.sampling.bias import LogitBias
from gristmill.engine.sampling.length import LengthDecay, MinTokens
from gristmill.engine.sampling.ngrams import NoRepeatedNgrams
from gristmill.engine.sampling.penalties import Penalties
from gristmill.engine.sampling.processors import SlotProcessor
from gristmill.engine.sampling.random import DRAW, uniforms
from gristmill.engine.sampling.thinking import Thinking
from gristmill.errors import RequestError
from gristmill.tokens.tokenizer import Tokenizer


class Sampler:
    """Keeps the options of the completions that run, by slot.

    processors: applied after those of the sampling parameters, in order.
    """

    def __init__(
        self,
        vocab_size: int,
        tokenizer: Tokenizer,
        device: torch.device | str = "cpu",
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        self.vocab_size, self.device = vocab_size, torch.device(device)
        self._own: tuple[SlotProcessor[Any], ...] = (
            Penalties(),
            LogitBias(vocab_size),
            NoRepeatedNgrams(),
            BadWords(tokenizer, vocab_size),
            LengthDecay(),
            MinTokens(),
            Thinking(tokenizer, vocab_size),
        )
        self._given = tuple(processors)
        self._options = np.zeros((64, len(truncation.FIELDS)))  # by slot
        self._seeds: dict[int, tuple[int, int]] = {}  # seed and index, by slot

    def validate(self, params: SamplingParams) -> None:
        """Raises RequestError, naming the field, for parameters that cannot be served."""
        for processor in (*self._own, *self._given):
            processor.validate(params)

    def add(
        self,
        slot: int,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        end_ids: Collection[int],
        seed: int,
        index: int,
    ) -> None:
        """A completion begins: its slot is a free one, `index` its number within the request."""
        if slot in self._seeds:
            raise RequestError(f"slot {slot} is in use", field="slot")
        while slot >= len(self._options):
            self._options = np.concatenate([self._options, np.zeros_like(self._options)])
        self._options[slot] = truncation.options_of(params)
        self._seeds[slot] = seed, index
        self._update(BatchUpdate(added=[(slot, params, prompt_ids)], end_ids={slot: end_ids}))

    def remove(self, slot: int) -> None:
        """A completion ended; its slot is free."""
        del self._seeds[slot]
        self._update(BatchUpdate(removed=[slot]))

    def move(self, slot: int, to: int) -> None:
        """A completion goes to another, free slot."""
        if to in self._seeds:
            raise RequestError(f"slot {to} is in use", field="slot")
        while to >= len(self._options):
            self._options = np.concatenate([self._options, np.zeros_like(self._options)])
        self._options[to] = self._options[slot]
        self._seeds[to] = self._seeds.pop(slot)
        self._update(BatchUpdate(moved=[(slot, to)]))

    def process(self, logits: Tensor, rows: Sequence[LogitsRow]) -> Tensor:
        """Logits (rows, vocab) after all processors, before temperature and filters. The input is not modified."""
        processed = logits
        for own in self._own:
            if concerned := own.concerned(rows):
                processed = logits.clone() if processed is logits else processed  # one copy for all of our own
                own.change(processed, concerned)
        greedy = None
        for given in self._given:
            if given.is_argmax_invariant:
                greedy = not self._rows(rows)[:, 0].any() if greedy is None else greedy
                if greedy:
                    continue
            processed = given.apply(processed, rows)
        return processed

    def sample(self, logits: Tensor, rows: Sequence[LogitsRow]) -> list[int | None]:
        """The next token of each row of logits (rows, vocab), float32. None where no token can be chosen: the logits
        are not all numbers, or all tokens are banned. The other rows are not affected by such a one."""
        processed, fine = self._processed(logits, rows)
        options = self._rows(rows)
        hot = options[:, 0] > 0
        tokens = _argmax(processed) if not hot.all() else torch.zeros(len(rows), dtype=torch.long, device=logits.device)
        drawn = np.flatnonzero(hot & fine)
        if len(drawn):
            numbers = self._numbers([rows[i] for i in drawn.tolist()])
            part, place = _part(processed, drawn)
            for pool in truncation.pools(part, options[drawn]):
                tokens[place[pool.rows]] = truncation.draw(pool, numbers[pool.rows.cpu().numpy()])
        return [token if well else None for token, well in zip(tokens.tolist(), fine.tolist(), strict=True)]

    def distribution(self, logits: Tensor, rows: Sequence[LogitsRow]) -> Tensor:
        """The probabilities that `sample` draws from, (rows, vocab) float32; a greedy row has 1 at its token. A row
        where no token can be chosen is all 0."""
        processed, fine = self._processed(logits, rows)
        options = self._rows(rows)
        result = torch.zeros(processed.shape, device=logits.device)
        greedy = torch.from_numpy(np.flatnonzero((options[:, 0] == 0) & fine)).to(logits.device)
        if len(greedy):
            result[greedy, _argmax(processed)[greedy]] = 1.0
        drawn = np.flatnonzero((options[:, 0] > 0) & fine)
        if len(drawn):
            part, place = _part(processed, drawn)
            for pool in truncation.pools(part, options[drawn]):
                share = (pool.weights / pool.total()).float()
                own = place[pool.rows]
                if pool.ids is None:
                    result[own] = share
                else:
                    result[own[:, None], pool.ids] = share
        return result

    def _processed(
        self, logits: Tensor, rows: Sequence[LogitsRow]
    ) -> tuple[Tensor, np.ndarray[Any, np.dtype[np.bool]]]:
        """Processed logits, and the rows where a token can be chosen, (rows,)."""
        logits = logits.detach().float()
        processed = self.process(logits, rows)
        fine = logits.amax(-1).isfinite()  # the maximum of a row with NaN is NaN
        if processed is not logits:
            fine &= processed.amax(-1).isfinite()
        return processed, fine.cpu().numpy()

    def _rows(self, rows: Sequence[LogitsRow]) -> np.ndarray[Any, Any]:
        return self._options[[row.slot for row in rows]]

    def _numbers(self, rows: Sequence[LogitsRow]) -> np.ndarray[Any, np.dtype[np.float64]]:
        keys = [self._seeds[row.slot] for row in rows]
        return uniforms(
            [seed for seed, _ in keys], [index for _, index in keys], [len(row.output_ids) for row in rows], DRAW
        )

    def _update(self, change: BatchUpdate) -> None:
        for processor in (*self._own, *self._given):
            processor.update(change)


def _part(logits: Tensor, numbers: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
    """The numbered rows, and their numbers as a tensor."""
    place = torch.from_numpy(numbers).to(logits.device)
    return (logits if len(numbers) == len(logits) else logits[place]), place


def _argmax(logits: Tensor) -> Tensor:
    """The first of the highest, (rows,). On a CPU numpy finds it ten times as fast as torch."""
    if logits.device.type == "cpu":
        return torch.from_numpy(np.asarray(logits.numpy().argmax(-1)))
    return logits.argmax(-1)

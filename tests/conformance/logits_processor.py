"""What every logits processor owes the sampler, one by one, in a batch and under speculation.

A module of tests gives cases by a fixture `case` of `ProcessorCase`, and a class that inherits `ProcessorSuite`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gristmill.core import BatchUpdate, LogitsProcessor, LogitsRow, SamplingParams

PROMPT = [5, 6, 7, 5, 6]
NEUTRAL = SamplingParams(max_tokens=1000)


def some_ids(seed: int) -> list[int]:
    """Outputs of few different tokens, so that they repeat."""
    generator = random.Random(seed)
    return [generator.randrange(5, 9) for _ in range(12)]


@dataclass(frozen=True)
class ProcessorCase:
    """A processor and parameters that concern it.

    params: two of them, with different effects. outputs: the output of a number, as the processor would allow it, at
    least six tokens long. end_ids: tokens that end the output.
    """

    name: str
    make: Callable[[], LogitsProcessor]
    params: tuple[SamplingParams, SamplingParams]
    vocab: int = 40
    outputs: Callable[[int], list[int]] = some_ids
    end_ids: tuple[int, ...] = (2, 3)
    neutral: SamplingParams = NEUTRAL
    """Parameters that do not concern it."""

    def __str__(self) -> str:
        return self.name

    def begin(self, slots: Sequence[SamplingParams]) -> LogitsProcessor:
        """A processor with these completions in slots 0, 1, ..."""
        made = self.make()
        for params in slots:
            made.validate(params)
        added = [(slot, params, PROMPT) for slot, params in enumerate(slots)]
        made.update(BatchUpdate(added=added, end_ids=dict.fromkeys(range(len(slots)), self.end_ids)))
        return made

    def logits(self, rows: int, seed: int = 0) -> Tensor:
        """Random logits."""
        return 3 * torch.randn(rows, self.vocab, generator=torch.Generator().manual_seed(seed))

    def alone(self, params: SamplingParams, output: Sequence[int], logits: Tensor) -> Tensor:
        """What a new processor makes of one row (vocab,)."""
        return self.begin([params]).apply(logits[None], [LogitsRow(0, PROMPT, output)])[0]


class ProcessorSuite:
    """The contract, case by case."""

    def test_it_acts_and_leaves_its_input_as_it_was(self, case: ProcessorCase) -> None:
        acted = False
        for params in case.params:
            for length in range(7):
                logits = case.logits(1, length)
                before = logits.clone()
                output = case.outputs(0)[:length]
                found = case.begin([params]).apply(logits, [LogitsRow(0, PROMPT, output)])
                assert torch.equal(logits, before)
                assert output == case.outputs(0)[:length]
                acted |= not torch.equal(found, before)
        assert acted

    def test_rows_it_does_not_concern_stay_as_they_are(self, case: ProcessorCase) -> None:
        logits = case.logits(2)
        rows = [LogitsRow(slot, PROMPT, case.outputs(slot)[:6]) for slot in range(2)]
        assert case.begin([case.neutral, case.neutral]).apply(logits, rows) is logits
        assert torch.equal(case.begin([case.params[0], case.neutral]).apply(logits, rows)[1], logits[1])

    def test_a_batch_is_its_rows_one_by_one(self, case: ProcessorCase) -> None:
        slots = [case.params[0], case.neutral, case.params[1], case.params[0]]
        processor = case.begin(slots)
        for length in range(7):  # state is kept from step to step, and rows come in another order each time
            order = random.Random(length).sample(range(4), 4)
            rows = [LogitsRow(slot, PROMPT, case.outputs(slot)[:length]) for slot in order]
            logits = case.logits(4, length)
            found = processor.apply(logits, rows)
            for at, slot in enumerate(order):
                assert torch.equal(found[at], case.alone(slots[slot], rows[at].output_ids, logits[at]))

    def test_drafts_are_as_if_their_tokens_came_one_by_one(self, case: ProcessorCase) -> None:
        """Rows of one slot, drafts refused, and the output going on in another way."""
        processor = case.begin([case.params[0], case.params[1]])
        branches = [case.outputs(seed)[:6] for seed in range(8)]
        for step, branch in enumerate(branches):
            outputs = [branch[:length] for length in range(step % 3, 6)]
            rows = [LogitsRow(slot, PROMPT, output) for slot in (1, 0) for output in outputs]
            logits = case.logits(len(rows), step)
            found = processor.apply(logits, rows)
            for at, row in enumerate(rows):
                assert torch.equal(found[at], case.alone(case.params[row.slot], row.output_ids, logits[at]))

    def test_slots_are_taken_given_back_and_moved(self, case: ProcessorCase) -> None:
        first, second = case.params
        processor = case.begin([first, second])
        output, logits = case.outputs(0)[:6], case.logits(1)

        def row(slot: int, length: int = 6) -> list[LogitsRow]:
            return [LogitsRow(slot, PROMPT, output[:length])]

        processor.apply(logits, row(1, 5))
        processor.update(BatchUpdate(removed=[0], moved=[(1, 0)]))
        assert torch.equal(processor.apply(logits, row(0))[0], case.alone(second, output, logits[0]))
        processor.update(BatchUpdate(added=[(1, first, PROMPT)], end_ids={1: case.end_ids}))
        assert torch.equal(processor.apply(logits, row(1))[0], case.alone(first, output, logits[0]))
        processor.update(BatchUpdate(removed=[0], added=[(0, case.neutral, PROMPT)]))
        assert processor.apply(logits, row(0)) is logits
        processor.update(BatchUpdate(removed=[0, 1]))
        assert processor.apply(logits, row(1)) is logits  # no trace is left

    def test_its_claim_about_the_most_probable_token_holds(self, case: ProcessorCase) -> None:
        changed = False
        for seed in range(200):
            logits, output = case.logits(1, seed), case.outputs(seed)[: seed % 7]
            found = case.alone(case.params[seed % 2], output, logits[0])
            changed |= int(found.argmax()) != int(logits[0].argmax())
        assert changed != case.make().is_argmax_invariant

"""Train on short sequences first and on long ones later: short ones are cheaper, and most is learned from them.

A stage cuts the segments of the same packed batches, so every step has as many tokens as it would have had: more
sequences while they are short, fewer once they are long.

Source: Devlin et al. 2019 (BERT), appendix A.2: 90% of the steps at 128 tokens, the rest at 512.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gristmill.core import Loader
from gristmill.errors import GristmillError
from gristmill.tokens.batch import IGNORED, PackedBatch


@dataclass(frozen=True)
class Stage:
    """Steps first to end - 1, counted from 0, at most `length` tokens a sequence."""

    first: int
    end: int
    length: int


@dataclass(frozen=True)
class LengthSchedule:
    """Stages as (share of the steps, tokens a sequence), in order. `BERT` is the schedule of that model.

    Raises GristmillError, naming the stage, when a share is not above 0, shares do not add up to 1 or a length is
    below 2 (one token has nothing to predict).
    """

    stages: tuple[tuple[float, int], ...]

    def __post_init__(self) -> None:
        for number, (share, length) in enumerate(self.stages):
            if not 0.0 < share <= 1.0:
                raise GristmillError(f"stages[{number}]: the share of steps must be in (0, 1], got {share}")
            if not isinstance(length, int) or length < 2:
                raise GristmillError(f"stages[{number}]: the length must be a whole number from 2 on, got {length!r}")
        total = math.fsum(share for share, _ in self.stages)
        if not math.isclose(total, 1.0, rel_tol=1e-9):
            raise GristmillError(f"the shares of the stages must add up to 1, got {total}")

    def over(self, steps: int) -> tuple[Stage, ...]:
        """The stages of a run of so many steps, without gap; borders are rounded to whole steps.

        Raises GristmillError when the run is so short that a stage has no step.
        """
        found, done = [], 0.0
        for number, (share, length) in enumerate(self.stages):
            first, done = round(done * steps), done + share
            end = steps if number == len(self.stages) - 1 else round(done * steps)
            if end <= first:
                raise GristmillError(f"stages[{number}], {share} of {steps} steps, has no step: train for more steps")
            found.append(Stage(first, end, length))
        return tuple(found)

    def at(self, step: int, steps: int) -> int:
        """Tokens a sequence in a step, counted from 0, of a run of `steps`. Raises GristmillError as `over`, and for a
        step outside."""
        for stage in self.over(steps):
            if stage.first <= step < stage.end:
                return stage.length
        raise GristmillError(f"step {step} is outside a run of {steps} steps (0 to {steps - 1})")


BERT = LengthSchedule(((0.9, 128), (0.1, 512)))


class ScheduledLoader:
    """A `Loader` whose batches have the length of their stage: pass it to `train` in place of the inner one.

    steps and micro_batches are those of the TrainConfig; the schedule belongs into the run's identity. What it gives
    for a batch number is fixed, so a run resumes exactly.
    """

    def __init__(self, inner: Loader, schedule: LengthSchedule, *, steps: int, micro_batches: int = 1) -> None:
        self.inner, self.schedule, self.steps, self.micro_batches = inner, schedule, steps, micro_batches
        schedule.over(steps)  # complain now

    @property
    def batches_per_epoch(self) -> int:
        """See `Loader`."""
        return self.inner.batches_per_epoch

    def batch(self, number: int) -> PackedBatch:
        """See `Loader`: batches are counted through the micro-batches of all steps. Raises GristmillError for batches
        of another kind than `PackedBatch`, whose segments may not be cut."""
        length = self.schedule.at(number // self.micro_batches, self.steps)
        batch = self.inner.batch(number)
        if not isinstance(batch, PackedBatch):
            raise GristmillError(
                f"a length schedule cuts packed batches, but this objective makes a {type(batch).__name__}. Train each "
                "stage on its own instead, with a loader of that stage's row_length."
            )
        return cut_to_length(batch, length)


def cut_to_length(batch: PackedBatch, length: int) -> PackedBatch:
    """Cut longer segments into pieces of `length` tokens and a remainder, each a segment of its own.

    All tokens stay, in order. Positions start again in each piece, and its last token has no target any more. A batch
    without longer segments comes back as it is. Raises GristmillError when `length` is below 2.
    """
    if length < 2:
        raise GristmillError(f"sequences must keep at least 2 tokens, one to read and one to predict, got {length}")
    if max(batch.segment_lengths) <= length:
        return batch
    lengths: list[int] = []
    for whole in batch.segment_lengths:
        pieces, rest = divmod(whole, length)
        lengths += [length] * pieces + [rest] * (rest > 0)
    positions = batch.position_ids % length
    targets = torch.where(positions == length - 1, IGNORED, batch.target_ids)
    return PackedBatch(batch.input_ids, targets, positions, tuple(lengths))

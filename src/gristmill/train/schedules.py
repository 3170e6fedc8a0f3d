"""Learning rate and batch size as functions of how much of the run is done. Pure: nothing to save or restore.

A step is given the share that is done when it ends: with n equal steps, step k of n, counted from 0, is given
(k + 1) / n. So the first step already learns and the last one has the final rate. Schedulers that give step k the
factor of k (torch, transformers) are the same function one step later: theirs at step k is ours at done = k / n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from gristmill.errors import GristmillError, closest

Schedule = Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"]
DecayShape = Literal["linear", "1-sqrt"]


def learning_rate(
    done: float,
    kind: Schedule,
    *,
    peak: float,
    warmup: float = 0.0,
    final: float = 0.0,
    decay: float = 0.2,
    decay_shape: DecayShape = "1-sqrt",
) -> float:
    """The rate at share `done` of the run, in [0, 1]: from 0 in a straight line to `peak` at `warmup`, then by `kind`.

    constant stays; linear and cosine fall to `final` times the peak at the end; wsd (warm-up, stable, decay) stays and
    falls over the last share `decay` of the run, in a straight line or as 1 - sqrt; inverse_sqrt falls as
    sqrt(warmup / done), never below `final` times the peak. `decay` and `decay_shape` are of wsd alone. Options are
    checked by `check_schedule`, not here.

    Source: Bergsma et al. 2025 (linear to zero); Loshchilov and Hutter 2017 (cosine); Vaswani et al. 2017 (inverse
    square root); Hu et al. 2024 (wsd); Hägele et al. 2024 (1 - sqrt).
    """
    if done < warmup:
        return peak * done / warmup
    falls = 1.0 - warmup  # the share of the run in which the rate may fall
    share = (done - warmup) / falls if falls > 0.0 else 0.0
    if kind == "constant":
        return peak
    if kind == "inverse_sqrt":
        return peak * max(final, math.sqrt(warmup / done))
    if kind == "linear":
        left = 1.0 - share
    elif kind == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * share))
    else:
        share = max(0.0, 1.0 - (1.0 - done) / decay) if decay > 0.0 else 0.0
        left = 1.0 - (share if decay_shape == "linear" else math.sqrt(share))
    return peak * (final + (1.0 - final) * max(0.0, left))


def check_schedule(
    kind: str, *, warmup: float, final: float = 0.0, decay: float = 0.2, decay_shape: str = "1-sqrt"
) -> None:
    """Raise GristmillError, naming the option, for one that `learning_rate` cannot follow."""
    for name, value, known in (
        ("schedule", kind, get_args(Schedule)),
        ("decay_shape", decay_shape, get_args(DecayShape)),
    ):
        if value not in known:
            raise GristmillError(f"{name} must be one of {', '.join(known)}, got {value!r}.{closest(value, known)}")
    for name, share in (("warmup", warmup), ("final", final), ("decay", decay)):
        if not 0.0 <= share <= 1.0:
            raise GristmillError(f"{name} must be in [0, 1], got {share}")
    if kind == "wsd" and warmup + decay > 1.0 + 1e-9:
        raise GristmillError(f"warmup ({warmup}) and decay ({decay}) of schedule wsd are more than the whole run")
    if kind == "inverse_sqrt" and warmup == 0.0:
        raise GristmillError("schedule inverse_sqrt needs a warmup above 0: the rate falls as sqrt(warmup / done)")


@dataclass(frozen=True)
class StepRun:
    """`steps` steps in a row, from step `first` counted from 0, of `batches` loader batches each."""

    first: int
    steps: int
    batches: int


@dataclass(frozen=True)
class BatchGrowth:
    """Loader batches a step, as stages (from this many tokens on, batches): a step function of the tokens done.

    A step is as large as the stage it begins in. Raises GristmillError, naming the stage, unless the first begins at
    0, each begins after the one before and has at least one batch.

    Source: Smith et al. 2018; McCandlish et al. 2018.
    """

    stages: tuple[tuple[int, int], ...] = ((0, 1),)

    def __post_init__(self) -> None:
        if not self.stages or self.stages[0][0] != 0:
            raise GristmillError(f"batch growth: the first stage must begin at 0 tokens, got {self.stages}")
        for number, (start, batches) in enumerate(self.stages):
            if number and start <= self.stages[number - 1][0]:
                raise GristmillError(
                    f"batch growth: stages[{number}] begins at {start} tokens, not after the one before"
                )
            if batches < 1:
                raise GristmillError(f"batch growth: stages[{number}] has {batches} batches a step, needs at least 1")

    def at(self, tokens_done: int) -> int:
        """Loader batches of the step that begins after so many tokens."""
        return next(batches for start, batches in reversed(self.stages) if tokens_done >= start)

    def steps(self, token_budget: int, tokens_per_batch: int) -> list[StepRun]:
        """The exact steps of a run: their batches times `tokens_per_batch` add up to the budget.

        The last step has fewer batches when the budget ends within it. Raises GristmillError when the budget is not a
        whole number of batches.
        """
        if token_budget < 1 or tokens_per_batch < 1 or token_budget % tokens_per_batch:
            near = max(1, round(token_budget / max(1, tokens_per_batch))) * tokens_per_batch
            raise GristmillError(
                f"a budget of {token_budget} tokens is not a whole number of batches of {tokens_per_batch}; use {near}"
            )
        runs: list[StepRun] = []
        step, done, total = 0, 0, token_budget // tokens_per_batch
        while done < total:
            batches = self.at(done * tokens_per_batch)
            later = [-(-start // tokens_per_batch) for start, _ in self.stages if start > done * tokens_per_batch]
            border = min([total, *later])
            # the step in which a stage ends is whole; only the end of the budget cuts one short
            steps = min(-(-(border - done) // batches), (total - done) // batches)
            if steps == 0:
                steps, batches = 1, total - done
            runs.append(StepRun(step, steps, batches))
            step, done = step + steps, done + steps * batches
        return runs


def batches_before(runs: Sequence[StepRun], step: int) -> int:
    """How many loader batches the steps before `step`, counted from 0, have taken: where the loader goes on."""
    return sum(run.batches * min(run.steps, max(0, step - run.first)) for run in runs)

"""Pipeline schedules on paper: who works on which micro-batch when, and how much time is lost.

A schedule is an order of jobs for every worker. A worker begins its next job as soon as it is free and the jobs that
this one needs are done. Time is counted in slots: with the default durations, one forward or backward of one
micro-batch through one stage.

Source: Huang et al. 2019 (GPipe); Narayanan et al. 2019 (one forward, one backward).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gristmill.errors import RequestError


@dataclass(frozen=True, order=True)
class Job:
    """One pass of micro-batch `micro` through stage `stage`, both counted from 0."""

    stage: int
    micro: int
    backward: bool

    def __str__(self) -> str:
        return f"B{self.stage + 1},{self.micro + 1}{'↓' if self.backward else '↑'}"

    def needs(self, stages: int) -> list[Job]:
        """The jobs that must be done before, at `stages` stages."""
        if not self.backward:
            return [Job(self.stage - 1, self.micro, False)] if self.stage else []
        own = Job(self.stage, self.micro, False)
        return [own] if self.stage == stages - 1 else [own, Job(self.stage + 1, self.micro, True)]


Schedule = tuple[tuple[Job, ...], ...]
"""For each worker, which owns the stage of its own number, the jobs in the order it does them."""


@dataclass(frozen=True)
class Placed:
    """A job and when it runs: from slot `start` to before `end`."""

    start: float
    end: float
    job: Job


@dataclass(frozen=True)
class Timeline:
    """What a schedule comes to. `placed` is in the order of starting, the lower stage first at the same time."""

    stages: int
    placed: tuple[Placed, ...]

    @property
    def slots(self) -> float:
        """Time until the last job is done."""
        return max(item.end for item in self.placed)

    @property
    def utilisation(self) -> float:
        """Share of all workers' time in which they work."""
        return sum(item.end - item.start for item in self.placed) / (self.stages * self.slots)

    @property
    def bubble(self) -> float:
        """Share in which they wait; (S - 1) / (M + S - 1) for GPipe and 1F1B with S stages of equal jobs, M
        micro-batches."""
        return 1 - self.utilisation

    @property
    def trace(self) -> list[Job]:
        """The jobs in the order of starting."""
        return [item.job for item in self.placed]

    def most_kept(self, stage: int) -> int:
        """Most micro-batches whose activations a worker holds at a time: forwards begun, backwards not yet done."""
        now = most = 0
        for job in self.trace:
            if job.stage == stage:
                now += -1 if job.backward else 1
                most = max(most, now)
        return most

    def __str__(self) -> str:
        """One line a worker, a column a slot, when every job takes one: 1 2 3 forward, a b c backward, . idle."""
        rows = [["."] * round(self.slots) for _ in range(self.stages)]
        for item in self.placed:
            if (item.start, item.end) != (round(item.start), round(item.start) + 1):
                raise RequestError("only a timeline of one-slot jobs can be drawn; use its placed jobs instead")
            symbols = "abcdefghijklmnopqrstuvwxyz" if item.job.backward else "123456789"
            rows[item.job.stage][round(item.start)] = symbols[item.job.micro % 9]
        return "\n".join("".join(row) for row in rows)


def one_after_another(stages: int) -> Schedule:
    """Inter-layer model parallelism without micro-batches: up through all stages and down again, one at a time."""
    return gpipe(stages, 1)


def gpipe(stages: int, micro_batches: int) -> Schedule:
    """All forwards, then all backwards, the last micro-batch first. Holds all micro-batches' activations.

    Source: Huang et al. 2019, figure 2c.
    """
    _check(stages, micro_batches)
    up, down = range(micro_batches), reversed(range(micro_batches))
    order = [(micro, False) for micro in up] + [(micro, True) for micro in down]
    return tuple(tuple(Job(stage, *item) for item in order) for stage in range(stages))


def one_forward_one_backward(stages: int, micro_batches: int) -> Schedule:
    """After a start of forwards, a forward and a backward in turn. Stage s of S holds at most S - s micro-batches.

    Source: Narayanan et al. 2019 (PipeDream), with a flush at the end: Narayanan et al. 2021, figure 4.
    """
    _check(stages, micro_batches)
    schedule = []
    for stage in range(stages):
        ahead = min(stages - 1 - stage, micro_batches)
        jobs = [Job(stage, micro, False) for micro in range(ahead)]
        for micro in range(micro_batches):
            if micro + ahead < micro_batches:
                jobs.append(Job(stage, micro + ahead, False))
            jobs.append(Job(stage, micro, True))
        schedule.append(tuple(jobs))
    return tuple(schedule)


def simulate(
    schedule: Schedule, *, forward: float = 1.0, backward: float = 1.0, slowness: Sequence[float] | None = None
) -> Timeline:
    """Run a schedule on paper. `forward` and `backward`: slots of a job; `slowness[s]` multiplies those of worker s.

    Raises RequestError when workers wait for each other without end, a job is missing, stands twice or belongs to
    another worker, or a duration is not above 0.
    """
    stages = len(schedule)
    factors = [1.0] * stages if slowness is None else list(slowness)
    if len(factors) != stages or min([forward, backward, *factors]) <= 0:
        raise RequestError(f"durations must be above 0, and slowness one factor for each of {stages} workers")
    _check_jobs(schedule)
    done: dict[Job, Placed] = {}
    following, free = [0] * stages, [0.0] * stages
    while len(done) < sum(map(len, schedule)):
        before = len(done)
        for stage, jobs in enumerate(schedule):
            while following[stage] < len(jobs):
                job = jobs[following[stage]]
                needs = job.needs(stages)
                if not all(need in done for need in needs):
                    break
                start = max([free[stage], *(done[need].end for need in needs)])
                free[stage] = start + (backward if job.backward else forward) * factors[stage]
                done[job] = Placed(start, free[stage], job)
                following[stage] += 1
        if len(done) == before:
            waiting = [str(jobs[at]) for jobs, at in zip(schedule, following, strict=True) if at < len(jobs)]
            raise RequestError(f"the schedule never ends: {', '.join(waiting)} wait for each other")
    return Timeline(stages, tuple(sorted(done.values(), key=lambda item: (item.start, item.job.stage))))


def _check(stages: int, micro_batches: int) -> None:
    for name, value in (("stages", stages), ("micro_batches", micro_batches)):
        if value < 1:
            raise RequestError(f"{name} must be at least 1, got {value}", field=name)


def _check_jobs(schedule: Schedule) -> None:
    """Every worker does both passes of the same micro-batches, once each, for its own stage."""
    if not schedule or not schedule[0]:
        raise RequestError("a schedule needs at least one worker and one job", field="schedule")
    micros = {job.micro for job in schedule[0]}
    for stage, jobs in enumerate(schedule):
        expected = sorted(Job(stage, micro, backward) for micro in micros for backward in (False, True))
        if sorted(jobs) != expected:
            raise RequestError(
                f"worker {stage} must do the forward and backward of stage {stage} once for each of "
                f"{len(micros)} micro-batches",
                field="schedule",
            )

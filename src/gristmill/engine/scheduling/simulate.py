"""Batching without a model: which sequence computes what in each iteration, and when its tokens come.

Request-level scheduling sends a batch and waits until all of it is done. Iteration-level scheduling lets sequences
leave and join between any two iterations (continuous batching); with `chunked`, a long prompt is spread over several.

Source: Yu et al. 2022 (Orca); Agrawal et al. 2023 (Sarathi).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from gristmill.engine.metrics.timing import LoadSummary, RequestTiming, summarise
from gristmill.engine.scheduling.policies import FirstCome, Policy
from gristmill.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request to simulate. arrives and deadline are in the units of the cost function."""

    name: str
    prompt: int = 1
    output: int = 1
    arrives: float = 0.0
    priority: int = 0
    deadline: float | None = None
    user: str = ""

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.output < 1:
            raise RequestError(f"job {self.name}: prompt and output must be at least 1", field="prompt")


@dataclass(frozen=True, slots=True)
class Part:
    """What an iteration computes of one job: `tokens` of its prompt, or one decode step."""

    name: str
    kind: Literal["prefill", "decode"]
    tokens: int


@dataclass(frozen=True, slots=True)
class Iteration:
    """One iteration; `seats` are taken by the running jobs, some of which may compute nothing."""

    start: float
    end: float
    parts: tuple[Part, ...]
    seats: int
    waiting: tuple[str, ...]


@dataclass(slots=True)
class Trace:
    """All iterations, and by job: when each output token came, and when the answer was handed over."""

    iterations: list[Iteration] = field(default_factory=list)
    timings: dict[str, RequestTiming] = field(default_factory=dict)
    finished: dict[str, float] = field(default_factory=dict)

    def summary(self) -> LoadSummary:
        """Latency and throughput of all jobs."""
        return summarise(list(self.timings.values()))

    def busy(self, capacity: int) -> float:
        """Share of the seats of all iterations that computed something."""
        return sum(len(step.parts) for step in self.iterations) / (capacity * len(self.iterations))

    def table(self) -> str:
        """One line for each iteration: what is computed, and who waits."""
        lines = []
        for number, step in enumerate(self.iterations, start=1):
            parts = ", ".join(f"{p.kind[0].upper()}({p.name}){p.tokens if p.tokens > 1 else ''}" for p in step.parts)
            lines.append(f"{number:>3}  {parts}" + (f"  waiting: {', '.join(step.waiting)}" if step.waiting else ""))
        return "\n".join(lines)


Cost = Callable[[Sequence[Part]], float]


def one_per_iteration(parts: Sequence[Part]) -> float:
    """Every iteration takes 1: time counts iterations."""
    return 1.0


def one_per_token(parts: Sequence[Part]) -> float:
    """An iteration takes as long as it has tokens: bound by computing."""
    return float(sum(part.tokens for part in parts))


def reading_or_computing(reading: float, computing: float) -> Cost:
    """The roofline: an iteration takes `reading` for the weights, or `computing` per token where that is longer."""
    return lambda parts: max(reading, computing * sum(part.tokens for part in parts))


@dataclass(eq=False, slots=True)
class _Seat:
    """A job in the making: what a policy reads of a sequence."""

    job: Job
    arrival: int
    token_ids: list[int]
    computed: int = 0
    times: list[float] = field(default_factory=list)

    @property
    def arrived_at(self) -> float:
        return self.job.arrives

    @property
    def priority(self) -> int:
        return self.job.priority

    @property
    def deadline(self) -> float | None:
        return self.job.deadline

    @property
    def user(self) -> str:
        return self.job.user

    @property
    def num_prompt_tokens(self) -> int:
        return self.job.prompt

    @property
    def num_missing_tokens(self) -> int:
        return len(self.token_ids) - self.computed


@dataclass(slots=True, kw_only=True)
class Simulator:
    """Runs jobs. capacity: most of them at once. token_budget: most tokens of an iteration, None for no limit; with
    `chunked` a prompt takes what is left of it, without it a prompt waits until it fits whole (or is alone).
    request_level: nobody joins before all of the batch are done, and all answers are handed over then.
    prefill_emits: the prefill gives the first token, so that n tokens take n iterations; False counts n + 1.

    Raises RequestError for an option out of range.
    """

    capacity: int
    policy: Policy = field(default_factory=FirstCome)
    token_budget: int | None = None
    chunked: bool = False
    request_level: bool = False
    prefill_emits: bool = True
    cost: Cost = one_per_iteration
    _running: list[_Seat] = field(init=False, default_factory=list)
    _waiting: list[_Seat] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        if self.capacity < 1 or (self.token_budget is not None and self.token_budget < 1):
            raise RequestError("capacity and token_budget must be at least 1", field="capacity")
        if self.chunked and self.token_budget is None:
            raise RequestError("chunked prefill needs a token_budget", field="token_budget")

    def run(self, jobs: Sequence[Job]) -> Trace:
        """Simulate until all jobs are done. Raises RequestError for two jobs of one name."""
        if len({job.name for job in jobs}) < len(jobs):
            raise RequestError("two jobs have the same name", field="jobs")
        ordered = sorted(jobs, key=lambda job: job.arrives)
        seats = [_Seat(job, number, [0] * job.prompt) for number, job in enumerate(ordered)]
        self._running, self._waiting = [], []
        trace, now, coming = Trace(), 0.0, 0
        while len(trace.finished) < len(seats):
            while coming < len(seats) and seats[coming].job.arrives <= now:
                self._waiting.append(seats[coming])
                coming += 1
            if not self._running and not self._waiting:
                now = seats[coming].job.arrives
                continue
            work = self._choose(now)
            parts = tuple(Part(s.job.name, "prefill" if not self._prefilled(s) else "decode", n) for s, n in work)
            end = now + self.cost(parts)
            left = tuple(seat.job.name for seat in self._waiting)
            trace.iterations.append(Iteration(now, end, parts, len(self._running), left))
            now = end
            self._advance(work, now, trace)
        return trace

    def _choose(self, now: float) -> list[tuple[_Seat, int]]:
        """The jobs of an iteration and their tokens; who is admitted moves to the running ones."""
        joins = not (self.request_level and self._running)
        work: list[tuple[_Seat, int]] = []
        if not self.policy.running_first and joins:
            self._admit(work, now)
        begun = {id(seat) for seat, _ in work}
        # within the running ones, unfinished prompts go before or after decoding ones as the policy says
        decodes_last = not self.policy.running_first
        order = sorted(
            (seat for seat in self._running if id(seat) not in begun),
            key=lambda seat: (self._prefilled(seat) == decodes_last, self.policy.key(seat, now)),
        )
        for seat in order:
            if len(seat.times) < seat.job.output:
                self._take(work, seat)
        if self.policy.running_first and joins:
            self._admit(work, now)
        return work

    def _admit(self, work: list[tuple[_Seat, int]], now: float) -> None:
        for seat in sorted(self._waiting, key=lambda seat: self.policy.key(seat, now)):
            if len(self._running) == self.capacity or not self._take(work, seat):
                break
            self._waiting.remove(seat)
            self._running.append(seat)

    def _take(self, work: list[tuple[_Seat, int]], seat: _Seat) -> bool:
        """Add a job with the tokens that the budget leaves for it, if any."""
        tokens = seat.num_missing_tokens
        if self.token_budget is not None:
            left = self.token_budget - sum(count for _, count in work)
            if self.chunked:
                tokens = min(tokens, left)
            elif tokens > left and work:
                return False
        if tokens < 1:
            return False
        work.append((seat, tokens))
        self.policy.serve(seat, tokens)
        return True

    def _advance(self, work: list[tuple[_Seat, int]], now: float, trace: Trace) -> None:
        for seat, tokens in work:
            emits = self._prefilled(seat) or (self.prefill_emits and seat.computed + tokens >= seat.job.prompt)
            seat.computed += tokens
            if emits:
                seat.times.append(now)
            if emits or seat.computed == seat.job.prompt:
                # the token to compute next; a prefill that emits nothing leaves the first one to the next iteration
                seat.token_ids.append(0)
        done = [seat for seat in self._running if len(seat.times) == seat.job.output]
        if self.request_level and len(done) < len(self._running):
            return
        for seat in done:
            self._running.remove(seat)
            trace.timings[seat.job.name] = RequestTiming(seat.job.arrives, seat.times, seat.job.prompt)
            trace.finished[seat.job.name] = now

    def _prefilled(self, seat: _Seat) -> bool:
        return seat.computed >= seat.job.prompt


@dataclass(frozen=True, slots=True)
class BatchPoint:
    """A batch size, output tokens per unit of time, and the time from the batch's start to its last token."""

    batch_size: int
    throughput: float
    latency: float


def sweep_batch_sizes(batch_sizes: Sequence[int], *, prompt: int, output: int, cost: Cost) -> list[BatchPoint]:
    """One full batch of each size, all of it queued from the start: what throughput costs in latency."""
    points = []
    for size in batch_sizes:
        jobs = [Job(name=str(number), prompt=prompt, output=output) for number in range(size)]
        summary = Simulator(capacity=size, cost=cost).run(jobs).summary()
        points.append(BatchPoint(size, summary.output_throughput, summary.duration))
    return points


def pareto(points: Sequence[BatchPoint]) -> list[BatchPoint]:
    """Those that no other beats in one of throughput and latency without losing in the other, by latency."""
    best, front = 0.0, []
    for point in sorted(points, key=lambda p: (p.latency, -p.throughput)):
        if point.throughput > best:
            best = point.throughput
            front.append(point)
    return front


def pareto_table(points: Sequence[BatchPoint]) -> str:
    """The points as a Markdown table; those of the Pareto front are starred."""
    front = pareto(points)
    rows = (
        f"| {point.batch_size} | {point.throughput:.4g} | {point.latency:.4g} | {'*' if point in front else ''} |"
        for point in points
    )
    return "\n".join(("| batch | tokens per unit | latency | front |", "|--:|--:|--:|---|", *rows))

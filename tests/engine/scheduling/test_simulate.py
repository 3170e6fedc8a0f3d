"""Batching without a model: the worked traces, and what must hold of any trace."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.engine.scheduling.policies import FairShare, FirstCome, PriorityFirst, ShortestFirst
from gristmill.engine.scheduling.simulate import (
    BatchPoint,
    Job,
    Part,
    Simulator,
    Trace,
    one_per_token,
    pareto,
    pareto_table,
    reading_or_computing,
    sweep_batch_sizes,
)
from gristmill.errors import RequestError

# x3 is there from iteration 3 on, x4 and x5 from iteration 6 on
FIVE = [
    Job(name="x1", output=6),
    Job(name="x2", output=4),
    Job(name="x3", output=3, arrives=2),
    Job(name="x4", output=2, arrives=5),
    Job(name="x5", output=2, arrives=5),
]


def compact(trace: Trace) -> list[str]:
    return [" ".join(f"{p.kind[0].upper()}{p.name[1:]}" for p in step.parts) for step in trace.iterations]


def test_continuous_batching_takes_nine_iterations() -> None:
    trace = Simulator(capacity=3, prefill_emits=False).run(FIVE)
    assert [" ".join(sorted(line.split(), key=lambda w: w[1])) for line in compact(trace)] == [
        "P1 P2",
        "D1 D2",
        "D1 D2 P3",
        "D1 D2 D3",
        "D1 D2 D3",
        "D1 D3 P4",
        "D1 D4 P5",
        "D4 D5",
        "D5",
    ]
    assert trace.iterations[5].waiting == ("x5",)
    assert trace.finished == {"x2": 5, "x3": 6, "x1": 7, "x4": 8, "x5": 9}
    assert "waiting: x5" in trace.table()


def test_request_level_takes_eleven_and_nobody_joins_a_running_batch() -> None:
    trace = Simulator(capacity=3, prefill_emits=False, request_level=True).run(FIVE)
    assert trace.finished == {"x1": 7, "x2": 7, "x3": 11, "x4": 11, "x5": 11}
    assert len(trace.iterations) == 11
    members = [{part.name for part in step.parts} for step in trace.iterations]
    for batch in (members[:7], members[7:]):
        assert all(later <= earlier for earlier, later in pairwise(batch))
    assert members[7] == {"x3", "x4", "x5"}


def test_where_the_prefill_gives_the_first_token_it_is_seven_against_nine() -> None:
    trace = Simulator(capacity=3).run(FIVE)
    assert trace.finished == {"x2": 4, "x3": 5, "x1": 6, "x4": 7, "x5": 7}
    assert len(trace.iterations) == 7
    assert len(Simulator(capacity=3, request_level=True).run(FIVE).iterations) == 9


def test_one_more_token_each_gives_the_table_of_the_other_convention() -> None:
    longer = [Job(name=job.name, output=job.output + 1, arrives=job.arrives) for job in FIVE]
    assert compact(Simulator(capacity=3).run(longer)) == compact(Simulator(capacity=3, prefill_emits=False).run(FIVE))


def test_an_urgent_request_is_in_the_next_iteration() -> None:
    jobs = [Job(name="a", output=9), Job(name="b", output=2), Job(name="c", output=9), Job(name="d", output=9)]
    urgent = Job(name="urgent", priority=-1, arrives=2)
    trace = Simulator(capacity=2, policy=PriorityFirst()).run([*jobs, urgent])
    # b leaves after iteration 2; c and d are older than the urgent one
    assert trace.iterations[2].parts == (Part("a", "decode", 1), Part("urgent", "prefill", 1))


def chunked_trace(budget: int | None) -> Trace:
    """A sequence that decodes, and a prompt of 12 that arrives; time counts tokens."""
    decoding, prompt = Job(name="2", output=8), Job(name="1", prompt=12, output=2, arrives=1)
    return Simulator(capacity=2, token_budget=budget, chunked=budget is not None, cost=one_per_token).run(
        [decoding, prompt]
    )


def test_chunked_prefill_bounds_the_gap_of_running_sequences() -> None:
    whole, chunked = chunked_trace(None), chunked_trace(5)
    assert [step.end - step.start for step in whole.iterations[1:2]] == [13]
    assert [step.end - step.start for step in chunked.iterations[1:4]] == [5, 5, 5]
    assert max(whole.timings["2"].inter_token_latencies) == 13
    assert max(chunked.timings["2"].inter_token_latencies) == 5
    assert whole.timings["1"].time_to_first_token == 13
    assert chunked.timings["1"].time_to_first_token == 15
    for trace, out in ((whole, 1), (chunked, 3)):
        first = trace.timings["1"].token_times[0]
        assert sum(1 < moment <= first for moment in trace.timings["2"].token_times) == out
    # the second decode step runs beside the second chunk, where it had to wait for the whole prompt
    assert [part.name for part in chunked.iterations[2].parts] == ["2", "1"]


def test_prefill_first_answers_sooner_and_faster_and_decode_first_more_evenly() -> None:
    """Prompts that fill an iteration: either they hold up who is running, or they wait until nobody is."""
    jobs = [Job(name=str(i), prompt=20, output=30, arrives=25.0 * i) for i in range(12)]
    cost = reading_or_computing(10, 1)
    prefill, decode = (
        Simulator(capacity=8, policy=FirstCome(running_first), token_budget=20, cost=cost).run(jobs)
        for running_first in (False, True)
    )
    sooner, later = prefill.summary(), decode.summary()
    assert sooner.time_to_first_token.mean < later.time_to_first_token.mean
    assert sooner.output_throughput > later.output_throughput
    worst = [max(max(t.inter_token_latencies) for t in trace.timings.values()) for trace in (prefill, decode)]
    assert worst[1] < worst[0]


def test_finishing_a_batch_first_gives_even_tokens_and_late_first_ones() -> None:
    """Decode first in the strict sense: lower gaps of the running requests only; who waits, waits longer."""
    jobs = [Job(name=str(i), prompt=16, output=12, arrives=9.0 * i) for i in range(8)]
    batches, joined = (
        Simulator(capacity=4, request_level=level, cost=one_per_token).run(jobs) for level in (True, False)
    )
    worst = [max(max(t.inter_token_latencies) for t in trace.timings.values()) for trace in (batches, joined)]
    assert worst[0] < worst[1]
    assert batches.summary().time_to_first_token.mean > joined.summary().time_to_first_token.mean
    assert batches.busy(4) < joined.busy(4)


def test_throughput_and_latency_grow_with_the_batch() -> None:
    sizes = [1, 2, 4, 8, 16, 32, 64]
    points = sweep_batch_sizes(sizes, prompt=1, output=16, cost=reading_or_computing(16, 1))
    throughput, latency = [p.throughput for p in points], [p.latency for p in points]
    assert throughput == sorted(throughput)
    assert latency == sorted(latency)
    assert throughput[:5] == pytest.approx([size / 16 for size in sizes[:5]])
    assert throughput[4:] == pytest.approx([1.0] * 3), "computing binds: no more is to be had"
    assert [p.batch_size for p in pareto(points)] == [16], "the same latency, more tokens, up to the ridge"
    table = pareto_table(points).splitlines()
    assert len(table) == 2 + len(sizes)
    assert [line.endswith("| * |") for line in table[2:]] == [size == 16 for size in sizes]


def test_the_front_leaves_out_what_another_point_beats() -> None:
    a, b, c = BatchPoint(1, 1.0, 1.0), BatchPoint(2, 3.0, 2.0), BatchPoint(4, 2.0, 3.0)
    assert pareto([c, b, a]) == [a, b]


jobs_of_any_kind = st.lists(
    st.builds(
        lambda prompt, output, arrives, priority: (prompt, output, arrives, priority),
        st.integers(1, 12),
        st.integers(1, 8),
        st.integers(0, 30),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=12,
)
policies = st.sampled_from([FirstCome, ShortestFirst, PriorityFirst, FairShare])


@given(
    work=jobs_of_any_kind,
    capacity=st.integers(1, 4),
    budget=st.none() | st.integers(1, 9),
    chunked=st.booleans(),
    policy=policies,
    running_first=st.booleans(),
    request_level=st.booleans(),
    emits=st.booleans(),
)
def test_nothing_starves_nothing_is_lost_and_no_bound_is_passed(
    work: list[tuple[int, int, int, int]],
    capacity: int,
    budget: int | None,
    chunked: bool,
    policy: type[FirstCome],
    running_first: bool,
    request_level: bool,
    emits: bool,
) -> None:
    jobs = [
        Job(name=str(i), prompt=p, output=o, arrives=a, priority=w, user=str(i % 2))
        for i, (p, o, a, w) in enumerate(work)
    ]
    chunked = chunked and budget is not None
    simulator = Simulator(
        capacity=capacity,
        policy=policy(running_first),
        token_budget=budget,
        chunked=chunked,
        request_level=request_level,
        prefill_emits=emits,
    )
    trace = simulator.run(jobs)
    total = {kind: dict.fromkeys((job.name for job in jobs), 0) for kind in ("prefill", "decode")}
    for step in trace.iterations:
        assert 1 <= len(step.parts) <= step.seats <= capacity
        assert len({part.name for part in step.parts}) == len(step.parts)
        tokens = sum(part.tokens for part in step.parts)
        assert tokens <= (math.inf if budget is None else budget) or (not chunked and len(step.parts) == 1)
        for part in step.parts:
            total[part.kind][part.name] += part.tokens
    for job in jobs:
        assert total["prefill"][job.name] == job.prompt
        assert total["decode"][job.name] == job.output - emits
        assert len(trace.timings[job.name].token_times) == job.output
        assert trace.finished[job.name] >= trace.timings[job.name].token_times[-1]
    assert trace.iterations[-1].waiting == ()


@pytest.mark.parametrize(
    "options", [{"capacity": 0}, {"capacity": 1, "token_budget": 0}, {"capacity": 1, "chunked": True}]
)
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(RequestError):
        Simulator(**options)  # type: ignore[arg-type]


def test_two_jobs_of_one_name_are_refused() -> None:
    with pytest.raises(RequestError, match="same name"):
        Simulator(capacity=1).run([Job(name="a"), Job(name="a")])

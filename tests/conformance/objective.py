"""What every training objective owes the loop.

A module of tests gives cases by a fixture `case` of `ObjectiveCase`, and a class that inherits `ObjectiveSuite`.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gristmill.core import Objective
from gristmill.errors import DataError

EXAMPLES = 5


@dataclass(frozen=True)
class ObjectiveCase:
    """An objective, a small model for it, and what may be asked of both.

    example: the example of a number, another for each. bad: unfit examples by what is wrong with them; each must be a
    DataError. uniform: the loss of one target in nats, by term, of a model whose parameters are all 0; None where such
    a model says nothing. random: whether another key changes the batch. steps: updates after which the loss on one
    batch has fallen to at most `falls_to` of what it was.
    """

    name: str
    objective: Objective
    model: Callable[[], torch.nn.Module]
    example: Callable[[int], Any]
    bad: Mapping[str, Any] = field(default_factory=dict)
    uniform: Mapping[str, float] | None = None
    random: bool = True
    steps: int = 12
    learning_rate: float = 0.02
    falls_to: float = 0.5

    def __str__(self) -> str:
        return self.name


def key(number: int) -> tuple[int, ...]:
    """The key of an example: seed, epoch, document and start."""
    return 0, 0, number, 0


def prepare(case: ObjectiveCase, numbers: Sequence[int]) -> Any:
    """The batch of these examples, in this order."""
    return case.objective.prepare([case.example(n) for n in numbers], [key(n) for n in numbers])


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a batch, by where it stands."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif dataclasses.is_dataclass(value):
        for entry in dataclasses.fields(value):
            yield from tensors(getattr(value, entry.name), f"{name}.{entry.name}")
    elif isinstance(value, tuple | list):
        for index, part in enumerate(value):
            yield from tensors(part, f"{name}[{index}]")


def plain(value: Any) -> Any:
    """A batch as nested tuples that compare by value."""
    if isinstance(value, torch.Tensor):
        return tuple(value.flatten().tolist())
    if dataclasses.is_dataclass(value):
        return tuple((entry.name, plain(getattr(value, entry.name))) for entry in dataclasses.fields(value))
    return tuple(plain(part) for part in value) if isinstance(value, tuple | list) else value


def gradient(case: ObjectiveCase, model: torch.nn.Module, deal: Sequence[Sequence[int]]) -> torch.Tensor:
    """The gradient of one step whose examples are dealt into these micro-batches, as the loop forms it."""
    batches = [prepare(case, part) for part in deal]
    totals = {name: sum(case.objective.counts(batch)[name] for batch in batches) for name in case.objective.weights}
    model.zero_grad()
    for batch in batches:
        sums = case.objective.loss_sums(model, batch)
        terms = [weight * sums[name] / max(totals[name], 1) for name, weight in case.objective.weights.items()]
        torch.stack(terms).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@st.composite
def deals(draw: st.DrawFn) -> list[list[int]]:
    """The examples in any order, cut anywhere."""
    order = draw(st.permutations(range(EXAMPLES)))
    cuts = sorted(draw(st.sets(st.integers(1, EXAMPLES - 1))))
    return [order[start:end] for start, end in zip([0, *cuts], [*cuts, EXAMPLES], strict=True)]


class ObjectiveSuite:
    """Randomness from keys alone, one gradient for any dealing, sums that match counts, refusals, and learning."""

    def test_an_example_is_prepared_from_its_key_alone(self, case: ObjectiveCase) -> None:
        assert plain(prepare(case, range(4))) == plain(prepare(case, range(4)))
        if case.random:
            again = case.objective.prepare([case.example(0)] * 8, [key(n) for n in range(8)])
            same = case.objective.prepare([case.example(0)] * 8, [key(0)] * 8)
            assert plain(again) != plain(same)

    def test_neighbours_change_nothing(self, case: ObjectiveCase) -> None:
        """What is lost on a batch is what is lost on its examples one by one."""
        model = case.model().eval()
        with torch.no_grad():
            together = case.objective.loss_sums(model, prepare(case, range(EXAMPLES)))
            alone = [case.objective.loss_sums(model, prepare(case, [n])) for n in range(EXAMPLES)]
        for name, total in together.items():
            assert float(total) == pytest.approx(sum(float(sums[name]) for sums in alone), rel=1e-4)

    def test_the_gradient_is_the_same_for_any_dealing(self, case: ObjectiveCase) -> None:
        model = case.model().eval()
        expected = gradient(case, model, [range(EXAMPLES)])
        largest = float(expected.abs().max())
        assert largest > 1e-4

        @settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
        @given(deals())
        def holds(deal: list[list[int]]) -> None:
            assert float((gradient(case, model, deal) - expected).abs().max()) < 1e-6 * max(largest, 1.0)

        holds()

    def test_counts_and_sums_name_the_terms(self, case: ObjectiveCase) -> None:
        batch = prepare(case, range(EXAMPLES))
        sums = case.objective.loss_sums(case.model().eval(), batch)
        counts = case.objective.counts(batch)
        assert sums.keys() == counts.keys() == case.objective.weights.keys()
        assert all(total.dtype == torch.float32 and total.shape == () for total in sums.values())
        assert all(isinstance(count, int) and count > 0 for count in counts.values())
        assert batch.tokens > 0
        parts = [case.objective.counts(prepare(case, [n])) for n in range(EXAMPLES)]
        assert counts == {name: sum(part[name] for part in parts) for name in counts}

    def test_a_model_that_knows_nothing_loses_the_logarithm_of_the_choices(self, case: ObjectiveCase) -> None:
        if case.uniform is None:
            pytest.skip("a model of zeros is no uniform one here")
        model, batch = case.model().eval(), prepare(case, range(EXAMPLES))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            sums = case.objective.loss_sums(model, batch)
        for name, count in case.objective.counts(batch).items():
            assert float(sums[name]) / count == pytest.approx(case.uniform[name], rel=1e-5)

    def test_one_example_gives_numbers(self, case: ObjectiveCase) -> None:
        model = case.model().train()
        for number in range(EXAMPLES):
            sums = case.objective.loss_sums(model, prepare(case, [number]))
            assert all(math.isfinite(total.item()) for total in sums.values())
            model.zero_grad()
            torch.stack(list(sums.values())).sum().backward()
            assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)

    def test_unfit_examples_are_refused(self, case: ObjectiveCase) -> None:
        assert case.bad
        for what, example in case.bad.items():
            with pytest.raises(DataError) as caught:
                case.objective.prepare([case.example(0), example], [key(0), key(1)])
            assert str(caught.value), what
        with pytest.raises(DataError):
            case.objective.prepare([], [])

    def test_moving_a_batch_keeps_all_of_it(self, case: ObjectiveCase) -> None:
        batch = prepare(case, range(EXAMPLES))
        assert plain(batch.to("cpu")) == plain(batch)
        moved = batch.to("meta")
        assert type(moved) is type(batch)
        assert dict(tensors(moved)).keys() == dict(tensors(batch)).keys()
        assert all(tensor.is_meta for _, tensor in tensors(moved))
        assert moved.tokens == batch.tokens

    def test_a_batch_is_learned(self, case: ObjectiveCase) -> None:
        model, batch = case.model().train(), prepare(case, range(EXAMPLES))
        counts = case.objective.counts(batch)
        optimiser = torch.optim.Adam(model.parameters(), lr=case.learning_rate)
        losses = []
        for _ in range(case.steps):
            sums = case.objective.loss_sums(model, batch)
            loss = torch.stack([w * sums[name] / counts[name] for name, w in case.objective.weights.items()]).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < case.falls_to * losses[0]


def numbers(seed: int, count: tuple[int, int], below: int, *, above: int = 0) -> list[int]:
    """Random ids in [above, below), as many as `count` (least, most) allows; the same for a seed."""
    choose = random.Random(seed)
    return [choose.randrange(above, below) for _ in range(choose.randint(*count))]

"""From money, time and data to a model size: what binds decides.

Source: the 20 tokens a parameter of Hoffmann et al. 2022; repeated data, Muennighoff et al. 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gristmill.errors import GristmillError, MissingExtra
from gristmill.scale.compute import TOKENS_PER_PARAMETER, Allocation, effective_tokens, rule_of_thumb

REHEARSALS = (1e6, 1e8)
"""Sizes trained before the target, each at its own best tokens: the first finds faults, the second checks the law."""
USEFUL_EPOCHS = 4.0
"""Passes over the same data that are nearly as good as new data. Source: Muennighoff et al. 2023, section 5."""


@dataclass(frozen=True, kw_only=True)
class Tier:
    """Data of one quality. Raises GristmillError naming a value out of range."""

    name: str
    dollars_per_1k: float
    """Price of a thousand tokens."""
    tokens: float = math.inf
    """How many there are."""
    quality: float = 1.0
    """Worth of a token beside those of other tiers."""

    def __post_init__(self) -> None:
        if not (self.dollars_per_1k >= 0 and self.tokens > 0 and self.quality > 0):
            raise GristmillError(
                f"tier {self.name}: dollars_per_1k must be 0 or more, tokens and quality above 0, got "
                f"{self.dollars_per_1k}, {self.tokens} and {self.quality}"
            )


@dataclass(frozen=True)
class Choice:
    """The size and tokens that all limits allow, and the limit that is the tightest."""

    allocation: Allocation
    limits: dict[str, Allocation]
    binding: str


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What there is to spend, in dollars, hours and TFLOP. Raises GristmillError naming a value out of range."""

    compute_dollars: float
    dollars_per_tflop_hour: float
    """Price of 10^12 operations a second, sustained for an hour."""
    data_dollars: float = 0.0
    tiers: Sequence[Tier] = ()
    reserve_dollars: float = 0.0
    """Kept for rehearsals and for what goes wrong."""
    hours: float | None = None
    """Deadline; needs `tflops`."""
    tflops: float | None = None
    """Sustained speed of all devices together."""
    epochs: float = 1.0
    """Most passes over bought data."""
    tokens_per_parameter: float = TOKENS_PER_PARAMETER

    def __post_init__(self) -> None:
        for name in ("compute_dollars", "dollars_per_tflop_hour", "tokens_per_parameter", "hours", "tflops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise GristmillError(f"{name} must be a number above 0, got {value}")
        for name in ("data_dollars", "reserve_dollars"):
            if not 0 <= getattr(self, name) < math.inf:
                raise GristmillError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not self.epochs >= 1:
            raise GristmillError(f"epochs must be at least 1, got {self.epochs}")
        if (self.hours is None) != (self.tflops is None):
            raise GristmillError("a deadline needs hours and tflops together")


@dataclass(frozen=True)
class Stage:
    """One training of the staged validation, smallest first; the last is the target."""

    allocation: Allocation
    dollars: float


@dataclass(frozen=True)
class BudgetPlan:
    """What to train, on what, for how much. `mixture` is in bought tokens by tier; money that no constraint lets one
    use well is left over, not spent."""

    choice: Choice
    mixture: dict[str, float]
    effective_tokens: float
    data_dollars: float
    stages: tuple[Stage, ...]
    reserve_left: float
    """Reserve after the rehearsals; below 0 they do not fit it."""
    compute_left: float

    @property
    def verdict(self) -> str:
        """One sentence that says what binds."""
        chosen, binding = self.choice.allocation, self.choice.binding
        text = f"{chosen.parameters / 1e9:.3g}B parameters on {chosen.tokens / 1e9:.3g}B tokens: bound by {binding}"
        others = {name: limit for name, limit in self.choice.limits.items() if name != binding}
        allowed = "; ".join(
            f"{name} alone would allow {limit.parameters / 1e9:.3g}B on {limit.tokens / 1e9:.3g}B"
            for name, limit in others.items()
        )
        return f"{text} ({allowed})." if allowed else f"{text}."


def choose(
    compute: Mapping[str, float],
    data_tokens: float | None = None,
    *,
    parameters: float | None = None,
    flops_per_token: float | None = None,
    tokens_per_parameter: float = TOKENS_PER_PARAMETER,
) -> Choice:
    """The smallest of what each limit allows: FLOP by name in `compute`, and tokens to be seen.

    With `parameters` fixed only the tokens are chosen, at `flops_per_token` (6 N when not given). Raises GristmillError
    without any limit.
    """
    limits: dict[str, Allocation] = {}
    for name, flops in compute.items():
        if parameters is None:
            limits[name] = rule_of_thumb(flops, tokens_per_parameter)
        else:
            limits[name] = Allocation(parameters, flops / (flops_per_token or 6.0 * parameters))
    if data_tokens is not None:
        limits["data"] = Allocation(parameters or data_tokens / tokens_per_parameter, data_tokens)
    if not limits:
        raise GristmillError("nothing limits the plan: give operations, hours, dollars or tokens")
    binding = min(limits, key=lambda name: limits[name].tokens)
    return Choice(limits[binding], limits, binding)


def plan_budget(budget: Budget) -> BudgetPlan:
    """Choose N, D, the mixture of data and the stages. Raises GristmillError when there is data to buy and no money or
    no tier, MissingExtra without scipy when there are several tiers."""
    compute = {"compute": budget.compute_dollars / budget.dollars_per_tflop_hour * 3600e12}
    if budget.hours is not None and budget.tflops is not None:
        compute["deadline"] = budget.hours * budget.tflops * 3600e12
    unique = _most_tokens(budget.tiers, budget.data_dollars) if budget.tiers else math.inf
    if unique <= 0:
        raise GristmillError("data_dollars is 0 and no tier is free: there is no data to train on")
    seen = unique * budget.epochs
    choice = choose(compute, seen if math.isfinite(seen) else None, tokens_per_parameter=budget.tokens_per_parameter)
    tokens = choice.allocation.tokens
    bought = min(unique, tokens)  # new data first, repetitions only where it runs out
    mixture = _mixture(budget.tiers, bought, budget.data_dollars)
    prices = {tier.name: tier.dollars_per_1k / 1000 for tier in budget.tiers}
    sizes = [size for size in REHEARSALS if size < choice.allocation.parameters]
    stages = [Allocation(size, budget.tokens_per_parameter * size) for size in sizes] + [choice.allocation]
    priced = tuple(Stage(each, each.flops / 3600e12 * budget.dollars_per_tflop_hour) for each in stages)
    return BudgetPlan(
        choice=choice,
        mixture=mixture,
        effective_tokens=effective_tokens(bought, tokens),
        data_dollars=sum(prices[name] * count for name, count in mixture.items()),
        stages=priced,
        reserve_left=budget.reserve_dollars - sum(stage.dollars for stage in priced[:-1]),
        compute_left=budget.compute_dollars - priced[-1].dollars,
    )


def _most_tokens(tiers: Sequence[Tier], dollars: float) -> float:
    """Tokens when the cheapest are bought first."""
    total = 0.0
    for tier in sorted(tiers, key=lambda tier: tier.dollars_per_1k):
        price = tier.dollars_per_1k / 1000
        count = min(tier.tokens, dollars / price if price else math.inf)
        total += count
        dollars -= count * price if price else 0.0
    return total


def _mixture(tiers: Sequence[Tier], tokens: float, dollars: float) -> dict[str, float]:
    """The tokens wanted, of the highest mean quality that the money buys: a linear programme."""
    if len(tiers) <= 1:
        return {tier.name: tokens for tier in tiers}
    try:
        from scipy.optimize import linprog
    except ImportError as error:
        raise MissingExtra("scipy", "plan") from error
    spend = max(dollars, 1e-9)
    found = linprog(
        c=[-tier.quality for tier in tiers],  # in shares of the tokens wanted
        A_ub=[[tier.dollars_per_1k / 1000 * tokens / spend for tier in tiers]],
        b_ub=[1.0 + 1e-9],
        A_eq=[[1.0] * len(tiers)],
        b_eq=[1.0],
        bounds=[(0.0, min(1.0, tier.tokens / tokens)) for tier in tiers],
    )
    if not found.success:
        raise GristmillError(
            f"no mixture of {', '.join(t.name for t in tiers)} fits {dollars} dollars: {found.message}"
        )
    return {tier.name: float(share) * tokens for tier, share in zip(tiers, found.x, strict=True)}

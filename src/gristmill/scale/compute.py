"""How to split compute into parameters N and tokens D, with training at C = 6 N D operations.

Source: Kaplan et al. 2020 (6 N D); Hoffmann et al. 2022, section 3 (the split).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gristmill.errors import GristmillError
from gristmill.scale.laws import CHINCHILLA, JointLaw

TOKENS_PER_PARAMETER = 20.0
"""Rule of thumb for the best split. Source: Hoffmann et al. 2022, table 3."""
REPEAT_HALF_LIFE = 15.4
"""R* of data: repetitions after which a further one is worth 1/e of a first. Source: Muennighoff et al. 2023, eq. 5."""


@dataclass(frozen=True)
class Allocation:
    """Parameters, tokens seen in training, and the operations that takes. `loss` is what a law predicts, if asked."""

    parameters: float
    tokens: float
    loss: float | None = None

    @property
    def flops(self) -> float:
        """6 N D: forward and backward, without attention over the context."""
        return 6.0 * self.parameters * self.tokens


def rule_of_thumb(flops: float, tokens_per_parameter: float = TOKENS_PER_PARAMETER) -> Allocation:
    """N = sqrt(C / (6 r)) and D = r N for r tokens a parameter; both grow as the root of the compute."""
    _positive(flops=flops, tokens_per_parameter=tokens_per_parameter)
    parameters = math.sqrt(flops / (6.0 * tokens_per_parameter))
    return Allocation(parameters, tokens_per_parameter * parameters)


def compute_optimal(flops: float, law: JointLaw = CHINCHILLA) -> Allocation:
    """The N and D with 6 N D = flops at which the law predicts the least loss; the closed form.

    Source: Hoffmann et al. 2022, eq. 4: N = G (C/6)^(beta/(alpha+beta)), G = (alpha A / (beta B))^(1/(alpha+beta)).
    """
    _positive(flops=flops)
    alpha, beta = -law.b, -law.d
    scale = (alpha * law.a / (beta * law.c)) ** (1 / (alpha + beta))
    parameters = scale * (flops / 6.0) ** (beta / (alpha + beta))
    tokens = flops / (6.0 * parameters)
    return Allocation(parameters, tokens, law(parameters, tokens))


def least_compute(loss: float, law: JointLaw = CHINCHILLA) -> Allocation:
    """The cheapest N and D that reach a loss. Raises GristmillError for one at or below the law's floor.

    Along the best split both terms of the law fall as the same power of the compute, so one is enough to invert.
    """
    if not loss > law.floor:
        raise GristmillError(f"loss {loss} is not above {law.floor}, the least that this law can reach")
    alpha, beta = -law.b, -law.d
    at_one = compute_optimal(1.0, law)
    assert at_one.loss is not None
    flops = ((at_one.loss - law.floor) / (loss - law.floor)) ** ((alpha + beta) / (alpha * beta))
    return compute_optimal(flops, law)


def effective_tokens(unique: float, seen: float) -> float:
    """How many different tokens `seen` ones are worth when only `unique` of them are different.

    The first pass counts in full, each repetition less: four passes are worth 3.7 different ones, forty about 15.

    Source: Muennighoff et al. 2023, eq. 5.
    """
    _positive(unique=unique, seen=seen)
    if seen <= unique:
        return seen
    repetitions = seen / unique - 1.0
    return unique * (1.0 + REPEAT_HALF_LIFE * -math.expm1(-repetitions / REPEAT_HALF_LIFE))


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise GristmillError(f"{name} must be a number above 0, got {value}")

"""Mixtures: rows of several sources in every batch, in proportion to their weights.

A weight is the share of the tokens trained on. Rows are dealt by a table that interleaves the sources evenly, so the
shares hold from the first batches on instead of on average, and any batch is found without a walk. Each source has
epochs and an order of its own.

Source: Brown et al. 2020 (GPT-3), table 2.2, for weights that are not sizes; Muennighoff et al. 2023, "Scaling
Data-Constrained Language Models", for the four epochs up to which repeated text is almost as good as new.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gristmill.core import Batch, Loader
from gristmill.corpus.loader import Key, PackedLoader, Prepare, lay_end_to_end
from gristmill.corpus.shards import TokenSource
from gristmill.errors import DataError

PERIOD = 2**16
"""Slots of the table of turns; weights are rounded to this part."""

MAX_EPOCHS = 4.0


@dataclass(frozen=True)
class PlannedSource:
    """What a run takes of one source: `share` of its tokens, which are `tokens` and so many `epochs` of the source."""

    name: str
    share: float
    tokens: float
    epochs: float


def plan_mixture(
    sizes: Mapping[str, float], weights: Mapping[str, float], budget: float, *, max_epochs: float = MAX_EPOCHS
) -> tuple[PlannedSource, ...]:
    """How often a run of `budget` tokens passes over each source: epochs = weight * budget / size.

    Sizes and budget in the same unit; weights are divided by their sum. Raises DataError, naming the source, for names
    that do not match, sizes or weights that are not above 0, and more than `max_epochs` (infinity allows all).
    """
    _require_same_names("sizes", sizes, weights)
    shares = normalised(weights)
    _require_positive("the size of", sizes)
    _require_positive("the number of tokens of", {"the budget": budget})
    planned = tuple(
        PlannedSource(name, share, share * budget, share * budget / sizes[name]) for name, share in shares.items()
    )
    for item in planned:
        if item.epochs > max_epochs:
            most = max_epochs * sizes[item.name]
            raise DataError(
                f"source {item.name!r} would be read {item.epochs:.2f} times, more than max_epochs {max_epochs:g}. "
                f"Lower its share from {item.share:.4g} to {most / budget:.4g}, train on {most / item.share:.4g} "
                "tokens, or raise max_epochs."
            )
    return planned


def normalised(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights over their sum. Raises DataError for none, and for one that is not above 0."""
    if not weights:
        raise DataError("a mixture needs at least one source")
    _require_positive("the weight of", weights)
    total = math.fsum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _require_same_names(what: str, given: Mapping[str, object], weights: Mapping[str, float]) -> None:
    if lonely := set(given) ^ set(weights):
        raise DataError(f"{what} and weights must have the same names; in one alone: {', '.join(sorted(lonely))}")


def _require_positive(what: str, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        if not 0.0 < value < math.inf:
            raise DataError(f"{what} {name!r} must be a number above 0, got {value}. Leave out what is not wanted.")


class Turns:
    """Whose turn it is: slots 0, 1, 2, ... are dealt to sources in proportion to weights, as evenly as they go.

    Of the first n slots each source has its share of n, which is rounded to a part in `PERIOD`, to within half the
    number of sources and one. Raises DataError for weights that are not above 0, and for one too small for a single
    slot in `PERIOD`.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        shares = normalised(weights)
        exact = np.array(list(shares.values())) * PERIOD
        self.quotas = np.floor(exact).astype(np.int64)
        largest = np.argsort(self.quotas - exact, kind="stable")  # of what the floor took away
        self.quotas[largest[: PERIOD - int(self.quotas.sum())]] += 1
        for name, quota in zip(shares, self.quotas.tolist(), strict=True):
            if quota == 0:
                raise DataError(
                    f"source {name!r} has a share of {shares[name]:.2g}, less than one in {PERIOD}; raise it"
                )
        # the k-th of n turns of a source is due at (k + 1/2) / n of the period
        places = np.concatenate([np.arange(quota) for quota in self.quotas])
        owners = np.repeat(np.arange(len(shares)), self.quotas)
        order = np.argsort((places + 0.5) / self.quotas[owners], kind="stable")
        self._owners, self._places = owners[order], places[order]

    def deal(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each slot, the source and how many slots that source had before."""
        periods, slots = np.divmod(slots, PERIOD)
        owners = self._owners[slots]
        return owners, periods * self.quotas[owners] + self._places[slots]


@dataclass(frozen=True)
class Part:
    """A source of a mixture. Among texts, instruction data with loss masks may be one too."""

    name: str
    source: TokenSource
    weight: float


class MixedLoader:
    """A `Loader` whose batches hold `rows_per_batch` packed rows of several sources.

    Weights are shares of the tokens: a source whose rows are less full gets more of them. `prepare` gets the segments
    of one source after another, with the keys of `PackedLoader` under a seed of the source's own. Raises DataError for
    parts of one name, for weights as `Turns`, and as `PackedLoader`.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        row_length: int,
        rows_per_batch: int,
        seed: int,
        prepare: Prepare = lay_end_to_end,
    ) -> None:
        if len({part.name for part in parts}) < len(parts):
            raise DataError(f"parts of a mixture need different names, got {', '.join(part.name for part in parts)}")
        if rows_per_batch < 1:
            raise ValueError(f"rows_per_batch must be at least 1, got {rows_per_batch}")
        self.parts, self.rows_per_batch, self.prepare = tuple(parts), rows_per_batch, prepare
        self.shares = normalised({part.name: part.weight for part in parts})
        self.loaders = [
            PackedLoader(part.source, row_length=row_length, rows_per_batch=1, seed=_own_seed(seed, number))
            for number, part in enumerate(parts)
        ]
        fill = {part.name: loader.utilisation for part, loader in zip(parts, self.loaders, strict=True)}
        self.turns = Turns({name: share / fill[name] for name, share in self.shares.items()})

    @property
    def batches_per_epoch(self) -> int:
        """Batches with as many rows as all sources have together; some come more, some less than once in them."""
        return -(-sum(len(loader.packing) for loader in self.loaders) // self.rows_per_batch)

    @property
    def utilisation(self) -> float:
        """Share of the rows' room that holds tokens, over a long run."""
        quotas = self.turns.quotas / PERIOD
        return float(sum(quota * loader.utilisation for quota, loader in zip(quotas, self.loaders, strict=True)))

    def plan(self, budget: int, *, max_epochs: float = MAX_EPOCHS) -> tuple[PlannedSource, ...]:
        """`plan_mixture` of these sources for a run of `budget` tokens."""
        sizes = {part.name: float(part.source.lengths.sum()) for part in self.parts}
        return plan_mixture(sizes, self.shares, budget, max_epochs=max_epochs)

    def rows(self, number: int) -> list[tuple[int, int, np.ndarray]]:
        """The rows of a batch as (source, epoch of the source, row numbers)."""
        if number < 0:
            raise ValueError(f"the number of a batch must be 0 or more, got {number}")
        slots = np.arange(number * self.rows_per_batch, (number + 1) * self.rows_per_batch)
        owners, turns = self.turns.deal(slots)
        found: list[tuple[int, int, np.ndarray]] = []
        for source in np.unique(owners).tolist():
            order = self.loaders[source].order
            epochs, places = np.divmod(turns[owners == source], order.count)
            found += [(source, epoch, order.of(epoch)[places[epochs == epoch]]) for epoch in np.unique(epochs).tolist()]
        return found

    def batch(self, number: int) -> Batch:
        """The batch of a number."""
        segments: list[Any] = []
        keys: list[Key] = []
        for source, epoch, rows in self.rows(number):
            more, their_keys = self.loaders[source].segments(epoch, rows)
            segments += more
            keys += their_keys
        return self.prepare(segments, keys)


class MixedBatches:
    """A `Loader` that takes each batch whole from one of several loaders: for examples or batches of different kinds.

    Weights are shares of the batches. Raises DataError as `Turns`.
    """

    def __init__(self, loaders: Mapping[str, Loader], weights: Mapping[str, float]) -> None:
        _require_same_names("loaders", loaders, weights)
        self.loaders = [loaders[name] for name in weights]
        self.turns = Turns(weights)

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one epoch of all loaders together; some come more, some less than once in them."""
        return sum(loader.batches_per_epoch for loader in self.loaders)

    def batch(self, number: int) -> Any:
        """The batch of a number."""
        if number < 0:
            raise ValueError(f"the number of a batch must be 0 or more, got {number}")
        owner, turn = self.turns.deal(np.array([number]))
        return self.loaders[int(owner[0])].batch(int(turn[0]))


def _own_seed(seed: int, number: int) -> int:
    """Two sources with documents of one number must not get the same random choices."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])

"""The filters of filters.py for a batch whose rows have options of their own, without sorting the vocabulary.

Most filters leave few tokens. So the k largest logits are taken first, and the filters run on those alone, with the
probability mass of the whole row known. Where the smallest of them is still kept, more could be: that row is tried
again with a larger k, at last with the whole vocabulary. The result is exact in each case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gristmill.core import SamplingParams

CANDIDATES = (128, 512, 2048)
"""How many largest logits are tried before the whole vocabulary."""
_BLOCK = 32
_HELD = 1 << 20
"""Most candidates that are worked on at once; each takes about 100 bytes."""
FIELDS = (
    "temperature", "temperature_last", "top_n_sigma", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff",
    "eta_cutoff",
)  # fmt: skip
_NEUTRAL = np.array([1.0, 0, 0, 0, 1, 0, 1, 0, 0])


def options_of(params: SamplingParams) -> list[float]:
    """The options as numbers, in the order of FIELDS; one that is off has its neutral value."""
    values = [float(getattr(params, name)) for name in FIELDS]
    values[3] = max(values[3], 0.0)
    return values


@dataclass(frozen=True)
class Pool:
    """What some rows may draw: `weights` (rows, tokens) in proportion to the probabilities, 0 for a dropped token.

    rows: their numbers. ids: (rows, tokens) ascending along each row, or None where all tokens of the vocabulary stand.
    """

    rows: Tensor
    ids: Tensor | None
    weights: Tensor

    def total(self) -> Tensor:
        """Sum of the weights, (rows, 1). One after the other: dropped tokens between them change no bit of it."""
        return self.weights.cumsum(1, dtype=torch.float64)[:, -1:]


def pools(logits: Tensor, options: np.ndarray[Any, Any]) -> Iterator[Pool]:
    """Split rows of finite-maximum logits (rows, vocab) into pools. options: (rows, FIELDS), temperatures above 0."""
    device, vocab = logits.device, logits.shape[1]
    rows = torch.arange(len(logits), device=device)
    plain = (options[:, 2:] == _NEUTRAL[2:]).all(1)
    if plain.any():
        yield _unfiltered(logits, rows, options, plain)
    remaining = np.flatnonzero(~plain)
    chances = _chances(logits, options, remaining)
    for size in (*(size for size in CANDIDATES if size < vocab), vocab):
        if not len(remaining):
            return
        step = max(1, _HELD // size)
        left: list[int] = []
        for start in range(0, len(remaining), step):
            own = remaining[start : start + step]
            chosen = torch.from_numpy(own).to(device)
            part = logits if len(own) == len(logits) else logits[chosen]
            ids, weights, exact = _truncate(part, chances, chosen, _Options(options[own], device), size)
            done = exact.cpu().numpy()
            left += own[~done].tolist()
            if done.all():
                yield Pool(chosen, ids, weights)
            elif done.any():
                yield Pool(chosen[exact], ids[exact], weights[exact])
        remaining = np.array(left, np.int64)


def _heat(options: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """Temperatures that neither overflow the logits nor turn -inf into NaN, (rows, 1) float32."""
    heat = np.clip(options[:, 0], np.finfo(np.float32).tiny, 1e30).astype(np.float32)
    return torch.from_numpy(heat).to(device)[:, None]


def _unfiltered(logits: Tensor, rows: Tensor, options: np.ndarray[Any, Any], plain: Any) -> Pool:
    if not plain.all():
        rows = rows[torch.from_numpy(plain).to(rows.device)]
        logits = logits[rows]
    scaled = logits - logits.amax(-1, keepdim=True)
    return Pool(rows, None, scaled.div_(_heat(options[plain], logits.device)).softmax(-1))


def _chances(logits: Tensor, options: np.ndarray[Any, Any], numbers: np.ndarray[Any, Any]) -> Tensor | None:
    """Probabilities before any filter, (rows, vocab): tempered first, unless a row tempers last. None when no numbered
    row needs them: a small top-k asks for no more than ratios."""
    if not len(numbers) or _is_small(options[numbers]).all():
        return None
    heat = torch.where(torch.from_numpy(options[:, 1:2] > 0).to(logits.device), 1.0, _heat(options, logits.device))
    return (logits - logits.amax(-1, keepdim=True)).div_(heat).softmax(-1)


def _is_small(options: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.bool]]:
    """Rows whose top-k is below the first number of candidates."""
    small: np.ndarray[Any, np.dtype[np.bool]] = (options[:, 3] > 0) & (options[:, 3] < CANDIDATES[0])
    return small


class _Options:
    """Columns (rows, 1) of the options, and which of them any row uses."""

    def __init__(self, values: np.ndarray[Any, Any], device: torch.device) -> None:
        self.heat = _heat(values, device)
        self.small = torch.from_numpy(_is_small(values)).to(device)[:, None]
        columns = torch.from_numpy(values).to(device)
        self._columns = {name: columns[:, i : i + 1] for i, name in enumerate(FIELDS)}
        self._used = {name: bool((values[:, i] != _NEUTRAL[i]).any()) for i, name in enumerate(FIELDS)}

    def used(self, *names: str) -> bool:
        """Whether any row has one of these options set."""
        return any(self._used[name] for name in names)

    def __getattr__(self, name: str) -> Tensor:
        return self._columns[name]


def _truncate(
    logits: Tensor, before: Tensor | None, rows: Tensor, options: _Options, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and weights (rows, tokens) among the `size` largest logits, and which rows are exact, (rows,).

    before: `_chances`, in which these are the numbered rows.
    """
    vocab = logits.shape[1]
    ids = _largest(logits, size)
    values = logits.gather(1, ids)
    heat = torch.where(options.temperature_last > 0, torch.ones_like(options.heat), options.heat)
    # which of the two a row gets must not depend on the rows beside it
    chances = ((values - values[:, :1]) / heat).double().exp()
    if before is not None:
        chances = torch.where(options.small, chances, before[rows[:, None], ids].double())
    whole = torch.full((len(logits),), size == vocab, device=logits.device)
    kept, exact = _Filters(logits, values, chances, whole).run(options)
    # only as many columns as the longest pool needs, then by id: the draw must not depend on how many were tried
    width = int((kept * torch.arange(1, ids.shape[1] + 1, device=ids.device)).max())
    ids, chances, kept = ids[:, :width], chances[:, :width], kept[:, :width]
    if options.used("temperature_last"):
        # typical sampling may have dropped the highest
        own = values[:, :width].masked_fill(~kept, float("-inf"))
        cool = ((own - own.amax(1, keepdim=True)).double() / options.heat).exp()
        chances = torch.where(options.temperature_last > 0, cool, chances)
    weights = chances.masked_fill(~kept, 0.0)
    order = ids.argsort(dim=1)
    return ids.gather(1, order), weights.gather(1, order), exact


def _largest(logits: Tensor, size: int) -> Tensor:
    """Ids of the `size` largest logits of each row, highest first and of equal ones the first id."""
    vocab = logits.shape[1]
    if size == vocab:
        return logits.sort(dim=1, descending=True, stable=True).indices
    blocks = vocab // _BLOCK
    if size * 4 <= blocks:
        # the largest lie in the blocks with the largest maxima
        whole = blocks * _BLOCK
        best = logits[:, :whole].unflatten(1, (blocks, _BLOCK)).amax(-1).topk(size, sorted=False).indices
        ids: Tensor = (best[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=logits.device)).flatten(1)
        if whole < vocab:
            ids = torch.cat([ids, torch.arange(whole, vocab, device=logits.device).expand(len(logits), -1)], dim=1)
        ids = ids.gather(1, logits.gather(1, ids).topk(size, sorted=False).indices)
    else:
        ids = logits.topk(size, sorted=False).indices
    ids = ids.gather(1, ids.argsort(dim=1))
    order: Tensor = logits.gather(1, ids).sort(dim=1, descending=True, stable=True).indices
    return ids.gather(1, order)


class _Filters:
    """The chain on candidates (rows, tokens), highest first.

    A row is bounded once all beyond its candidates is known to be dropped. Until its first filter the mass of what is
    kept is known all the same, that of the whole row; a row that is not bounded after a filter is undecided, and what
    later filters make of it does not count.
    """

    def __init__(self, logits: Tensor, values: Tensor, chances: Tensor, whole: Tensor) -> None:
        self._logits, self._values, self._chances = logits, values, chances
        self._kept = values > float("-inf")
        self._last = values == values[:, -1:]  # of equal values at the end, some may not be candidates
        self._whole = whole[:, None]
        self._undecided = torch.zeros_like(self._whole)
        self._mass = torch.ones_like(chances[:, :1])
        self._measure()

    def run(self, options: _Options) -> tuple[Tensor, Tensor]:
        """Which candidates are kept (rows, tokens), and for which rows that is exact (rows,)."""
        values, size = self._values, self._values.shape[1]
        if options.used("top_n_sigma"):
            sigmas = options.top_n_sigma
            self._keep(sigmas > 0, values >= self._sigma_limit(sigmas))
        if options.used("top_k"):
            k = options.top_k.long()
            self._keep(k > 0, (values >= values.gather(1, (k - 1).clamp(0, size - 1))) | (k > size))
        if options.used("top_p"):
            share = self._share()
            self._keep(options.top_p < 1, share.cumsum(1) - share < options.top_p)
        if options.used("min_p"):
            self._keep(options.min_p > 0, self._chances >= options.min_p * self._chances[:, :1])
        if options.used("typical_p"):
            self._need_bound(options.typical_p < 1)
            self._keep(options.typical_p < 1, self._typical(options.typical_p))
        if options.used("epsilon_cutoff"):
            self._keep(options.epsilon_cutoff > 0, self._at_least(options.epsilon_cutoff))
        if options.used("eta_cutoff"):
            cutoff = options.eta_cutoff
            self._need_bound(cutoff > 0)
            self._keep(cutoff > 0, self._at_least(torch.minimum(cutoff, cutoff.sqrt() * self._entropy().neg().exp())))
        return self._kept, (self._bounded & ~self._undecided)[:, 0]

    def _need_bound(self, on: Tensor) -> None:
        """A filter that looks at all kept tokens cannot run where some may not be candidates."""
        self._undecided = self._undecided | (on & ~self._bounded)

    def _keep(self, on: Tensor, kept: Tensor) -> None:
        self._kept = self._kept & (kept | ~on)
        self._measure()
        self._need_bound(on)

    def _measure(self) -> None:
        self._bounded = self._whole | ~(self._kept & self._last).any(1, keepdim=True)
        own = (self._chances * self._kept).sum(1, keepdim=True)
        self._mass = torch.where(self._bounded, own, self._mass)

    def _share(self) -> Tensor:
        """Probabilities of the candidates after the filters so far."""
        return self._chances * self._kept / self._mass

    def _entropy(self) -> Tensor:
        share = self._share()
        entropy: Tensor = -torch.special.xlogy(share, share).sum(1, keepdim=True)
        return entropy

    def _at_least(self, chance: Tensor) -> Tensor:
        share = self._share()
        kept: Tensor = (share >= chance) | (share == share.amax(1, keepdim=True))
        return kept

    def _typical(self, mass: Tensor) -> Tensor:
        share = self._share()
        distance = (-share.log() - self._entropy()).abs()  # infinite for a dropped token
        ordered, order = distance.sort(dim=1, stable=True)
        reached = (share.gather(1, order).cumsum(1) < mass).sum(1, keepdim=True)
        near: Tensor = distance <= ordered.gather(1, reached.clamp(max=distance.shape[1] - 1))
        return near

    def _sigma_limit(self, sigmas: Tensor) -> Tensor:
        """Lowest logit to keep, (rows, 1); no limit in rows where the option is off."""
        limit = torch.full_like(self._values[:, :1], float("-inf"))
        on = (sigmas > 0)[:, 0]
        logits = self._logits[on].double()
        banned = logits == float("-inf")
        count = (~banned).sum(1, keepdim=True)
        mean = logits.masked_fill(banned, 0.0).sum(1, keepdim=True) / count
        spread = ((logits - mean).masked_fill(banned, 0.0).square().sum(1, keepdim=True) / count).sqrt()
        limit[on] = (logits.amax(1, keepdim=True) - sigmas[on] * spread).to(limit.dtype)
        return limit


def draw(pool: Pool, numbers: Sequence[float] | np.ndarray[Any, np.dtype[np.float64]]) -> Tensor:
    """One token of each row of a pool, (rows,): where the cumulative weight in order of ids passes number * total.

    numbers: one in [0, 1) for each row.
    """
    number = torch.as_tensor(numbers, dtype=torch.float64, device=pool.weights.device)[:, None]
    if pool.ids is not None:
        return pool.ids.gather(1, _pass(pool.weights.double(), number)[0])[:, 0]
    # of the whole vocabulary: first the block, then the token in it
    vocab = pool.weights.shape[1]
    weights = pool.weights
    if vocab % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, _BLOCK - vocab % _BLOCK))
    weights = weights.unflatten(1, (-1, _BLOCK))
    block, rest = _pass(weights.sum(-1).double(), number)
    inside = weights.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0].double()
    place, _ = _pass(inside, rest)
    return (block * _BLOCK + place)[:, 0]


def _pass(weights: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sum passes number * total, never a place of weight 0, and the number that is left for what is
    inside that place; both (rows, 1)."""
    sums = weights.cumsum(1)
    total = sums[:, -1:].contiguous()
    goal = number * total
    place = torch.minimum(torch.searchsorted(sums, goal, right=True), torch.searchsorted(sums, total))
    own = weights.gather(1, place)
    return place, ((goal - (sums.gather(1, place) - own)) / own).clamp(0.0, 1.0)

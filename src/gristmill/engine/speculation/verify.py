"""Exact verification of drafts: what comes out is what the target alone would have given.

Greedy: a drafted token stands while it is the target's own choice, and the first other choice replaces it. Sampling: a
token drawn from q stands with probability min(1, p / q); the first that falls is replaced by a draw from the rest,
norm(max(0, p - q)). Either way one more token comes for free when all stand. Accepting by p / q what was drafted by
argmax, or replacing it by the argmax of p, would be neither.

A draft without a distribution needs no rule of its own: the target draws at every place as it always does, and a
drafted token stands while it is what was drawn. So such drafts do not even change the tokens of a seed.

Source: Leviathan et al. 2023, algorithm 1; Chen et al. 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from gristmill.engine.sampling.random import DRAW
from gristmill.engine.speculation.proposer import Draft
from gristmill.errors import RequestError

Uniform = Callable[[int, int], float]
"""(place in the draft counted from 0, stream) -> a number in [0, 1), each one used for one decision only."""

SAMPLE, DRAFT, ACCEPT = DRAW, 1, 2
"""Streams: the target's token of a place, the drafted token, whether it stands."""


def accepted_length(ratios: Iterable[float], uniforms: Iterable[float]) -> int:
    """How many drafted tokens stand: those before the first r >= p / q, all when there is none.

    ratios: p / q of each token. uniforms: r in [0, 1), read only as far as needed. Equality rejects, so that a token
    of probability 0 never stands.
    """
    count = 0
    for ratio, uniform in zip(ratios, uniforms, strict=False):
        if not uniform < ratio:  # so written, a NaN rejects
            break
        count += 1
    return count


def residual(p: Tensor, q: Tensor) -> Tensor:
    """norm(max(0, p - q)) over the last dimension: what is still missing of p when q has had its tokens accepted.

    Where p equals q nothing is missing and nothing is ever rejected; rounding may still ask, and is given p.
    """
    rest = (p - q).clamp_min(0)
    mass = rest.sum(-1, keepdim=True)
    return torch.where(mass > 0, rest / mass, p)


def acceptance_rate(p: Tensor, q: Tensor) -> Tensor:
    """Chance that a token drawn from q stands: sum of min(p, q) over the last dimension."""
    return torch.minimum(p, q).sum(-1)


def draw(probs: Tensor, uniforms: Sequence[float]) -> list[int]:
    """One token per row of `probs` (rows, vocab): where the cumulated row, in order of ids, exceeds uniform times its
    sum. -1 for a row that is no distribution: NaN, or nothing above 0."""
    cumulated = probs.double().cumsum(-1)
    mass = cumulated[:, -1:].contiguous()
    aims = torch.tensor(uniforms, dtype=torch.float64, device=probs.device)[:, None] * mass
    tokens = torch.searchsorted(cumulated, aims, right=True)
    # an aim that was rounded up to the mass stands for the last token that has a probability
    tokens = torch.where(tokens < probs.shape[-1], tokens, torch.searchsorted(cumulated, mass))
    chosen: list[int] = torch.where((mass > 0) & mass.isfinite(), tokens, -1)[:, 0].tolist()
    return chosen


def verify(probs: Tensor, draft: Draft, uniform: Uniform) -> tuple[list[int], int]:
    """Tokens to emit, and how many of the draft stand.

    probs: (tokens + 1, vocab), the target's distribution after all processors and filters at each drafted place and
    the one behind. The emitted tokens are those that stand and one more, the correction or the bonus. It is missing
    where the target's distribution is none (NaN, or nothing left): no token can be chosen there.

    Raises RequestError (`draft`) when the shapes do not fit or a token could not have been drawn from its distribution.
    """
    tokens, count = draft.token_ids, len(draft.token_ids)
    if len(probs) != count + 1:
        raise RequestError(f"{count} drafted tokens need {count + 1} distributions, got {len(probs)}", field="draft")
    if draft.probs is None or not tokens:
        return _verify_points(probs, tokens, uniform)
    if draft.probs.shape != probs[:-1].shape:
        shapes = f"{tuple(draft.probs.shape)}, the target's {tuple(probs[:-1].shape)}"
        raise RequestError(f"the draft's distributions are {shapes}: another vocabulary?", field="draft")
    ids = torch.tensor(tokens, device=probs.device)[:, None]
    proposed = draft.probs.gather(1, ids)[:, 0].tolist()
    if not all(chance > 0 for chance in proposed):
        raise RequestError("a drafted token has probability 0 in the draft's own distribution", field="draft")
    ratios = [p / q for p, q in zip(probs[:-1].gather(1, ids)[:, 0].tolist(), proposed, strict=True)]
    accepted = accepted_length(ratios, (uniform(place, ACCEPT) for place in range(count)))
    last = probs[accepted]
    if accepted < count:
        last = residual(last, draft.probs[accepted])
    return _emit(tokens[:accepted], *draw(last[None], [uniform(accepted, SAMPLE)]))


def verify_greedy(chosen: Sequence[int | None], draft_ids: Sequence[int]) -> tuple[list[int], int]:
    """Tokens to emit, and how many of the draft stand, given what the target chose at each place.

    chosen: (tokens + 1): the argmax of greedy rows, the ordinary draw of sampled ones whose draft has no distribution;
    None or -1 where no token can be chosen, and then none follows those that stand.
    """
    if len(chosen) != len(draft_ids) + 1:
        raise RequestError(f"{len(draft_ids)} drafted tokens need one choice more, got {len(chosen)}", field="draft")
    accepted = 0
    while accepted < len(draft_ids) and chosen[accepted] == draft_ids[accepted]:
        accepted += 1
    return _emit(draft_ids[:accepted], chosen[accepted])


def _verify_points(probs: Tensor, tokens: Sequence[int], uniform: Uniform) -> tuple[list[int], int]:
    for place, row in enumerate(probs):
        (token,) = draw(row[None], [uniform(place, SAMPLE)])
        if place == len(tokens) or token != tokens[place]:
            break
    return _emit(tokens[:place], token)


def _emit(stands: Sequence[int], last: int | None) -> tuple[list[int], int]:
    return [*stands, *([] if last is None or last < 0 else [last])], len(stands)

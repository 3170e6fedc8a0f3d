"""A second, smaller model that drafts for the target.

Its keys and values lie in tensors of its own, in the places that the target's block tables name, so that it needs no
pool of its own. What those places hold of its making it remembers by content: a block is good as far as its tokens are
those of the sequence. From that one rule follow rollback after a rejection, tokens to catch up on, shared beginnings,
copied blocks and preemption.

Source: Leviathan et al. 2023; Chen et al. 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gristmill.engine.runner import Runner
from gristmill.engine.speculation.proposer import Draft, DraftRequest
from gristmill.engine.speculation.rollout import Drafting, longest_draft, roll_out
from gristmill.errors import RequestError
from gristmill.tokens.tokenizer import Tokenizer


def check_same_tokens(target: Tokenizer, draft: Tokenizer) -> None:
    """Raise RequestError (`draft_model`) unless both tokenizers give every token the same id."""
    ours, theirs = (each.backend.get_vocab(with_added_tokens=True) for each in (target, draft))
    if ours == theirs:
        return
    example = next(token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token))
    raise RequestError(
        f"the draft model has another vocabulary: token {example!r} is {theirs.get(example, 'missing')} there and "
        f"{ours.get(example, 'missing')} in the target. Take a draft model of the same family.",
        field="draft_model",
    )


@dataclass(frozen=True)
class _Content:
    """What a block holds: a hash of all tokens before it, its own tokens, a hash of all up to its end."""

    before: int
    token_ids: list[int]
    after: int


@dataclass
class _BlockContents:
    """What each block holds of the drafting model's keys and values."""

    block_size: int
    blocks: dict[int, _Content] = field(default_factory=dict)
    chains: dict[int, list[int]] = field(default_factory=dict)
    """For each slot the hashes at the ends of its full blocks. A wrong hit would only make a bad draft."""

    def known(self, request: DraftRequest) -> int:
        """Tokens of the sequence whose keys and values are in its blocks; never the last one, which must be read to
        go on."""
        tokens, size = request.token_ids, self.block_size
        chain = self.chains.setdefault(request.slot, [0])
        for start in range((len(chain) - 1) * size, len(tokens) - size + 1, size):
            chain.append(hash((chain[-1], *tokens[start : start + size])))
        count = 0
        for number, block in enumerate(request.block_table):
            content = self.blocks.get(block)
            if content is None or number >= len(chain) or content.before != chain[number]:
                break
            if number + 1 < len(chain) and content.after == chain[number + 1]:
                count += size
                continue
            count += _common(content.token_ids, tokens[count : count + size])
            break
        return min(count, len(tokens) - 1)

    def wrote(self, request: DraftRequest, start: int, draft: Sequence[int]) -> None:
        """The tokens from `start` on and all but the last of the draft were read."""
        tokens, size = [*request.token_ids[start - start % self.block_size :], *draft[:-1]], self.block_size
        before = self.chains[request.slot][start // size]
        for number, block in enumerate(request.block_table[start // size :]):
            part = tokens[number * size : (number + 1) * size]
            if not part:
                break
            after = hash((before, *part))
            self.blocks[block] = _Content(before, part, after)
            before = after


class DraftModelProposer:
    """Drafts with the model of `runner`, whose blocks must be as many and as large as the target's.

    vocab_size: of the target. context: most tokens of a sequence that the drafting model can read.
    max_num_batched_tokens: most tokens of one forward while it catches up.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        vocab_size: int,
        context: int,
        block_size: int,
        max_tokens: int = 5,
        max_num_batched_tokens: int = 2048,
    ) -> None:
        for name, value in (("max_tokens", max_tokens), ("max_num_batched_tokens", max_num_batched_tokens)):
            if value < 1:
                raise RequestError(f"{name} must be at least 1, got {value}", field=name)
        self.runner, self.max_tokens, self.context = runner, max_tokens, context
        self._vocab_size, self._most = vocab_size, max_num_batched_tokens
        self._contents = _BlockContents(block_size)

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """See `Proposer.propose`. One forward per drafted token, for all requests together."""
        draftings: dict[int, Drafting] = {}
        for number, request in enumerate(requests):
            limit = min(longest_draft(request, self._contents.block_size, self.context), self.max_tokens)
            if limit > 0:
                draftings[number] = Drafting(request, self._contents.known(request), limit)
        roll_out(self.runner, list(draftings.values()), vocab_size=self._vocab_size, most=self._most)
        for one in draftings.values():
            self._contents.wrote(one.request, one.start, one.token_ids)
        return [draftings[number].draft if number in draftings else Draft([]) for number in range(len(requests))]

    def forget(self, slot: int) -> None:
        """See `Proposer.forget`."""
        self._contents.chains.pop(slot, None)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count

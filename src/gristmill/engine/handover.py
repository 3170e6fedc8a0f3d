"""A request, or the beginning of a text, on its way from one engine to another with its keys and values.

Both engines run the same model and keep the same type of keys and values in blocks of the same size.

Source: Zhong et al. 2024 (DistServe); Patel et al. 2024 (Splitwise).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gristmill.core import Logprob, SamplingParams
from gristmill.engine.memory.block_pool import BlockPool
from gristmill.engine.request import Completion, Standing
from gristmill.engine.runner import Runner
from gristmill.errors import RequestError


@dataclass(frozen=True, eq=False)
class Blocks:
    """Keys and values of some tokens, in whole blocks. data: as `Runner.read_blocks` gives it."""

    num_tokens: int
    block_size: int
    data: list[Tensor]

    @classmethod
    def of(cls, runner: Runner, pool: BlockPool, table: Sequence[int], num_tokens: int) -> Blocks:
        """A copy of the first tokens of a block table; what lies behind them in the last block is not copied."""
        data = runner.read_blocks(table[: pool.blocks_for(num_tokens)])
        for x in data:
            x[:, num_tokens:] = 0
        return cls(num_tokens, pool.block_size, data)

    @property
    def num_blocks(self) -> int:
        """Whole blocks, of which the last may be filled in part."""
        return -(-self.num_tokens // self.block_size)

    @property
    def num_bytes(self) -> int:
        """What travels: the model's bytes per token times the tokens of whole blocks."""
        return sum(x.numel() * x.element_size() for x in self.data)

    def payload(self) -> bytes:
        """The data as plain bytes, one tensor after another; `like` says how to read them."""
        return b"".join(x.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes() for x in self.data)

    @property
    def like(self) -> list[tuple[tuple[int, ...], str]]:
        """Shape and type of each tensor."""
        return [(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in self.data]

    @classmethod
    def of_payload(
        cls, num_tokens: int, block_size: int, like: Sequence[tuple[tuple[int, ...], str]], payload: bytes
    ) -> Blocks:
        """The inverse of `payload`. Raises RequestError when the bytes are not as many as the tensors need."""
        data, at, raw = [], 0, torch.frombuffer(bytearray(payload or b"\0"), dtype=torch.uint8)
        for shape, name in like:
            dtype = getattr(torch, name)
            size = torch.Size(shape).numel() * dtype.itemsize
            if at + size > len(payload):
                break
            data.append(raw[at : at + size].view(dtype).view(shape))
            at += size
        if len(data) != len(like) or at != len(payload):
            raise RequestError(f"{len(payload)} bytes of keys and values do not fill {list(like)}", field="payload")
        return cls(num_tokens, block_size, data)

    def check(self, runner: Runner, pool: BlockPool) -> None:
        """Raise RequestError, naming the difference, when these are not blocks of such a runner."""
        if self.block_size != pool.block_size:
            raise RequestError(
                f"blocks of {self.block_size} tokens do not fit a memory of blocks of {pool.block_size}: give both "
                "engines the same block_size",
                field="block_size",
            )
        bytes_per_token, tokens = runner.kv_bytes_per_token, self.num_blocks * self.block_size
        if self.num_bytes != bytes_per_token * tokens:
            raise RequestError(
                f"{self.num_bytes} bytes came for {tokens} tokens of {bytes_per_token} bytes: give both engines the "
                "same model and kv_cache_dtype",
                field="kv_cache_dtype",
            )


@dataclass(frozen=True, eq=False)
class Handover:
    """A request after its first tokens: what `Engine.export` takes from one engine and `Engine.adopt` puts into
    another, which goes on as the first would have."""

    request_id: str
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    priority: int
    user: str
    deadline_in: float | None
    """Seconds from the export on."""
    cache_root: bytes | None
    output_ids: list[int]
    logprobs: list[dict[int, Logprob]]
    prompt_logprobs: list[dict[int, Logprob] | None]
    num_cached_tokens: int
    elapsed: float
    """Seconds since the request was added."""
    blocks: Blocks = field(repr=False)

    def params_here(self) -> SamplingParams:
        """The parameters, with the seed that the first engine drew where none was given."""
        return replace(self.params, seed=self.seed)

    def standing_here(self, now: float) -> Standing:
        """The standing on a clock that shows `now`."""
        deadline = None if self.deadline_in is None else now + self.deadline_in
        return Standing(priority=self.priority, deadline=deadline, user=self.user)


def export_completion(completion: Completion, now: float, blocks: Blocks) -> Handover:
    """All that another engine needs; `now` is on the engine's clock. Raises RequestError for a request that cannot go:
    one of several completions, or one that has no token yet."""
    request = completion.request
    if request.params.n > 1:
        raise RequestError("a request of several completions is not handed over: send it n times", field="n")
    if not completion.output_ids:
        raise RequestError(f"request {request.request_id!r} has no first token yet", field="request_id")
    return Handover(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_ids=request.prompt_ids,
        params=request.params,
        seed=request.seed,
        priority=completion.priority,
        user=completion.user,
        deadline_in=None if completion.deadline is None else completion.deadline - now,
        cache_root=completion.cache_root,
        output_ids=list(completion.output_ids),
        logprobs=list(completion.logprobs),
        prompt_logprobs=list(request.prompt_logprobs),
        num_cached_tokens=completion.num_cached_tokens,
        elapsed=now - request.arrived_at,
        blocks=blocks,
    )


def restore_completion(completion: Completion, handover: Handover) -> None:
    """Put the tokens of a handover into a fresh completion of the same prompt."""
    completion.request.prompt = handover.prompt
    completion.request.prompt_logprobs = list(handover.prompt_logprobs)
    completion.logprobs = list(handover.logprobs)
    for token in handover.output_ids:
        completion.append(token, probability=1.0)  # where it came from, none of them ended it
    completion.stopper.backdate(handover.elapsed)
    completion.num_cached_tokens, completion.cache_root = handover.num_cached_tokens, handover.cache_root

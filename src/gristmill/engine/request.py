"""One request in the making: its completions, their texts and log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from gristmill.core import CompletionOutput, FinishReason, Logprob, RequestOutput, SamplingParams
from gristmill.engine.adapters import LoadedAdapter
from gristmill.engine.detokenizer import Detokenizer
from gristmill.engine.memory.sources import Source
from gristmill.engine.scheduling.sequence import Sequence
from gristmill.engine.speculation.proposer import Draft, DraftRequest
from gristmill.engine.stopping import Stopper
from gristmill.tokens.tokenizer import Tokenizer


@dataclass(eq=False, kw_only=True)
class Completion(Sequence):
    """A sequence with what choosing and ending need."""

    request: Request
    index: int
    detokenizer: Detokenizer
    stopper: Stopper
    max_tokens: int
    slot: int | None = None
    """Its number among those the sampler knows, from its first step to its end."""
    output_ids: list[int] = field(default_factory=list)
    """Tokens generated so far."""
    draft: Draft | None = None
    """What this step verifies."""
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    def append(self, token: int, probability: float | None = None) -> None:
        """Take a chosen token and see whether the completion ends with it."""
        self.token_ids.append(token)
        self.output_ids.append(token)
        ended = self.stopper.check(self.output_ids, probability)
        if ended is not None and ended[0] == "stop" and token in self.request.end_ids:
            self._end(*ended, [token])
            return
        stop = self.detokenizer.append([token])
        if stop is not None and len(self.output_ids) >= self.request.params.min_tokens:
            self.finish_reason, self.stop_reason = "stop", stop
        elif ended is not None:
            self._end(*ended, [])

    def _end(self, reason: FinishReason, stop_reason: int | str | None, last: list[int]) -> None:
        # a special end token is skipped by the detokenizer; an ordinary one that the caller named is left out as well
        stop = None
        if last and not self.request.params.skip_special_tokens:
            stop = self.detokenizer.append(last)
        if stop is None:
            stop = self.detokenizer.finish()
        self.finish_reason, self.stop_reason = reason, stop_reason
        if stop is not None and reason == "length":  # it stood in the tail that was held back
            self.finish_reason, self.stop_reason = "stop", stop

    def draft_request(self) -> DraftRequest:
        """What a proposer may know of it. It has a slot by then."""
        assert self.slot is not None
        params = self.request.params
        return DraftRequest(
            slot=self.slot,
            token_ids=self.token_ids,
            limit=self.num_lookahead,
            block_table=self.block_table,
            temperature=params.temperature,
            seed=self.request.seed,
            index=self.index,
            seeded=params.seed is not None,
        )

    def fail(self, error: str) -> None:
        """End without another token because none can be chosen."""
        self.detokenizer.finish()
        self.finish_reason, self.error = "error", error

    def output(self) -> CompletionOutput:
        """What the caller sees now."""
        asked = self.request.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=self.detokenizer.text,
            token_ids=list(self.output_ids),
            cumulative_logprob=(
                sum(entry[token].logprob for entry, token in zip(self.logprobs, self.output_ids, strict=True))
                if asked
                else None
            ),
            logprobs=list(self.logprobs) if asked else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            error=self.error,
        )


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a request stands among others: what policies order by, and with whom it shares cached prompts."""

    priority: int = 0
    """Lower goes first under the priority policy."""
    deadline: float | None = None
    """Seconds on the engine's clock by which it should be done, for the deadline policy."""
    user: str = ""
    """Whose request it is, for fairness between users."""
    cache_salt: str | None = None
    """Requests share cached prompts with those of the same salt only."""


class Request:
    """A prompt, its parameters and its n completions. numbers: of completions, in order of
    arrival. clock: the engine's, in seconds. flops:
    operations spent when so many output tokens stand. adapter: what its tokens are computed with."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        tokenizer: Tokenizer,
        max_model_len: int,
        seed: int,
        numbers: Iterator[int],
        clock: Callable[[], float],
        standing: Standing,
        cache_root: bytes | None,
        flops: Callable[[int], float] | None = None,
        source: Source | None = None,
        adapter: LoadedAdapter | None = None,
    ) -> None:
        self.request_id, self.prompt, self.prompt_ids, self.params = request_id, prompt, prompt_ids, params
        self.seed, self.arrived_at, self.adapter = seed, clock(), adapter
        model_ends: Ids[int] = () if params.ignore_eos else tokenizer.stop_token_ids
        self.end_ids = frozenset([*model_ends, *(params.stop_token_ids or ())])
        self.prompt_logprobs: list[dict[int, Logprob] | None] = [None]
        self.is_plain = _is_plain(params)
        self.source_ids = None if source is None else source.ids
        max_tokens = max_model_len - len(prompt_ids) if params.max_tokens is None else params.max_tokens
        self.completions = [
            Completion(
                token_ids=list(prompt_ids),
                num_prompt_tokens=len(prompt_ids),
                request=self,
                index=index,
                max_tokens=max_tokens,
                detokenizer=Detokenizer(tokenizer, params),
                stopper=Stopper(params, self.end_ids, max_tokens, clock, flops),
                arrival=next(numbers),  # no two are equal, or they would preempt each other in turn
                arrived_at=self.arrived_at,
                priority=standing.priority,
                deadline=standing.deadline,
                user=standing.user,
                # what the decoder computed of one source is not that of another
                cache_root=cache_root if source is None else source.root,
                source=None if source is None else Source(source.ids, source.root),
            )
            for index in range(params.n)
        ]
        for completion in self.completions[1:]:
            completion.leader = self.completions[0]

    @property
    def adapter_form(self) -> object | None:
        """Its adapter as a runner's chunks name it."""
        return None if self.adapter is None else self.adapter.form

    @property
    def finished(self) -> bool:
        """True when every completion has ended."""
        return all(completion.finish_reason is not None for completion in self.completions)

    def output(self) -> RequestOutput:
        """What the caller sees now."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids if self.source_ids is None else self.source_ids,
            outputs=[completion.output() for completion in self.completions],
            finished=self.finished,
            prompt_logprobs=self.prompt_logprobs if self.params.prompt_logprobs is not None else None,
            num_cached_tokens=self.completions[0].num_cached_tokens,
        )


_NOT_THE_CHOICE = frozenset(
    ("n", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "max_tokens", "max_time")
) | frozenset(("max_flops", "repetition_stop", "prompt_logprobs", "skip_special_tokens", "stop_outside"))
"""Fields that do not change which token comes next, nor ask for its probability."""


def _is_plain(params: SamplingParams) -> bool:
    """True when the next token is the most probable one, and nobody asks how probable it was."""
    plain = SamplingParams(temperature=0.0)
    return all(
        name in _NOT_THE_CHOICE or getattr(params, name) == getattr(plain, name) for name in params.__dataclass_fields__
    )

"""One request in the making: its completions, their random states, texts and log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

import torch

from gristmill.core import CompletionOutput, FinishReason, Logprob, RequestOutput, SamplingParams
from gristmill.engine.detokenizer import Detokenizer
from gristmill.engine.scheduler import Sequence
from gristmill.tokens.tokenizer import Tokenizer

_SEED_STEP = 0x9E3779B97F4A7C15
"""Between the completions of a request, so that the second of one seed is not the first of the next seed."""


@dataclass(eq=False, kw_only=True)
class Completion(Sequence):
    """A sequence with what sampling needs."""

    request: Request
    index: int
    max_tokens: int
    generator: torch.Generator
    detokenizer: Detokenizer
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    @property
    def output_ids(self) -> list[int]:
        """Tokens generated so far."""
        return self.token_ids[len(self.request.prompt_ids) :]

    @property
    def num_output_tokens(self) -> int:
        """How many that are."""
        return len(self.token_ids) - len(self.request.prompt_ids)

    def append(self, token: int) -> None:
        """Take a sampled token and see whether the completion ends with it."""
        self.token_ids.append(token)
        params, long_enough = self.request.params, self.num_output_tokens >= self.request.params.min_tokens
        if long_enough and token in self.request.end_ids:
            self._end("stop", token if token in (params.stop_token_ids or ()) else None, [token])
            return
        stop = self.detokenizer.append([token])
        if stop is not None and long_enough:
            self.finish_reason, self.stop_reason = "stop", stop
        elif self.num_output_tokens >= self.max_tokens:
            self._end("length", None, [])

    def _end(self, reason: FinishReason, stop_reason: int | None, last: list[int]) -> None:
        # a special end token is skipped by the detokenizer; an ordinary one that the caller named is left out as well
        stop = None
        if last and not self.request.params.skip_special_tokens:
            stop = self.detokenizer.append(last)
        if stop is None:
            stop = self.detokenizer.finish()
        self.finish_reason, self.stop_reason = reason, stop_reason
        if stop is not None and reason == "length":  # it stood in the tail that was held back
            self.finish_reason, self.stop_reason = "stop", stop

    def fail(self, error: str) -> None:
        """End without another token because none can be chosen."""
        self.detokenizer.finish()
        self.finish_reason, self.error = "error", error

    def output(self) -> CompletionOutput:
        """What the caller sees now."""
        asked = self.request.params.logprobs is not None
        ids = self.output_ids
        return CompletionOutput(
            index=self.index,
            text=self.detokenizer.text,
            token_ids=ids,
            cumulative_logprob=(
                sum(entry[token].logprob for entry, token in zip(self.logprobs, ids, strict=True)) if asked else None
            ),
            logprobs=list(self.logprobs) if asked else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            error=self.error,
        )


class Request:
    """A prompt, its parameters and its n completions."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        max_model_len: int,
        seed: int,
    ) -> None:
        self.request_id, self.prompt, self.prompt_ids, self.params = request_id, prompt, prompt_ids, params
        model_ends: Ids[int] = () if params.ignore_eos else tokenizer.stop_token_ids
        self.end_ids = frozenset([*model_ends, *(params.stop_token_ids or ())])
        self.prompt_logprobs: list[dict[int, Logprob] | None] = [None]
        room = max_model_len - len(prompt_ids)
        self.completions = [
            Completion(
                token_ids=list(prompt_ids),
                request=self,
                index=index,
                max_tokens=room if params.max_tokens is None else params.max_tokens,
                generator=torch.Generator().manual_seed((seed + index * _SEED_STEP) % (1 << 64)),
                detokenizer=Detokenizer(tokenizer, params),
            )
            for index in range(params.n)
        ]

    @property
    def finished(self) -> bool:
        """True when every completion has ended."""
        return all(completion.finish_reason is not None for completion in self.completions)

    def output(self) -> RequestOutput:
        """What the caller sees now."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            outputs=[completion.output() for completion in self.completions],
            finished=self.finished,
            prompt_logprobs=self.prompt_logprobs if self.params.prompt_logprobs is not None else None,
        )

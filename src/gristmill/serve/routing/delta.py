"""Outputs on their way from one process to another: each says only what is new, or a long answer with log-probabilities
would be sent again at every token."""

from __future__ import annotations

from dataclasses import replace

from gristmill.core import CompletionOutput, RequestOutput


def shrink(before: RequestOutput | None, now: RequestOutput) -> RequestOutput:
    """What `now` adds to `before`, an earlier output of the same request; all of it where there is none."""
    if before is None:
        return now
    outputs = [
        replace(
            output,
            text=output.text[len(old.text) :],
            token_ids=output.token_ids[len(old.token_ids) :],
            logprobs=None if output.logprobs is None else output.logprobs[len(old.logprobs or ()) :],
        )
        for old, output in zip(before.outputs, now.outputs, strict=True)
    ]
    known = None if now.prompt_logprobs is None else now.prompt_logprobs[len(before.prompt_logprobs or ()) :]
    return replace(now, prompt=None, prompt_token_ids=[], outputs=outputs, prompt_logprobs=known)


def grow(before: RequestOutput | None, delta: RequestOutput) -> RequestOutput:
    """The whole output again: `grow(before, shrink(before, now)) == now`."""
    if before is None:
        return delta
    known = None
    if delta.prompt_logprobs is not None:
        known = [*(before.prompt_logprobs or ()), *delta.prompt_logprobs]
    return replace(
        delta,
        prompt=before.prompt,
        prompt_token_ids=before.prompt_token_ids,
        outputs=[_joined(old, new) for old, new in zip(before.outputs, delta.outputs, strict=True)],
        prompt_logprobs=known,
    )


def _joined(old: CompletionOutput, new: CompletionOutput) -> CompletionOutput:
    return replace(
        new,
        text=old.text + new.text,
        token_ids=old.token_ids + new.token_ids,
        logprobs=None if new.logprobs is None else [*(old.logprobs or ()), *new.logprobs],
    )

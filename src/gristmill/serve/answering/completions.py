"""From a completion request to admitted jobs, and from their outputs to OpenAI's answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gristmill.core import CompletionOutput, Prompt, RequestOutput, SamplingParams
from gristmill.errors import DataError, RequestError
from gristmill.serve.answering.events import event, events_of
from gristmill.serve.answering.jobs import Job, Visit, admit, usage_of
from gristmill.serve.answering.logprobs import TextLogprobs, prompt_logprobs
from gristmill.serve.errors import refusal
from gristmill.serve.host import Target
from gristmill.serve.wire.answers import CompletionChoice, CompletionLogprobs, FinishReason, TextCompletion, Usage
from gristmill.serve.wire.completions import CompletionRequest
from gristmill.serve.wire.sampling import sampling_params

FIELDS: Mapping[str, str] = {"structured": "structured_outputs", "conversation": "prompt"}


@dataclass(frozen=True)
class CompletionJob:
    """An admitted completion request."""

    request: CompletionRequest
    job: Job

    @property
    def n(self) -> int:
        """Answers of each prompt."""
        return self.request.n or 1

    def prompt_text(self, number: int, output: RequestOutput) -> str:
        """A prompt as text, as the request had it or as its ids decode."""
        asked = self.request.prompts()[number]
        if isinstance(asked, str):
            return asked
        return self.job.model.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)


async def admit_completion(target: Target, request: CompletionRequest, visit: Visit) -> CompletionJob:
    """Hand the prompts to the engine.

    Raises ApiError: 400 with the field for what cannot be served as asked, 503 when the server is closing.
    """
    try:
        params = _thinking(target, sampling_params(request.sampling_values()))
        # Long texts take a while to encode; the other streams go on meanwhile.
        prompts = await asyncio.to_thread(_encoded, target, request)
    except (RequestError, DataError) as error:
        raise refusal(error, FIELDS) from error
    job = await admit(
        target,
        request.model,
        prompts,
        params,
        prefix="cmpl-",
        standing=request.standing,
        fields=FIELDS,
        visit=visit,
    )
    return CompletionJob(request, job)


def _encoded(target: Target, request: CompletionRequest) -> list[Prompt]:
    """The prompts as ids. An encoder-decoder's texts stay, for its encoder frames them in its own way."""
    model, add = target.hosted.generator, False if request.add_special_tokens is False else None
    if add is None and getattr(model.engine, "pair", None) is not None:
        return list(request.prompts())
    return [model.tokenizer.encode(p, add_bos=add) if isinstance(p, str) else p for p in request.prompts()]


def _thinking(target: Target, params: SamplingParams) -> SamplingParams:
    """The parameters with the marker that ends this model's reasoning, where they limit it."""
    if not params.limits_thinking:
        return params
    form = target.hosted.answer_form
    if form.reasoning is None:
        raise RequestError(f"{target.hosted.name} does not reason before it answers", field="thinking_budget")
    return replace(params, think_end=form.reasoning[1])


async def whole_completion(work: CompletionJob) -> TextCompletion:
    """Wait for all texts. Raises ApiError when the engine could not finish one."""
    final = {number: output async for number, output in work.job.outputs()}
    choices = []
    for number in sorted(final):
        for place, answer in enumerate(_best(work, final[number].outputs)):
            writer = _Writer(work, number * work.n + place)
            choices.append(writer.all_of(final[number], answer))
    return _completion(work, choices, usage_of_completion(work, list(final.values())))


def _best(work: CompletionJob, outputs: Sequence[CompletionOutput]) -> Sequence[CompletionOutput]:
    """The n of highest mean log-probability, best first, when more were generated."""
    if len(outputs) == work.n:
        return outputs
    return sorted(outputs, key=lambda each: -(each.cumulative_logprob or 0.0) / max(len(each.token_ids), 1))[: work.n]


def completion_events(work: CompletionJob) -> AsyncIterator[str]:
    """The texts as server-sent events; see `events_of`."""
    return events_of(_chunks(work), work.job.id)


async def _chunks(work: CompletionJob) -> AsyncIterator[str]:
    writers: dict[int, _Writer] = {}
    last: dict[int, RequestOutput] = {}
    async for number, output in work.job.outputs():
        last[number] = output
        pieces = []
        for each in output.outputs:
            index = number * work.n + each.index
            writer = writers.setdefault(index, _Writer(work, index))
            if (choice := writer.next_of(output, each)) is not None:
                pieces.append(event(_completion(work, [choice])))
        if pieces:
            yield "".join(pieces)
    if work.request.wants_usage:
        yield event(_completion(work, [], usage_of_completion(work, list(last.values()))))


class _Writer:
    """Writes one choice, as a whole or piece by piece."""

    def __init__(self, work: CompletionJob, index: int) -> None:
        self._work, self._index = work, index
        request = work.request
        count = request.logprobs
        self._logprobs = None if count is None else TextLogprobs(work.job.model.tokenizer, count)
        self._text, self._tokens, self._begun, self._ended = 0, 0, False, False

    def all_of(self, output: RequestOutput, answer: CompletionOutput) -> CompletionChoice:
        """The choice of a finished answer."""
        choice = self.next_of(output, answer)
        assert choice is not None
        return choice

    def next_of(self, output: RequestOutput, answer: CompletionOutput) -> CompletionChoice | None:
        """What is new; None when nothing is."""
        request, begins = self._work.request, not self._begun
        if self._ended:
            return None
        scores_only = request.max_tokens == 0
        text = "" if scores_only else answer.text[self._text :]
        new = [] if scores_only else answer.token_ids[self._tokens :]
        reason = None if answer.finish_reason is None else self._reason(answer)
        wants_tokens = bool(new) and (self._logprobs is not None or bool(request.return_token_ids))
        if not (text or reason or wants_tokens or (begins and request.echo)):
            return None
        shown = self._work.prompt_text(self._index // self._work.n, output) if begins and request.echo else ""
        choice = CompletionChoice(index=self._index, text=shown + text, logprobs=None, finish_reason=reason)
        if self._logprobs is not None:
            choice.logprobs = self._take_logprobs(output, answer, new, begins)
        if begins and request.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(output)
        if request.return_token_ids:
            choice.token_ids = list(new)
            if begins:
                choice.prompt_token_ids = output.prompt_token_ids
        self._text, self._tokens = len(answer.text), len(answer.token_ids)
        self._begun, self._ended = True, reason is not None
        return choice

    def _take_logprobs(
        self, output: RequestOutput, answer: CompletionOutput, new: Sequence[int], begins: bool
    ) -> CompletionLogprobs:
        assert self._logprobs is not None
        ids, places = list(new), list((answer.logprobs or [])[self._tokens : self._tokens + len(new)])
        echoed = output.prompt_token_ids if begins and self._work.request.echo else []
        return self._logprobs.take([*echoed, *ids], [*(output.prompt_logprobs or [] if echoed else []), *places])

    def _reason(self, answer: CompletionOutput) -> FinishReason:
        reason = self._work.job.finish_reason(answer)
        return "length" if self._work.request.max_tokens == 0 else reason


def usage_of_completion(work: CompletionJob, outputs: Sequence[RequestOutput]) -> Usage:
    """Token counts; a request that only scores has generated none."""
    usage = usage_of(outputs)
    if work.request.max_tokens == 0:
        usage.completion_tokens, usage.total_tokens = 0, usage.prompt_tokens
    return usage


def _completion(work: CompletionJob, choices: list[CompletionChoice], usage: Usage | None = None) -> TextCompletion:
    completion = TextCompletion(
        id=work.job.id,
        object="text_completion",
        created=work.job.created,
        model=work.job.model_name,
        choices=choices,
    )
    if usage is not None or work.request.wants_usage:
        completion.usage = usage
    return completion

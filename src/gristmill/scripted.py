"""A language model that says what it is told, to test prompts, agents and evaluations without weights.

Answers come from a script; scores come from a small fixed bigram distribution, so that log-probabilities are
proper (they sum to one, they add up) while what is generated stays free.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np

from gristmill.core import (
    CompletionOutput,
    FinishReason,
    LanguageModel,
    Logprob,
    Message,
    Prompt,
    RequestOutput,
    SamplingParams,
    Score,
)
from gristmill.errors import GristmillError, RequestError

# A script is a distribution with all its mass on one token, which temperature, top_p, top_k, min_p and the seed
# leave as it is. These fields could change the answer, so they are refused.
_REFUSED = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": None,
    "ignore_eos": False,
    "min_tokens": 0,
}
_DIMENSIONS = 256


class Codec(Protocol):
    """What the scripted model needs of a tokenizer; `gristmill.tokens.tokenizer.Tokenizer` is one."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends an answer, or None."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""


class ByteCodec:
    """One id per UTF-8 byte, and id 256 for the end of an answer."""

    vocab_size = 257
    eos_token_id: int | None = 256
    end_text = "<|end|>"

    def encode(self, text: str) -> list[int]:
        """The bytes of the text."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the bytes; those that are no complete character become U+FFFD."""
        end = b"" if skip_special_tokens else self.end_text.encode()
        return b"".join(end if i == self.eos_token_id else bytes([i]) for i in ids).decode("utf-8", errors="replace")


class ScriptedLM(LanguageModel):
    """A LanguageModel with scripted answers.

    `answers` is a sequence, of which each completion takes the next (GristmillError when they run out), or a
    function from the prompt's text to the answer. `prompts` holds the text of every prompt generated from, in order.
    The penalties, logit_bias, ignore_eos and min_tokens are refused with RequestError; all else is applied.
    """

    def __init__(self, answers: Sequence[str] | Callable[[str], str], tokenizer: Codec | None = None) -> None:
        self._answers = answers if callable(answers) else iter(list(answers))
        self._codec: Codec = tokenizer if tokenizer is not None else ByteCodec()
        self.prompts: list[str] = []

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """One finished output per prompt, in order."""
        params = sampling_params or SamplingParams()
        _refuse(params)
        many = cast("Sequence[Prompt]", [prompts] if _is_one_prompt(prompts) else prompts)
        tokenised = [self._ids(prompt, "prompt") for prompt in many]
        texts = [prompt if isinstance(prompt, str) else None for prompt in many]
        return [self._answer(text, ids, params) for text, ids in zip(texts, tokenised, strict=True)]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | None = None,
    ) -> list[RequestOutput]:
        """The same for conversations, written as `role: content` lines that end with `assistant:`."""
        one = bool(messages) and isinstance(messages[0], Mapping)
        many = cast("Sequence[Sequence[Message]]", [messages] if one else messages)
        return self.generate([_transcript(conversation) for conversation in many], sampling_params)

    def score(self, prompt: Prompt, completion: Prompt) -> Score:
        """Log-probability of the completion under the bigram distribution."""
        before = self._ids(prompt, "prompt")
        ids = self._ids(completion, "completion")
        rows = [self.next_logprobs(previous) for previous in [before[-1], *ids][: len(ids)]]
        return Score(
            token_ids=ids,
            token_logprobs=[float(row[i]) for row, i in zip(rows, ids, strict=True)],
            is_greedy=all(int(row.argmax()) == i for row, i in zip(rows, ids, strict=True)),
        )

    def score_many(self, pairs: Sequence[tuple[Prompt, Prompt]]) -> list[Score]:
        """`score` of each pair."""
        return [self.score(prompt, completion) for prompt, completion in pairs]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Hashed counts of byte bigrams and trigrams, scaled to length one: alike texts have near vectors."""
        vectors = np.zeros((len(texts), _DIMENSIONS), dtype=np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            data = b"\x02" + text.encode("utf-8") + b"\x03"
            for size in (2, 3):
                for start in range(len(data) - size + 1):
                    vector[zlib.crc32(data[start : start + size]) % _DIMENSIONS] += 1
            vector /= np.linalg.norm(vector)
        return vectors

    def next_logprobs(self, previous: int) -> np.ndarray:
        """Natural-log probabilities of the id after `previous`, shape (vocab_size,), summing to one."""
        # Any fixed function serves; the odd multiplier keeps the rows apart from each other.
        logits = 2.0 * np.cos(0.7391 * (previous + 1) * (np.arange(self._codec.vocab_size) + 1))
        return np.asarray(logits - math.log(float(np.exp(logits).sum())))

    def _ids(self, prompt: Prompt, field: str) -> list[int]:
        ids = self._codec.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        if not ids:
            raise RequestError(f"the {field} is empty; at least one token is needed", field=field)
        size = self._codec.vocab_size
        if wrong := [i for i in ids if not 0 <= i < size]:
            raise RequestError(f"{field}: token id {wrong[0]} is outside the vocabulary of {size}", field=field)
        return ids

    def _answer(self, prompt: str | None, ids: list[int], params: SamplingParams) -> RequestOutput:
        text = self._codec.decode(ids, skip_special_tokens=False) if prompt is None else prompt
        self.prompts.append(text)
        outputs = [self._complete(index, self._next_answer(text), ids[-1], params) for index in range(params.n)]
        request_id = f"scripted-{len(self.prompts)}"
        output = RequestOutput(request_id, prompt, ids, outputs, finished=True)
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None, *self._logprobs(ids[0], ids[1:], params.prompt_logprobs)]
        return output

    def _next_answer(self, prompt: str) -> str:
        if callable(self._answers):
            return self._answers(prompt)
        answer = next(self._answers, None)
        if answer is None:
            raise GristmillError("the script has no answer left; give ScriptedLM more answers or a function")
        return answer

    def _complete(self, index: int, answer: str, previous: int, params: SamplingParams) -> CompletionOutput:
        end = self._codec.eos_token_id
        script = self._codec.encode(answer) + ([] if end is None else [end])
        ids, text, reason, stopped_by = self._until_stop(script, params)
        output = CompletionOutput(index, text, ids, finish_reason=reason, stop_reason=stopped_by)
        if params.logprobs is not None:
            output.logprobs = self._logprobs(previous, ids, params.logprobs)
            output.cumulative_logprob = sum(step[i].logprob for step, i in zip(output.logprobs, ids, strict=True))
        return output

    def _until_stop(
        self, script: list[int], params: SamplingParams
    ) -> tuple[list[int], str, FinishReason, int | str | None]:
        """Ids, text, finish reason and stop reason, found token by token as an engine would."""

        def decode(length: int) -> str:
            return self._codec.decode(script[:length], skip_special_tokens=params.skip_special_tokens)

        for length, token in enumerate(script, start=1):
            ids = script[:length]
            if token == self._codec.eos_token_id:
                return ids, decode(length - 1), "stop", None
            if token in (params.stop_token_ids or ()):
                kept = length if params.include_stop_str_in_output else length - 1
                return ids, decode(kept), "stop", token
            text = decode(length)
            since = params.stops_count_from(text)
            found = [(at, stop) for stop in params.stop_strings if (at := text.find(stop, since)) >= 0]
            if found:
                start, stop = min(found)
                kept = start + len(stop) if params.include_stop_str_in_output else start
                return ids, text[:kept], "stop", stop
            if length == params.max_tokens:
                # Without an end token, an answer said to its last token has stopped by itself.
                said = length == len(script)
                return ids, text, "stop" if said else "length", None
        return script, decode(len(script)), "stop", None

    def _logprobs(self, previous: int, ids: Sequence[int], top: int) -> list[dict[int, Logprob]]:
        steps = []
        for before, chosen in zip([previous, *ids], ids, strict=False):
            row = self.next_logprobs(before)
            order = np.argsort(-row, kind="stable").tolist()
            rank = {token: place for place, token in enumerate(order, start=1)}
            steps.append({i: self._logprob(row, i, rank[i]) for i in dict.fromkeys([chosen, *order[:top]])})
        return steps

    def _logprob(self, row: np.ndarray, token: int, rank: int) -> Logprob:
        return Logprob(float(row[token]), rank, self._codec.decode([token], skip_special_tokens=False))


def _refuse(params: SamplingParams) -> None:
    for name, neutral in _REFUSED.items():
        value: Any = getattr(params, name)
        if value != neutral and value != {}:
            raise RequestError(f"{name} cannot be applied to a scripted answer; leave it at {neutral!r}", field=name)


def _is_one_prompt(prompts: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | np.integer))


def _transcript(conversation: Sequence[Message]) -> str:
    if not conversation:
        raise RequestError("a conversation needs at least one message", field="messages")
    lines = [f"{message['role']}: {message['content']}" for message in conversation]
    return "\n".join([*lines, "assistant:"])

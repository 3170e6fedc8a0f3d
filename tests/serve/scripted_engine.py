"""An engine that says what it is told, one byte per token, and remembers what was asked of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from gristmill.core import CompletionOutput, FinishReason, Logprob, Prompt, RequestOutput, SamplingParams
from gristmill.engine.request import Standing
from gristmill.errors import RequestError
from gristmill.tokens.renderer import JinjaRenderer
from gristmill.tokens.tokenizer import Tokenizer

END = "<|im_end|>"


def byte_tokenizer(added: tuple[str, ...] = (), template: str | None = None) -> Tokenizer:
    """Every byte is a token; ids follow the byte-level alphabet, then come the special tokens, then those `added`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", END)])
    backend.add_tokens([AddedToken(text, normalized=False) for text in added])
    end = backend.token_to_id(END)
    return Tokenizer(backend=backend, eos_token_id=end, stop_token_ids=(end,), chat_template=template)


@dataclass
class Running:
    """A request and how far its completions are."""

    prompt_ids: list[int]
    params: SamplingParams
    answers: list[list[int]]
    outputs: list[CompletionOutput] = field(default_factory=list)


class ScriptedEngine:
    """Answers each prompt with `script(prompt text)`, one token of every completion per step.

    `step_seconds` slows a step down; while `gate` is clear a step waits. `fail_with` is raised by the next step.
    `added` holds the parameters of all requests, `aborted` the ids of those that were aborted while they ran.
    """

    def __init__(
        self,
        script: Callable[[str], str] = lambda prompt: "Hello there.",
        max_model_len: int = 512,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.tokenizer = tokenizer or byte_tokenizer()
        self.script = script
        self.max_model_len = max_model_len
        self.step_seconds = 0.0
        self.gate = threading.Event()
        self.gate.set()
        self.fail_with: Exception | None = None
        self.added: dict[str, SamplingParams] = {}
        self.prompts: dict[str, str] = {}
        self.standings: dict[str, Standing | None] = {}
        self.adapters: dict[str, str | None] = {}
        self.aborted: list[str] = []
        self.live: dict[str, Running] = {}
        self.threads: set[str] = set()

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        standing: Standing | None = None,
        adapter: str | None = None,
    ) -> str:
        """See `StepEngine.add`."""
        self.threads.add(threading.current_thread().name)
        assert request_id is not None
        self.standings[request_id], self.adapters[request_id] = standing, adapter
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if len(ids) >= self.max_model_len:
            raise RequestError("the prompt is too long", field="prompt", code="context_length_exceeded")
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        answers = [self.script(text) + (f" ({i})" if i else "") for i in range(params.n)]
        running = Running(ids, params, [[*self.tokenizer.encode(a), self.tokenizer.eos_token_id or 0] for a in answers])
        running.outputs = [self._output(running, index, 0) for index in range(params.n)]
        self.added[request_id], self.prompts[request_id], self.live[request_id] = params, text, running
        return request_id

    def step(self) -> list[RequestOutput]:
        """See `StepEngine.step`."""
        self.threads.add(threading.current_thread().name)
        time.sleep(self.step_seconds)
        assert self.gate.wait(20)
        if self.fail_with is not None:
            error, self.fail_with = self.fail_with, None
            raise error
        results = []
        for request_id, running in list(self.live.items()):
            running.outputs = [
                output if output.finish_reason else self._output(running, output.index, len(output.token_ids) + 1)
                for output in running.outputs
            ]
            finished = all(output.finish_reason for output in running.outputs)
            results.append(RequestOutput(request_id, None, running.prompt_ids, list(running.outputs), finished))
            if finished:
                del self.live[request_id]
        return results

    def abort(self, request_id: str) -> None:
        """See `StepEngine.abort`."""
        if self.live.pop(request_id, None) is not None:
            self.aborted.append(request_id)

    def has_unfinished(self) -> bool:
        """See `StepEngine.has_unfinished`."""
        return bool(self.live)

    def _output(self, running: Running, index: int, count: int) -> CompletionOutput:
        params, ids = running.params, running.answers[index][:count]
        reason: FinishReason | None = None
        stop_reason: str | None = None
        text = self.tokenizer.decode(ids, skip_special_tokens=params.skip_special_tokens)
        room = self.max_model_len - len(running.prompt_ids)
        if count == len(running.answers[index]):
            reason = "stop"
        elif count >= min(params.max_tokens or room, room):
            reason = "length"
        else:
            text = text.rstrip("\ufffd")
        for stop in params.stop_strings:
            if stop in text:
                text, reason, stop_reason = text[: text.index(stop)], "stop", stop
            elif reason is None:
                cuts = [n for n in range(1, len(stop)) if text.endswith(stop[:n])]
                text = text[: len(text) - max(cuts, default=0)]
        logprobs = None if params.logprobs is None else [self._places(token, params.logprobs) for token in ids]
        return CompletionOutput(index, text, ids, logprobs=logprobs, finish_reason=reason, stop_reason=stop_reason)

    def _places(self, token: int, count: int) -> dict[int, Logprob]:
        """The scripted token is the second best; the best is impossible to miss and the rest to tell apart."""
        others = [(token + i) % 256 for i in range(1, max(count, 1) + 1)]
        ranked = [others[0], token, *others[1:]]
        places = {i: Logprob(-float(rank), rank, self.tokenizer.decode([i])) for rank, i in enumerate(ranked, 1)}
        return {i: place for i, place in places.items() if i == token or place.rank <= count}


class ScriptedLLM:
    """What the server needs of a model, around a ScriptedEngine."""

    kind = "generate"

    def __init__(self, engine: ScriptedEngine, model_name: str = "scripted") -> None:
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.renderer = JinjaRenderer(engine.tokenizer)
        self.max_model_len = engine.max_model_len
        self.model_name = model_name

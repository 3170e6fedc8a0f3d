"""`LLM`: the engine behind one object, with the names people know from vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from gristmill.core import Message, Prompt, RequestOutput, SamplingParams, Score
from gristmill.engine import scoring
from gristmill.engine.engine import Engine
from gristmill.engine.prepare import prepare, proposer_named
from gristmill.engine.search.beam import BeamSearchParams, beam_search_batch
from gristmill.engine.search.driver import SearchResult
from gristmill.engine.search.paged import PagedHypotheses
from gristmill.errors import RequestError
from gristmill.tokens.renderer import JinjaRenderer


class LLM:
    """A language model that generates, chats, scores and embeds.

    model: an asset name, a Hugging Face directory, a GGUF file or a run directory.
    dtype: type of the weights, float32, bfloat16 or float16. quantization: keep the weights in fewer bits instead:
    "int8" (weights alone), "w8a8" (8-bit activations too: the fastest here), "int4".
    kv_cache_dtype: float32, bfloat16 or int8; None takes float32 for float32 weights, bfloat16 for others.
    fast_kernels: compute steps in C++ compiled on first use, where the machine has a compiler and the model is of a kind it
    knows; off gives the plain PyTorch path, equal up to rounding. `path` says which is taken, and why.
    speculation: "ngram" (prompt lookup), "early-exit:LAYERS" or the name of a smaller model with the same tokenizer.
    response_cache: how many answers to keep for requests that come again word for word.
    seed: makes unseeded sampling repeatable. Further keywords go to `Engine`.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        quantization: str | None = None,
        kv_cache_dtype: str | None = None,
        fast_kernels: bool = True,
        speculation: str | None = None,
        response_cache: int = 0,
        seed: int = 0,
        **engine_options: Any,
    ) -> None:
        self.model_name = str(model)
        prepared = prepare(
            model,
            dtype=dtype,
            device=device,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            fast_kernels=fast_kernels,
        )
        self.model, self.tokenizer, self.path = prepared.model, prepared.tokenizer, prepared.path
        self.engine = Engine(
            self.model,
            self.tokenizer,
            seed=seed,
            runner=prepared.runner,
            **engine_options,
        )
        if speculation is not None:
            self.engine.speculate(proposer_named(speculation, self.engine, prepared))
        self.max_model_len = self.engine.max_model_len
        self._forward = prepared.forward(self.engine)
        self._renderer: JinjaRenderer | None = None
        self._answers: ResponseCache | None = None
        if response_cache:
            from gristmill.engine.memory.response_cache import ResponseCache

            self._answers = ResponseCache(response_cache)

    @property
    def renderer(self) -> JinjaRenderer:
        """The chat renderer of the model's own template; made, and its template checked, on first use."""
        if self._renderer is None:
            self._renderer = JinjaRenderer(self.tokenizer)
        return self._renderer

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """See `LanguageModel.generate`. If one prompt is refused, none is run."""
        params = sampling_params or SamplingParams()
        wanted = [self._remembered(prompt, params) for prompt in _as_list(prompts)]
        running: dict[str, int] = {}  # by request id, its place among the prompts
        try:
            for place, item in enumerate(wanted):
                if not isinstance(item, RequestOutput):
                    running[self.engine.add(item, params)] = place
            left = len(running)
            while left:
                for output in self.engine.step(finished_only=True):
                    if output.request_id in running:
                        wanted[running[output.request_id]] = output
                        left -= 1
                        if self._answers is not None:
                            self._answers.put(
                                self._answers.key(self.model_name, output.prompt_token_ids, params), output
                            )
        finally:
            for request_id in running:
                self.engine.abort(request_id)
        return cast(list[RequestOutput], wanted)

    def _remembered(self, prompt: Prompt, params: SamplingParams) -> Prompt | RequestOutput:
        """The answer to a request that came before, or the prompt."""
        if self._answers is None:
            return prompt
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else self.engine.token_ids("prompt", prompt)
        found = self._answers.get(self._answers.key(self.model_name, ids, params))
        return prompt if found is None else found

    def beam_search(self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams) -> list[list[SearchResult]]:
        """The best sequences that beam search finds after each prompt, best first, on the engine's block pool.

        Raises RequestError for a prompt that does not fit the context with `max_tokens`, and when running requests
        leave too few blocks.
        """
        ids = [self._encode(prompt, "prompt") for prompt in _as_list(prompts)]
        return beam_search_batch(self.hypotheses(), ids, params)

    def hypotheses(self, *, keep_hidden: bool = False) -> PagedHypotheses:
        """The model as the search methods of gristmill.engine.search see it, on the engine's block pool.

        keep_hidden: hypotheses also give their final states, which contrastive search reads.
        """
        return PagedHypotheses(
            self.engine.runner,
            self.engine.pool,
            vocab_size=self.engine.config.vocab_size,
            end_ids=self.tokenizer.stop_token_ids,
            max_model_len=self.max_model_len,
            keep_hidden=keep_hidden,
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | None = None,
    ) -> list[RequestOutput]:
        """See `LanguageModel.chat`. The token that closes a turn ends the answer, unless `ignore_eos`."""
        params = (sampling_params or SamplingParams()).ending_at(self.renderer.stop_token_ids)
        single = bool(messages) and isinstance(messages[0], dict)
        conversations = cast(Sequence[Sequence[Message]], [messages] if single else messages)
        return self.generate([self.renderer.render_prompt(c) for c in conversations], params)

    def score(self, prompt: Prompt, completion: Prompt) -> Score:
        """See `LanguageModel.score`."""
        return self.score_many([(prompt, completion)])[0]

    def score_many(self, pairs: Sequence[tuple[Prompt, Prompt]]) -> list[Score]:
        """See `LanguageModel.score_many`."""
        encoded = []
        for prompt, completion in pairs:
            prompt_ids = self._encode(prompt, "prompt")
            completion_ids = self._encode(completion, "completion")
            total = len(prompt_ids) + len(completion_ids)
            if total > self.max_model_len:
                raise RequestError(
                    f"prompt and completion have {total} tokens, the context holds {self.max_model_len}",
                    field="completion",
                    code="context_length_exceeded",
                )
            encoded.append((prompt_ids, completion_ids))
        return scoring.score_completions(self._forward, encoded)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """See `LanguageModel.embed`: the mean of the final hidden states, scaled to unit length."""
        ids = [self._encode(text, "texts") for text in texts]
        for number, item in enumerate(ids):
            if len(item) > self.max_model_len:
                raise RequestError(
                    f"text {number} has {len(item)} tokens, the context holds {self.max_model_len}", field="texts"
                )
        return scoring.mean_embeddings(self._forward, self.engine.config.hidden_size, ids)

    def _encode(self, text: Prompt, field: str) -> list[int]:
        # a start token belongs before a prompt, never between a prompt and its completion
        add_bos = False if field == "completion" else None
        ids = self.tokenizer.encode(text, add_bos=add_bos) if isinstance(text, str) else text
        if len(ids) == 0:
            raise RequestError(f"{field} is empty", field=field)
        return self.engine.token_ids(field, ids)


def _as_list(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, (np.ndarray, torch.Tensor)):
        prompts = prompts.tolist()
    if isinstance(prompts, str):
        return [prompts]
    of_ids = len(prompts) > 0 and not isinstance(prompts[0], str) and np.ndim(prompts[0]) == 0
    return [prompts] if of_ids else list(prompts)

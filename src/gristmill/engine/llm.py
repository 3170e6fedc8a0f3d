"""`LLM`: the engine behind one object, with the names people know from vLLM."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from gristmill.core import Message, Prompt, RequestOutput, SamplingParams, Score
from gristmill.engine import encoders, scoring
from gristmill.engine.engine import Engine
from gristmill.engine.memory.response_cache import ResponseCache
from gristmill.engine.prepare import prepare, proposer_named
from gristmill.engine.search.beam import BeamSearchParams, beam_search_batch
from gristmill.engine.search.driver import SearchResult
from gristmill.engine.search.paged import PagedHypotheses
from gristmill.errors import RequestError
from gristmill.model.encoder import Encoder
from gristmill.model.encoder_decoder import EncoderDecoder
from gristmill.model.lora.peft import read_lora
from gristmill.model.sentence import SentenceEncoder
from gristmill.model.transformer import Transformer
from gristmill.tokens.renderer import JinjaRenderer


class LLM:
    """A language model that generates, chats, scores and embeds. An encoder embeds alone and refuses the rest.

    model: an asset name, a Hugging Face directory, a GGUF file or a run directory; a decoder, an encoder-decoder, whose
    encoder reads the prompts, or an encoder.
    dtype: type of the weights, float32, bfloat16 or float16. quantization: keep the weights in fewer bits instead:
    "int8" (weights alone), "w8a8" (8-bit activations too: the fastest here), "int4".
    kv_cache_dtype: float32, bfloat16 or int8; None takes float32 for float32 weights, bfloat16 for others.
    fast_kernels: compute steps in C++ compiled on first use, where the machine has a compiler and the model is of a
    kind it knows; off gives the plain PyTorch path, equal up to rounding. `path` says which is taken, and why.
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
        self._engine: Engine | None = None
        self._renderer: JinjaRenderer | None = None
        self._answers: ResponseCache | None = None
        self._embedder: SentenceEncoder | None = None
        if encoders.is_encoder(model):
            options = {"quantization": quantization, "kv_cache_dtype": kv_cache_dtype, "speculation": speculation}
            self._refuse_any({**options, "response_cache": response_cache or None, **engine_options})
            self._embedder = encoders.load_sentence_encoder(model, dtype=dtype, device=device)
            self.network: Transformer | EncoderDecoder | Encoder = self._embedder.encoder
            self.tokenizer, self.path = self._embedder.tokenizer, "PyTorch, for it is an encoder"
            self.max_model_len = self._embedder.max_tokens
            return
        prepared = prepare(
            model,
            dtype=dtype,
            device=device,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            fast_kernels=fast_kernels,
        )
        self.network, self.tokenizer, self.path = prepared.model, prepared.tokenizer, prepared.path
        self._engine = Engine(
            prepared.model,
            self.tokenizer,
            seed=seed,
            runner=prepared.runner,
            **engine_options,
        )
        if speculation is not None:
            self.engine.speculate(proposer_named(speculation, self.engine, prepared))
        self.max_model_len = self.engine.max_model_len
        self._forward = partial(prepared.forward, self.engine)
        if response_cache:
            self._answers = ResponseCache(response_cache)

    @property
    def engine(self) -> Engine:
        """What generates. Raises RequestError where the model is an encoder, which does not."""
        if self._engine is None:
            raise RequestError(
                f"{self.model_name} is an encoder: it reads whole texts and has no next token, so it embeds and cannot "
                "generate, chat or score",
                field="model",
            )
        return self._engine

    @property
    def model(self) -> Transformer:
        """The model, a decoder by itself. Raises RequestError for another kind, which `network` is."""
        if not isinstance(self.network, Transformer):
            raise RequestError(
                f"{self.model_name} is not a decoder by itself, but {type(self.network).__name__}", field="model"
            )
        return self.network

    @property
    def kind(self) -> Literal["generate", "embed"]:
        """What a server may ask of it; a model that generates embeds too."""
        return "generate" if self._embedder is None else "embed"

    @property
    def max_input_len(self) -> int:
        """Most tokens of a text that `embed` reads."""
        return self.engine.max_prompt_len if self._embedder is None else self._embedder.max_tokens

    @property
    def renderer(self) -> JinjaRenderer:
        """The chat renderer of the model's own template; made, and its template checked, on first use.

        Raises RequestError for an encoder-decoder that has none: the usual one would be noise to it.
        """
        if self.engine.pair is not None and self.tokenizer.chat_template is None:
            raise RequestError(
                f"{self.model_name} is an encoder-decoder without a chat template: generate() takes its source texts",
                field="messages",
            )
        if self._renderer is None:
            self._renderer = JinjaRenderer(self.tokenizer)
        return self._renderer

    def room_after(self, prompt_ids: Sequence[int]) -> int:
        """Most tokens of an answer to a prompt."""
        return self.max_model_len - (len(prompt_ids) if self.engine.pair is None else 1)

    def load_adapter(self, name: str, directory: str | Path) -> None:
        """Read a LoRA adapter as PEFT writes it, and let calls name it; see `Engine.load_adapter`.

        Raises CheckpointError for what does not fit the model, RequestError as `Engine.load_adapter` does.
        """
        self.engine.load_adapter(name, read_lora(Path(directory), self.model.config))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
    ) -> list[RequestOutput]:
        """See `LanguageModel.generate`; adapter: name of a loaded one. If one prompt is refused, none is run."""
        params = sampling_params or SamplingParams()
        wanted = [self._remembered(prompt, params, adapter) for prompt in _as_list(prompts)]
        running: dict[str, int] = {}  # by request id, its place among the prompts
        try:
            for place, item in enumerate(wanted):
                if not isinstance(item, RequestOutput):
                    running[self.engine.add(item, params, adapter=adapter)] = place
            left = len(running)
            while left:
                for output in self.engine.step(finished_only=True):
                    if output.request_id in running:
                        wanted[running[output.request_id]] = output
                        left -= 1
                        if self._answers is not None:
                            self._answers.put(self._answer_key(output.prompt_token_ids, params, adapter), output)
        finally:
            for request_id in running:
                self.engine.abort(request_id)
        return cast(list[RequestOutput], wanted)

    def _answer_key(self, ids: Sequence[int], params: SamplingParams, adapter: str | None) -> Hashable:
        loaded = self.engine.adapters.find(adapter)
        model = self.model_name if loaded is None else repr((self.model_name, *loaded.salt))
        return ResponseCache.key(model, ids, params)

    def _remembered(self, prompt: Prompt, params: SamplingParams, adapter: str | None) -> Prompt | RequestOutput:
        """The answer to a request that came before, or the prompt."""
        if self._answers is None:
            return prompt
        ids = self.engine.encode(prompt)
        found = self._answers.get(self._answer_key(ids, params, adapter))
        if found is None:
            return prompt
        return dataclasses.replace(
            found, request_id=uuid.uuid4().hex, prompt=prompt if isinstance(prompt, str) else None
        )

    def beam_search(self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams) -> list[list[SearchResult]]:
        """The best sequences that beam search finds after each prompt, best first, on the engine's block pool.

        Raises RequestError for a prompt that does not fit the context with `max_tokens`, and when running requests
        leave too few blocks.
        """
        self._refuse_pair("beam_search")
        ids = [self._encode(prompt, "prompt") for prompt in _as_list(prompts)]
        return beam_search_batch(self.hypotheses(), ids, params)

    def hypotheses(self, *, keep_hidden: bool = False) -> PagedHypotheses:
        """The model as the search methods of gristmill.engine.search see it, on the engine's block pool.

        keep_hidden: hypotheses also give their final states, which contrastive search reads.
        """
        self._refuse_pair("hypotheses")
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
        *,
        adapter: str | None = None,
    ) -> list[RequestOutput]:
        """See `LanguageModel.chat`; adapter as for `generate`. The token that closes a turn ends the answer, unless
        `ignore_eos`."""
        params = (sampling_params or SamplingParams()).ending_at(self.renderer.stop_token_ids)
        single = bool(messages) and isinstance(messages[0], dict)
        conversations = cast(Sequence[Sequence[Message]], [messages] if single else messages)
        return self.generate([self.renderer.render_prompt(c) for c in conversations], params, adapter=adapter)

    def score(self, prompt: Prompt, completion: Prompt, *, adapter: str | None = None) -> Score:
        """See `LanguageModel.score`; adapter as for `generate`."""
        return self.score_many([(prompt, completion)], adapter=adapter)[0]

    def score_many(self, pairs: Sequence[tuple[Prompt, Prompt]], *, adapter: str | None = None) -> list[Score]:
        """See `LanguageModel.score_many`; adapter as for `generate`."""
        encoded, engine = [], self.engine
        for prompt, completion in pairs:
            prompt_ids = self._encode(prompt, "prompt")
            completion_ids = self._encode(completion, "completion")
            total = len(completion_ids) + (len(prompt_ids) if engine.pair is None else 0)
            if total > self.max_model_len or len(prompt_ids) > engine.max_prompt_len:
                limits = f"the context holds {self.max_model_len}"
                if engine.pair is not None:
                    limits = f"the encoder reads {engine.max_prompt_len}, the decoder {self.max_model_len}"
                raise RequestError(
                    f"prompt and completion have {len(prompt_ids)} and {len(completion_ids)} tokens, {limits}",
                    field="completion",
                    code="context_length_exceeded",
                )
            encoded.append((prompt_ids, completion_ids))
        return scoring.score_completions(self._forward(adapter), encoded)

    def embed(self, texts: Sequence[Prompt], *, dimensions: int | None = None) -> np.ndarray:
        """See `LanguageModel.embed`: the mean of the final hidden states, scaled to unit length; those of the encoder
        where there is one, pooled as its checkpoint says. Token ids may stand for a text.

        dimensions: keep so many first values and scale again; see `encoders.shorten`. Raises RequestError for a text
        that is too long.
        """
        if self._embedder is not None:
            return encoders.shorten(self._embedder.embed(texts, truncate=False), dimensions, self._embedder.widths)
        ids, width = self.embedding_ids(texts), self.engine.config.hidden_size
        return encoders.shorten(scoring.mean_embeddings(self._forward(), width, ids), dimensions, (width,))

    def embedding_ids(self, texts: Sequence[Prompt], max_tokens: int | None = None) -> list[list[int]]:
        """The tokens that `embed` reads of each text, which it also takes instead of the text.

        max_tokens: longer texts are cut to so many, special ones included; None refuses what is longer than the model
        reads. Raises RequestError, and DataError for a text that cannot be encoded.
        """
        if self._embedder is not None:
            return self._embedder.token_ids(texts, max_tokens)[0]
        limit = self.max_input_len
        if max_tokens is not None and not 1 <= max_tokens <= limit:
            raise RequestError(f"max_tokens must be in [1, {limit}], got {max_tokens}", field="max_tokens")
        ids = [self._encode(text, "texts")[:max_tokens] for text in texts]
        for number, item in enumerate(ids):
            if len(item) > limit:
                raise RequestError(f"text {number} has {len(item)} tokens, the context holds {limit}", field="texts")
        return ids

    def _encode(self, text: Prompt, field: str) -> list[int]:
        if field != "completion":
            ids = self.engine.encode(text)
        elif isinstance(text, str):
            # a start token belongs before a prompt, never between a prompt and its completion
            ids = self.tokenizer.encode(text, add_bos=False)
        else:
            ids = self.engine.token_ids(field, text)
        if not ids:
            raise RequestError(f"{field} is empty", field=field)
        return ids

    def _refuse_pair(self, what: str) -> None:
        if self.engine.pair is not None:
            raise RequestError(f"{what}: an encoder-decoder is not searched; use generate()", field="model")

    def _refuse_any(self, options: dict[str, Any]) -> None:
        """Options of models that generate, which an encoder would ignore."""
        if given := [name for name, value in options.items() if value is not None]:
            raise RequestError(
                f"{given[0]} is for models that generate, and {self.model_name} is an encoder", field=given[0]
            )


def _as_list(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, (np.ndarray, torch.Tensor)):
        prompts = prompts.tolist()
    if isinstance(prompts, str):
        return [prompts]
    of_ids = len(prompts) > 0 and not isinstance(prompts[0], str) and np.ndim(prompts[0]) == 0
    return [prompts] if of_ids else list(prompts)

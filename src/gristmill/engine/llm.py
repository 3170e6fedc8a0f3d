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
from gristmill.engine.onednn import can_pack, pack_linears
from gristmill.errors import RequestError
from gristmill.model.load import load_model
from gristmill.tokens.renderer import JinjaRenderer


class LLM:
    """A language model that generates, chats, scores and embeds.

    model: an asset name, a Hugging Face directory, a GGUF file or a run directory.
    dtype: float32, bfloat16 or float16. seed: makes unseeded sampling repeatable.
    fast_kernels: use packed weights where they help; off gives the plain PyTorch path, equal up to rounding.
    Further keywords go to `Engine`.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        seed: int = 0,
        fast_kernels: bool = True,
        **engine_options: Any,
    ) -> None:
        self.model_name = str(model)
        self.model, self.tokenizer = load_model(model, dtype=dtype, device=device)
        if fast_kernels and can_pack(self.model):
            pack_linears(self.model)
        self.engine = Engine(self.model, self.tokenizer, seed=seed, **engine_options)
        self.max_model_len = self.engine.max_model_len
        self._renderer: JinjaRenderer | None = None

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
        finished: dict[str, RequestOutput | None] = {}  # by request id, in the order of the prompts
        try:
            for prompt in _as_list(prompts):
                finished[self.engine.add(prompt, params)] = None
            while None in finished.values():
                finished |= {o.request_id: o for o in self.engine.step() if o.finished and o.request_id in finished}
        finally:
            for request_id in finished:
                self.engine.abort(request_id)
        return [output for output in finished.values() if output is not None]

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
        return scoring.score_completions(self.model, encoded)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """See `LanguageModel.embed`: the mean of the final hidden states, scaled to unit length."""
        ids = [self._encode(text, "texts") for text in texts]
        for number, item in enumerate(ids):
            if len(item) > self.max_model_len:
                raise RequestError(
                    f"text {number} has {len(item)} tokens, the context holds {self.max_model_len}", field="texts"
                )
        return scoring.mean_embeddings(self.model, ids)

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

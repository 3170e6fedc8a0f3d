"""What an engine takes: prompts as ids, and requests that it can serve to their end."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ids

from gristmill.core import Prompt, SamplingParams
from gristmill.engine import encoder_decoder
from gristmill.engine.memory.sources import SourcePool
from gristmill.engine.sampling.sampler import Sampler
from gristmill.engine.stopping import generation_flops
from gristmill.errors import RequestError
from gristmill.model.config import EncoderDecoderConfig, ModelConfig
from gristmill.tokens.tokenizer import Tokenizer

_MOST_COMPLETIONS = 4096
"""Of one request, each of which takes memory from the moment it is queued."""


class Admission:
    """Refuses what could never be served, by name, before anything is queued.

    config: of the decoder. pair: of an encoder-decoder, whose encoder reads the prompts into `sources`.
    """

    def __init__(
        self,
        config: ModelConfig,
        pair: EncoderDecoderConfig | None,
        tokenizer: Tokenizer,
        sampler: Sampler,
        max_model_len: int,
        sources: SourcePool | None,
    ) -> None:
        self.config, self.pair, self.tokenizer, self.sampler = config, pair, tokenizer, sampler
        self.max_model_len, self.sources = max_model_len, sources

    def encode(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt; an encoder's text stands between the special tokens that the tokenizer puts around one.

        Raises RequestError for an id that is none or is not in the vocabulary.
        """
        if not isinstance(prompt, str):
            return self.token_ids("prompt", prompt, self.pair.encoder.vocab_size if self.pair else None)
        if self.pair is None:
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode_framed([prompt])[0][0] if prompt else []

    def token_ids(self, field: str, tokens: Iterable[object], vocabulary: int | None = None) -> list[int]:
        """The ids as plain integers. Raises RequestError for one that is none or is not in the vocabulary."""
        vocabulary = vocabulary or self.config.vocab_size
        ids: list[int] = []
        for token in tokens:
            try:
                index = operator.index(token)  # type: ignore[arg-type]
            except TypeError:
                index = -1
            if not 0 <= index < vocabulary:
                raise RequestError(f"{field}: token id {token!r} is not in the vocabulary of {vocabulary}", field=field)
            ids.append(index)
        return ids

    @property
    def max_prompt_len(self) -> int:
        """The longest prompt: `max_model_len`, of which a decoder's prompt is a part, or what an encoder can read."""
        if self.pair is None or self.sources is None:
            return self.max_model_len
        return encoder_decoder.max_source_tokens(self.pair, self.sources)

    def flops(self, prompt_tokens: int) -> Callable[[int], float]:
        """Operations of a request by the number of its output tokens."""
        if self.pair is not None:
            return encoder_decoder.generation_flops(self.pair, prompt_tokens)
        return generation_flops(self.config, prompt_tokens)

    def check(self, ids: Ids[int], params: SamplingParams) -> None:
        """Raises RequestError, naming the field, for a request that cannot be served to its end."""
        if not ids:
            raise RequestError("the prompt is empty", field="prompt")
        if params.n > _MOST_COMPLETIONS:
            raise RequestError(f"n is {params.n}; at most {_MOST_COMPLETIONS} completions are made at once", field="n")
        self.token_ids("stop_token_ids", params.stop_token_ids or ())
        self.token_ids("logit_bias", params.logit_bias or ())
        if params.seed is not None and not -(1 << 63) <= params.seed < 1 << 63:
            raise RequestError(f"seed {params.seed} is no signed 64-bit number", field="seed")
        self.sampler.validate(params)
        code = "context_length_exceeded"
        if len(ids) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(ids)} tokens; the context of {self.max_model_len} leaves no room for an answer",
                field="prompt",
                code=code,
            )
        if params.max_tokens is not None and len(ids) + params.max_tokens > self.max_model_len:
            raise RequestError(
                f"{len(ids)} prompt tokens and max_tokens {params.max_tokens} exceed the context of "
                f"{self.max_model_len}",
                field="max_tokens",
                code=code,
            )
        if len(ids) + params.min_tokens > self.max_model_len:
            raise RequestError(
                f"{len(ids)} prompt tokens and min_tokens {params.min_tokens} exceed the context of "
                f"{self.max_model_len}",
                field="min_tokens",
                code=code,
            )

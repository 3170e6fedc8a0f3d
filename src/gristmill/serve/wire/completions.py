"""The body of /v1/completions: text in, text out, without a chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag

from gristmill.errors import RequestError
from gristmill.serve.wire.base import INT32, NonEmpty, Text, TokenId
from gristmill.serve.wire.sampling import SamplingFields

MOST_PROMPTS = 2048
MOST_ANSWERS = 4096
"""Of all prompts together."""


def _kind_of_prompt(value: Any) -> str:
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else ""
    if isinstance(first, list):
        return "lists of ids"
    return "texts" if isinstance(first, str) else "ids"


Prompts = Annotated[
    Annotated[NonEmpty, Tag("text")]
    | Annotated[list[NonEmpty], Field(min_length=1, max_length=MOST_PROMPTS), Tag("texts")]
    | Annotated[list[TokenId], Field(min_length=1), Tag("ids")]
    | Annotated[
        list[Annotated[list[TokenId], Field(min_length=1)]],
        Field(min_length=1, max_length=MOST_PROMPTS),
        Tag("lists of ids"),
    ],
    Discriminator(_kind_of_prompt),
]


class CompletionRequest(SamplingFields):
    """A request to go on with a text."""

    REFUSED: ClassVar[Mapping[str, str]] = {"suffix": "text is only written after the prompt, not into it"}

    model: Text = Field(description="A name that /v1/models lists; NAME:ADAPTER for one of its adapters.")
    prompt: Prompts = Field(description="A text, a list of texts, token ids, or a list of lists of token ids.")
    max_tokens: int | None = Field(
        None, ge=0, le=INT32, description="Most tokens to generate; 0, with echo, only scores. Default: 16."
    )
    best_of: int | None = Field(
        None, ge=1, le=128, description="Generate so many and return the n of highest mean log-probability."
    )
    echo: bool | None = Field(None, description="Put the prompt before the answer, in its log-probabilities too.")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Return log-probabilities, with so many most probable tokens at each place."
    )
    add_special_tokens: bool | None = Field(
        None, description="false leaves out the start token, where the model has one before a text."
    )
    return_token_ids: bool | None = Field(None, description="Return the ids of the prompt and of the answers.")

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or more."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    def sampling_values(self) -> dict[str, Any]:
        """What SamplingParams takes. Raises RequestError for fields that do not go together."""
        n, best_of = self.n or 1, self.best_of
        if best_of is not None and best_of < n:
            raise RequestError(f"best_of must be at least n ({n})", field="best_of")
        if best_of is not None and best_of > n and self.stream:
            raise RequestError("the best of several is known at the end only: no stream", field="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens 0 leaves nothing to answer without echo", field="max_tokens")
        if self.max_tokens == 0 and self.min_tokens:
            raise RequestError("min_tokens must be at most max_tokens (0)", field="min_tokens")
        answers = len(self.prompts()) * (best_of or n)
        if answers > MOST_ANSWERS:
            raise RequestError(f"{answers} answers are too many for one request: {MOST_ANSWERS} at most", field="n")
        values = super().sampling_values()
        values["n"] = best_of or n
        # the engine always chooses one token; without an answer it is left out again
        values["max_tokens"] = 16 if self.max_tokens is None else max(self.max_tokens, 1)
        if self.logprobs is not None or values["n"] > n:
            values["logprobs"] = self.logprobs or 0
        if self.echo and self.logprobs is not None:
            values["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        return values

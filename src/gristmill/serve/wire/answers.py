"""What completions answer, in OpenAI's wire format. Fields left unset are left out of the JSON."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "abort"]
"""A stop token or string, a limit of length or time, a call of tools, a forbidden phrase, or the server's own end."""


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens, those that were found in the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """Of the generated tokens, those of reasoning."""

    reasoning_tokens: int


class Usage(BaseModel):
    """Token counts. The prompt counts once, however many answers were asked for."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None


class TopLogprob(BaseModel):
    """A token that could have stood here. `bytes` is null when the token's bytes are not known."""

    token: str
    logprob: float
    bytes: list[int] | None
    token_id: int


class TokenLogprob(TopLogprob):
    """A generated token with its natural-log probability and the most probable tokens at its place."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """Log-probabilities of the answer's tokens, in order, those of reasoning and calls among them."""

    content: list[TokenLogprob] | None
    refusal: None = None


class PromptLogprob(BaseModel):
    """A token that could have stood at a place of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of the prompt, by token id; null for the first, which nothing precedes."""


class CalledFunction(BaseModel):
    """The function that is called, with its arguments as JSON text."""

    name: str
    arguments: str


class MessageToolCall(BaseModel):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    """The model's turn."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[MessageToolCall] | None = None


class Choice(BaseModel):
    """One finished answer."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class FunctionDelta(BaseModel):
    """What a chunk adds to a call."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(BaseModel):
    """What a chunk adds to the call `index`. The first chunk of a call has its id and the function's name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(BaseModel):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(BaseModel):
    """What a chunk adds to one answer."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = None


class ChatCompletionChunk(BaseModel):
    """A piece of a streamed answer. `usage` is there only when the request asks for it."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a text's tokens. The first of an echoed prompt has none: null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    token_ids: list[int]


class CompletionChoice(BaseModel):
    """One text, or what a chunk adds to one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class TextCompletion(BaseModel):
    """The answer of /v1/completions, whole or a chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None

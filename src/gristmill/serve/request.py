"""The body of /v1/chat/completions: every field is applied, is a label without effect, or is refused by name.

The models are strict (no "0.5" for 0.5, no true for 1) and closed: a name that is not here is an error. A known OpenAI
field that we do not serve is in REFUSED with the reason, and may be null, which means absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic.config import JsonDict

from gristmill.core import Message, SamplingParams
from gristmill.errors import RequestError

INT32 = 2**31 - 1
INT64 = 2**63 - 1

NO_TOOLS = "tool calls are not supported yet"
REFUSED: Mapping[str, str] = {
    "audio": "only text is generated",
    "function_call": NO_TOOLS,
    "functions": NO_TOOLS,
    "moderation": "there is no moderation model",
    "parallel_tool_calls": NO_TOOLS,
    "prediction": "predicted outputs are not supported",
    "prompt_cache_key": "there is no prompt cache to route to",
    "prompt_cache_options": "there is no prompt cache to control",
    "prompt_cache_retention": "there is no prompt cache to control",
    "prompt_logprobs": "only the generated tokens have log-probabilities here",
    "reasoning_effort": "reasoning is not separated yet",
    "tool_choice": NO_TOOLS,
    "tools": NO_TOOLS,
    "verbosity": "say it in the system message",
    "web_search_options": "there is no web search",
}
"""Fields of the OpenAI interface, or of our sampler, that are answered with 400, and why."""

REFUSED_IN_MESSAGE: Mapping[str, str] = {
    "annotations": "only text is read",
    "audio": "only text is read",
    "function_call": NO_TOOLS,
    "name": "chat templates here have no place for participant names; write the name in the content",
    "refusal": "put what the assistant said in content",
    "tool_call_id": NO_TOOLS,
    "tool_calls": NO_TOOLS,
}

SAME_NAME = (
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens",
)  # fmt: skip
"""Fields that SamplingParams has under the same name."""

LABEL: JsonDict = {"x-effect": "none"}
"""Marks a field that is accepted and has no effect on the answer."""


class _Closed(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _without_nulls(values: Any, names: Mapping[str, str]) -> Any:
    if not isinstance(values, dict):
        return values
    return {name: value for name, value in values.items() if value is not None or name not in names}


def _is_list(value: Any) -> str:
    return "list" if isinstance(value, list) else "string"


def _is_unicode(value: str) -> str:
    """JSON can spell half of a surrogate pair ("\\ud800"), which no tokenizer can read."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is not text") from None
    return value


Text = Annotated[str, AfterValidator(_is_unicode)]
NonEmpty = Annotated[str, Field(min_length=1), AfterValidator(_is_unicode)]
Label = Annotated[str, Field(max_length=512), AfterValidator(_is_unicode)]


class TextPart(_Closed):
    """A piece of a message's content. Pieces are joined as they are."""

    type: Literal["text"]
    text: Text


Content = Annotated[
    Annotated[Text, Tag("string")] | Annotated[list[TextPart], Field(min_length=1), Tag("list")],
    Discriminator(_is_list),
]
Stop = Annotated[
    Annotated[NonEmpty, Tag("string")] | Annotated[list[NonEmpty], Field(max_length=4), Tag("list")],
    Discriminator(_is_list),
]


class ChatMessage(_Closed):
    """One turn of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: Content = Field(description="Text, or a list of text parts.")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        return _without_nulls(values, REFUSED_IN_MESSAGE)

    def plain(self) -> Message:
        """Role and text, as the chat template takes them."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role=self.role, content=content)


class StreamOptions(_Closed):
    """Options of a streamed answer."""

    include_usage: bool | None = Field(None, description="Send one more chunk, with the token counts.")


class ResponseFormat(_Closed):
    """The format of the answer: plain text is the only one."""

    type: Literal["text"]


class ChatCompletionRequest(_Closed):
    """A request to continue a conversation."""

    model: Text = Field(description="A name that /v1/models lists.")
    messages: list[ChatMessage] = Field(min_length=1, description="The conversation so far: system, user, assistant.")

    max_completion_tokens: int | None = Field(
        None, ge=1, le=INT32, description="Most tokens to generate. Default: what is left of the context."
    )
    max_tokens: int | None = Field(
        None, ge=1, le=INT32, description="The older name of max_completion_tokens. Only one of the two may be given."
    )
    min_tokens: int | None = Field(None, ge=0, le=INT32, description="No end of sequence before so many tokens.")
    n: int | None = Field(None, ge=1, le=128, description="How many answers to generate. Default: 1.")
    seed: int | None = Field(None, ge=-INT64 - 1, le=INT64, description="Makes sampling repeatable.")

    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the most probable token. Default: 1.")
    top_p: float | None = Field(None, gt=0, le=1, description="Sample from the smallest set of this probability.")
    top_k: int | None = Field(None, ge=-1, le=INT32, description="Sample from the k most probable; 0 or -1 from all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Drop tokens below this share of the most probable one.")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="Lowers tokens that were generated before.")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="The same, for each time they were.")
    repetition_penalty: float | None = Field(
        None, gt=0, le=1e6, description="Above 1 makes tokens of prompt and answer less likely."
    )
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None
    ) = Field(None, description="Token id to a number in [-100, 100], added to its logit.")

    stop: Stop | None = Field(None, description="A string, or up to 4, that end the answer and are not part of it.")
    stop_token_ids: list[Annotated[int, Field(ge=0, le=INT32)]] | None = Field(
        None, max_length=1024, description="Token ids that end the answer, besides the model's own."
    )
    include_stop_str_in_output: bool | None = Field(None, description="Keep the stop string in the answer.")
    ignore_eos: bool | None = Field(None, description="Go on after the model's own end of sequence.")
    skip_special_tokens: bool | None = Field(None, description="Leave special tokens out of the text. Default: true.")

    logprobs: bool | None = Field(None, description="Return the log-probability of each generated token.")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="Also return so many most probable tokens at each place; needs logprobs."
    )

    stream: bool | None = Field(None, description="Send the answer in chunks, as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="include_usage; needs stream.")
    response_format: ResponseFormat | None = Field(None, description='{"type": "text"} only.')
    modalities: list[Literal["text"]] | None = Field(None, min_length=1, max_length=1, description='["text"] only.')

    store: Literal[False] | None = Field(None, description="false only: nothing is stored.", json_schema_extra=LABEL)
    service_tier: Literal["auto", "default"] | None = Field(
        None, description='"auto" or "default" only: there is one tier.', json_schema_extra=LABEL
    )
    user: Label | None = Field(None, description="Your label.", json_schema_extra=LABEL)
    safety_identifier: Label | None = Field(None, description="Your label.", json_schema_extra=LABEL)
    metadata: dict[Label, Label] | None = Field(
        None, max_length=16, description="Your labels.", json_schema_extra=LABEL
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        return _without_nulls(values, REFUSED)

    def sampling_params(self, end_of_turn: Sequence[int] = ()) -> SamplingParams:
        """The request as the engine takes it. Raises RequestError for fields that do not go together.

        The chat template's `end_of_turn` tokens end an answer too, unless ignore_eos says otherwise: the tokenizer's
        own end of sequence can be another one, and then the model would talk on as the user.
        """
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise RequestError("give max_tokens or max_completion_tokens, not both", field="max_completion_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", field="top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream to be true", field="stream_options")
        values = {name: getattr(self, name) for name in SAME_NAME if getattr(self, name) is not None}
        if self.logit_bias is not None:
            values["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        if end_of_turn and not self.ignore_eos:
            values["stop_token_ids"] = list(dict.fromkeys([*(self.stop_token_ids or ()), *end_of_turn]))
        if self.logprobs:
            values["logprobs"] = self.top_logprobs or 0
        values["max_tokens"] = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        return SamplingParams.from_dict(values)

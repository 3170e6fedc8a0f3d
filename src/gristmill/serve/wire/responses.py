"""/v1/responses: a conversation as a list of typed items, and the items that answer it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Discriminator, Field, JsonValue, Tag

from gristmill.serve.wire.answers import TokenLogprob
from gristmill.serve.wire.base import INT32, LABEL, Closed, JsonObject, Label, Metadata, NonEmpty, Text, branch_of
from gristmill.serve.wire.chat import JsonObjectFormat, ReasoningEffort, TextFormat

ItemStatus = Literal["in_progress", "completed", "incomplete"]
Id = Annotated[Label | None, Field(json_schema_extra=LABEL)]
"""Of an item that comes back: it stands where it stands, so its id is not looked at."""


class InputText(Closed):
    """A piece of what the user or the system says, or of what a tool answered."""

    REFUSED: ClassVar[Mapping[str, str]] = {"prompt_cache_breakpoint": "prompts are cached by themselves"}

    type: Literal["input_text"]
    text: Text


class SaidText(Closed):
    """A piece of what the assistant said."""

    type: Literal["output_text"]
    text: Text
    annotations: list[JsonValue] | None = Field(None, max_length=0, description="[] only: there are none.")
    logprobs: list[JsonValue] | None = Field(None, json_schema_extra=LABEL)


Part = Annotated[InputText | SaidText, Field(discriminator="type")]
Content = Annotated[
    Annotated[Text, Tag("string")] | Annotated[list[Part], Field(min_length=1), Tag("list")], Discriminator(branch_of)
]
Output = Annotated[
    Annotated[Text, Tag("string")] | Annotated[list[InputText], Field(min_length=1), Tag("list")],
    Discriminator(branch_of),
]


class MessageItem(Closed):
    """Something said: by the user, the assistant, or the system (developer is another word for it)."""

    REFUSED: ClassVar[Mapping[str, str]] = {"phase": "an answer has one phase here"}

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content = Field(description="Text, or a list of text parts.")
    id: Id = None
    status: Annotated[ItemStatus | None, Field(json_schema_extra=LABEL)] = None


class FunctionCallItem(Closed):
    """A call that the assistant made."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "async": "calls are waited for",
        "caller": "the assistant makes all calls",
        "namespace": "functions have no namespaces here",
    }

    type: Literal["function_call"]
    call_id: NonEmpty
    name: NonEmpty
    arguments: Text = Field(description="JSON text.")
    id: Id = None
    status: Annotated[ItemStatus | None, Field(json_schema_extra=LABEL)] = None


class FunctionCallOutputItem(Closed):
    """What a call came to."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "caller": "the assistant makes all calls",
        "name": "the call that call_id points to has it",
        "namespace": "functions have no namespaces here",
    }

    type: Literal["function_call_output"]
    call_id: NonEmpty = Field(description="The call that is answered.")
    output: Output = Field(description="Text, or a list of text parts.")
    id: Id = None
    status: Annotated[ItemStatus | None, Field(json_schema_extra=LABEL)] = None


class ReasoningText(Closed):
    """A piece of reasoning."""

    type: Literal["reasoning_text"]
    text: Text


class ReasoningItem(Closed):
    """What the assistant thought before it went on."""

    REFUSED: ClassVar[Mapping[str, str]] = {"encrypted_content": "reasoning is in content, as text"}

    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None
    summary: list[JsonValue] | None = Field(None, max_length=0, description="[] only: reasoning is not summarised.")
    id: Id = None
    status: Annotated[ItemStatus | None, Field(json_schema_extra=LABEL)] = None


KINDS = ("message", "function_call", "function_call_output", "reasoning")


def _kind(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "message" if kind is None else kind if isinstance(kind, str) else None


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(
        _kind,
        custom_error_type="item_type",
        custom_error_message=f"type must be one of {', '.join(KINDS)}",
    ),
]
Input = Annotated[
    Annotated[Text, Tag("string")] | Annotated[list[Item], Field(min_length=1), Tag("list")], Discriminator(branch_of)
]


class FunctionTool(Closed):
    """A function that the model may call: the only kind of tool."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "allowed_callers": "the assistant makes all calls",
        "async": "calls are waited for",
        "defer_loading": "all functions are told to the model at once",
        "output_schema": "what a function returns is not checked",
    }

    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: Text | None = None
    parameters: JsonObject | None = Field(None, description="A JSON schema of its arguments.")
    strict: bool | None = Field(None, description="Hold the arguments to the schema.")


class NamedFunction(Closed):
    """The function that must be called."""

    type: Literal["function"]
    name: NonEmpty


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("string")] | Annotated[NamedFunction, Tag("object")],
    Discriminator(lambda value: "string" if isinstance(value, str) else "object"),
]


class SchemaFormat(Closed):
    """JSON that a schema allows."""

    type: Literal["json_schema"]
    name: NonEmpty
    json_schema: JsonObject = Field(alias="schema")
    description: Text | None = Field(None, description="For the reader; the model does not see it.")
    strict: bool | None = Field(None, description="Answers are held to the schema either way.")


class TextOptions(Closed):
    """The form of the answer's text."""

    REFUSED: ClassVar[Mapping[str, str]] = {"verbosity": "say it in the instructions"}

    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None


class ReasoningOptions(Closed):
    """How much to think."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "context": "reasoning items are given back to the chat template, which decides",
        "generate_summary": "reasoning is shown as it is",
        "mode": "there is one mode",
        "summary": "reasoning is shown as it is",
    }

    effort: ReasoningEffort | None = None


class StreamingOptions(Closed):
    """Options of a stream."""

    include_obfuscation: Literal[False] | None = Field(
        None, description="false only: events are not padded.", json_schema_extra=LABEL
    )


class ResponseRequest(Closed):
    """A request to go on with a conversation of items."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "access_programs": "there are none",
        "background_options": "send a batch instead",
        "context_management": "conversations are not compacted",
        "conversation": "use previous_response_id",
        "image": "only text is read",
        "max_tool_calls": "it is for built-in tools, and there are none",
        "moderation": "there is no moderation model",
        "prompt": "there are no stored prompts",
        "prompt_cache_options": "prompts are cached by themselves",
        "prompt_cache_retention": "prompts are cached by themselves, as long as there is room",
    }

    model: Text = Field(description="A name that /v1/models lists; NAME:ADAPTER for one of its adapters.")
    input: Input = Field(description="What the user says, or a list of items.")
    instructions: Text | None = Field(
        None, description="The system message. It is not taken over by previous_response_id."
    )
    previous_response_id: Label | None = Field(None, description="A stored response, which the input goes on from.")
    store: bool | None = Field(None, description="Keep the response in memory for a while. Default: true.")

    max_output_tokens: int | None = Field(
        None, ge=1, le=INT32, description="Most tokens to generate, reasoning included. Default: the context's rest."
    )
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the most probable token. Default: 1.")
    top_p: float | None = Field(None, gt=0, le=1, description="Sample from the smallest set of this probability.")
    text: TextOptions | None = Field(None, description="Hold the answer to plain text, JSON or a JSON schema.")
    reasoning: ReasoningOptions | None = Field(None, description="effort, for models that reason.")
    tools: list[FunctionTool] | None = Field(None, max_length=128, description="Functions that the model may call.")
    tool_choice: ToolChoice | None = Field(
        None, description='"auto", "none", "required", or the function to call. Default: auto with tools.'
    )
    parallel_tool_calls: bool | None = Field(None, description="Allow several calls in one answer. Default: true.")
    include: list[Literal["message.output_text.logprobs"]] | None = Field(
        None, max_length=1, description='["message.output_text.logprobs"] adds log-probabilities to the text.'
    )
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="Most probable tokens to name at each place; needs include."
    )
    priority: int | None = Field(
        None, ge=-INT32, le=INT32, description="Lower numbers go first when requests wait. Default: 0."
    )
    stream: bool | None = Field(None, description="Send the response as typed events while it grows.")
    metadata: Metadata | None = Field(None, description="Your labels, which the response has too.")

    truncation: Literal["disabled"] | None = Field(
        None, description='"disabled" only: nothing is left out of a conversation that is too long.'
    )
    background: Literal[False] | None = Field(None, description="false only: send a batch instead.")
    stream_options: StreamingOptions | None = Field(None, description="Options of a stream.")
    service_tier: Literal["auto", "default"] | None = Field(
        None, description='"auto" or "default" only: there is one tier.', json_schema_extra=LABEL
    )
    prompt_cache_key: Label | None = Field(None, description="Your label.", json_schema_extra=LABEL)
    safety_identifier: Label | None = Field(None, description="Your label.", json_schema_extra=LABEL)
    user: Label | None = Field(None, description="Your label.", json_schema_extra=LABEL)


class OutputText(BaseModel):
    """A piece of the answer. `logprobs` is there when it was asked for."""

    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: list[JsonValue] | None = None
    logprobs: list[TokenLogprob] | None = None


class OutputItem(BaseModel):
    """A part of the response: a message, a call of a function, or reasoning. Each kind has its own fields."""

    id: str
    type: Literal["message", "function_call", "reasoning"]
    status: ItemStatus
    role: Literal["assistant"] | None = None
    content: list[OutputText] | None = None
    summary: list[JsonValue] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None


class InputDetails(BaseModel):
    """Of the input tokens, those found in the prefix cache. Writing to it is not counted."""

    cached_tokens: int
    cache_write_tokens: Literal[0]


class OutputDetails(BaseModel):
    """Of the output tokens, those of reasoning."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseFailure(BaseModel):
    """Why a response could not be finished."""

    code: Literal["server_error"]
    message: str


class IncompleteDetails(BaseModel):
    """Why a response ended early."""

    reason: Literal["max_output_tokens", "content_filter"]


class Response(BaseModel):
    """The answer to a list of items, and how it was asked for."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, JsonValue]
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: dict[str, JsonValue]
    tool_choice: ToolChoice
    tools: list[dict[str, JsonValue]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None


class ResponseDeleted(BaseModel):
    """A response is no more."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


EventType = Literal[
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.reasoning_text.delta",
    "response.reasoning_text.done",
    "response.content_part.done",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
    "response.completed",
    "response.incomplete",
    "response.failed",
]


class ResponseEvent(BaseModel):
    """An event of a stream, numbered from 0. Each type has its own fields; the others are left out."""

    type: EventType
    sequence_number: int
    response: Response | None = None
    output_index: int | None = None
    item: OutputItem | None = None
    item_id: str | None = None
    content_index: int | None = None
    part: OutputText | None = None
    delta: str | None = None
    text: str | None = None
    arguments: str | None = None
    logprobs: list[TokenLogprob] | None = None

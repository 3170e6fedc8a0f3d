"""The body of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Discriminator, Field, JsonValue, Tag

from gristmill.core import Message, StructuredOutput
from gristmill.core import ToolCall as CoreToolCall
from gristmill.errors import RequestError
from gristmill.serve.wire.base import INT32, LABEL, Closed, JsonObject, Label, Metadata, NonEmpty, Text, branch_of
from gristmill.serve.wire.sampling import SamplingFields

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
THINKING_TOKENS: Mapping[str, int] = {"none": 0, "minimal": 128, "low": 512, "medium": 2048, "high": 8192}
"""Tokens of reasoning that an effort allows; "xhigh" sets no limit."""


class TextPart(Closed):
    """A piece of a message's content. Pieces are joined as they are."""

    type: Literal["text"]
    text: Text


Content = Annotated[
    Annotated[Text, Tag("string")] | Annotated[list[TextPart], Field(min_length=1), Tag("list")],
    Discriminator(branch_of),
]


def plain_text(content: str | list[TextPart]) -> str:
    """The text of a message's content."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


class FunctionCall(Closed):
    """The function that a call names, and its arguments as JSON text."""

    name: NonEmpty
    arguments: Text
    parsed_arguments: JsonValue = Field(None, description="What a client made of them.", json_schema_extra=LABEL)


class ToolCall(Closed):
    """A call that the assistant made."""

    id: NonEmpty
    type: Literal["function"]
    function: FunctionCall
    index: int | None = Field(None, description="Its place, as in a stream's chunks.", json_schema_extra=LABEL)

    def plain(self) -> CoreToolCall:
        """As the chat template takes it."""
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return cast(CoreToolCall, {"id": self.id, "type": self.type, "function": function})


class _Said(Closed):
    REFUSED: ClassVar[Mapping[str, str]] = {"name": "chat templates have no place for names; write it in the content"}

    role: str
    content: Content = Field(description="Text, or a list of text parts.")

    def plain(self) -> Message:
        """As the chat template takes it."""
        return Message(role=self.role, content=plain_text(self.content))


class SystemMessage(_Said):
    """What the model is to be, or to do, throughout."""

    role: Literal["system", "developer"]


class UserMessage(_Said):
    """What the user says."""

    role: Literal["user"]


class AssistantMessage(Closed):
    """What the assistant said or called."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        **_Said.REFUSED,
        "annotations": "only text is read",
        "audio": "only text is read",
        "function_call": "give tool_calls",
        "refusal": "put what the assistant said in content",
    }

    role: Literal["assistant"]
    content: Content | None = Field(None, description="Text, or a list of text parts; null only with tool_calls.")
    reasoning_content: Text | None = Field(None, description="What it thought before it answered.")
    tool_calls: list[ToolCall] | None = Field(None, min_length=1, max_length=128, description="Calls of tools.")
    parsed: JsonValue = Field(None, description="What OpenAI's client made of content.", json_schema_extra=LABEL)
    provider_specific_fields: JsonObject | None = Field(
        None, description="A client's own notes.", json_schema_extra=LABEL
    )

    def plain(self) -> Message:
        """As the chat template takes it."""
        if self.content is None and self.tool_calls is None:
            raise RequestError("an assistant message needs content or tool_calls", field="messages")
        message = Message(role=self.role, content=plain_text(self.content or ""))
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls is not None:
            message["tool_calls"] = [call.plain() for call in self.tool_calls]
        return message


class ToolMessage(Closed):
    """What a tool answered."""

    REFUSED: ClassVar[Mapping[str, str]] = {"name": "the call that tool_call_id points to has it"}

    role: Literal["tool"]
    content: Content = Field(description="Text, or a list of text parts.")
    tool_call_id: NonEmpty = Field(description="The call that is answered.")

    def plain(self) -> Message:
        """As the chat template takes it."""
        return Message(role=self.role, content=plain_text(self.content), tool_call_id=self.tool_call_id)


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class FunctionDefinition(Closed):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: Text | None = None
    parameters: JsonObject | None = Field(None, description="A JSON schema of its arguments.")
    strict: bool | None = Field(None, description="Hold the arguments to the schema.")


class Tool(Closed):
    """A tool: functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Closed):
    """Names a function."""

    name: NonEmpty


class NamedTool(Closed):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("string")] | Annotated[NamedTool, Tag("object")],
    Discriminator(lambda value: "string" if isinstance(value, str) else "object"),
]


class JsonSchema(Closed):
    """A named JSON schema."""

    name: NonEmpty
    description: Text | None = Field(None, description="For the reader; the model does not see it.")
    json_schema: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="Answers are held to the schema either way.")


class TextFormat(Closed):
    """Plain text."""

    type: Literal["text"]


class JsonObjectFormat(Closed):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Closed):
    """JSON that a schema allows."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


def structured_format(form: TextFormat | JsonObjectFormat | JsonSchemaFormat) -> StructuredOutput | None:
    """What the engine is to hold the answer to."""
    if isinstance(form, TextFormat):
        return None
    if isinstance(form, JsonObjectFormat) or form.json_schema.json_schema is None:
        return StructuredOutput(json_object=True)
    return StructuredOutput(json_schema=form.json_schema.json_schema)


class ChatCompletionRequest(SamplingFields):
    """A request to continue a conversation."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "audio": "only text is generated",
        "function_call": "it is the older form of tool_choice",
        "functions": "it is the older form of tools",
        "moderation": "there is no moderation model",
        "prediction": "predicted outputs are not supported",
        "prompt_cache_options": "prompts are cached by themselves",
        "prompt_cache_retention": "prompts are cached by themselves, as long as there is room",
        "verbosity": "say it in the system message",
        "web_search_options": "there is no web search",
    }

    model: Text = Field(description="A name that /v1/models lists; NAME:ADAPTER for one of its adapters.")
    messages: list[ChatMessage] = Field(
        min_length=1, description="The conversation so far: system or developer, user, assistant, tool."
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, le=INT32, description="Most tokens to generate. Default: what is left of the context."
    )
    max_tokens: int | None = Field(
        None, ge=1, le=INT32, description="The older name of max_completion_tokens. Only one of the two may be given."
    )
    logprobs: bool | None = Field(None, description="Return the log-probability of each generated token.")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="Also return so many most probable tokens at each place; needs logprobs."
    )

    tools: list[Tool] | None = Field(None, max_length=128, description="Functions that the model may call.")
    tool_choice: ToolChoice | None = Field(
        None, description='"auto", "none", "required", or the function to call. Default: auto with tools.'
    )
    parallel_tool_calls: bool | None = Field(None, description="Allow several calls in one answer. Default: true.")
    response_format: ResponseFormat | None = Field(
        None, description="Hold the answer to plain text, to a JSON object or to a JSON schema."
    )
    reasoning_effort: ReasoningEffort | None = Field(
        None,
        description="Tokens of reasoning: "
        + ", ".join(f"{name} {tokens}" for name, tokens in THINKING_TOKENS.items())
        + ", xhigh without limit. For models that reason.",
    )
    include_reasoning: bool | None = Field(None, description="false leaves reasoning_content out. Default: true.")

    continue_final_message: bool | None = Field(
        None, description="The last message is the beginning of the answer, which goes on from there."
    )
    chat_template_kwargs: JsonObject | None = Field(
        None, description="Variables that the model's chat template reads, such as enable_thinking."
    )
    return_token_ids: bool | None = Field(None, description="Return the ids of the prompt and of the answers.")

    modalities: list[Literal["text"]] | None = Field(None, min_length=1, max_length=1, description='["text"] only.')
    store: Literal[False] | None = Field(None, description="false only: nothing is stored.", json_schema_extra=LABEL)
    service_tier: Literal["auto", "default"] | None = Field(
        None, description='"auto" or "default" only: there is one tier.', json_schema_extra=LABEL
    )
    prompt_cache_key: Label | None = Field(
        None, description="Your label: prompts that begin alike are cached anyway.", json_schema_extra=LABEL
    )
    safety_identifier: Label | None = Field(None, description="Your label.", json_schema_extra=LABEL)
    metadata: Metadata | None = Field(None, description="Your labels.", json_schema_extra=LABEL)

    def conversation(self) -> list[Message]:
        """The messages as the chat template takes them."""
        return [message.plain() for message in self.messages]

    def sampling_values(self) -> dict[str, Any]:
        """What SamplingParams takes, but for what tools and reasoning add.

        Raises RequestError for fields that do not go together.
        """
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise RequestError("give max_tokens or max_completion_tokens, not both", field="max_completion_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", field="top_logprobs")
        values = super().sampling_values()
        if self.logprobs:
            values["logprobs"] = self.top_logprobs or 0
        values["max_tokens"] = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        if self.response_format is not None and (form := structured_format(self.response_format)) is not None:
            if "structured" in values:
                raise RequestError("give response_format or structured_outputs, not both", field="structured_outputs")
            values["structured"] = form
        self._check_tools()
        if self.reasoning_effort is not None:
            if self.thinking_budget is not None:
                raise RequestError("give reasoning_effort or thinking_budget, not both", field="reasoning_effort")
            if self.reasoning_effort in THINKING_TOKENS:
                values["thinking_budget"] = THINKING_TOKENS[self.reasoning_effort]
        return values

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        if twice := {name for name in names if names.count(name) > 1}:
            raise RequestError(f"two tools are called {twice.pop()!r}", field="tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise RequestError(
                f"tool_choice names {self.tool_choice.function.name!r}, which tools does not have", field="tool_choice"
            )
        if self.tool_choice not in (None, "none") and not names:
            raise RequestError("tool_choice needs tools", field="tool_choice")
        if self.parallel_tool_calls is not None and not names:
            raise RequestError("parallel_tool_calls needs tools", field="parallel_tool_calls")

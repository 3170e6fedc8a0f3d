"""What is said of models, of the server's state and of errors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from gristmill.serve.wire.base import Closed, JsonObject, NonEmpty, Text, TokenId
from gristmill.serve.wire.chat import ChatMessage, Tool

Kind = Literal["generate", "embed", "classify"]


class ModelCard(BaseModel):
    """A model that this server answers for. `max_model_len` is its context in tokens."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None = None
    kind: Kind | None = None
    parent: str | None = None
    state: Literal["loading", "ready", "failed"]


class ModelList(BaseModel):
    """All models of this server."""

    object: Literal["list"]
    data: list[ModelCard]


class LoadRequest(Closed):
    """Load a model from this machine."""

    model: NonEmpty = Field(description="An asset name, a directory, a GGUF file or a run directory.")
    name: Annotated[str, Field(pattern=r"^[^:\s][^:]{0,127}$")] | None = Field(
        None, description="Its name in requests, without a colon. Default: what `model` says."
    )


class NameRequest(Closed):
    """Names a served model."""

    model: NonEmpty = Field(description="A name that /v1/models lists.")


class LoadAdapterRequest(Closed):
    """Load a LoRA adapter for a served model."""

    model: NonEmpty = Field(description="The served model that it was trained for.")
    lora_name: Annotated[str, Field(pattern=r"^[^:\s]{1,128}$")] = Field(
        description="The adapter's name: requests ask for MODEL:NAME."
    )
    lora_path: NonEmpty = Field(description="A directory as PEFT saves it.")


class UnloadAdapterRequest(Closed):
    """Forget a LoRA adapter of a served model."""

    model: NonEmpty = Field(description="The served model.")
    lora_name: NonEmpty = Field(description="The adapter's name.")


class TokenizeRequest(Closed):
    """Text or a conversation to be turned into token ids: one of `prompt` and `messages`."""

    model: Text | None = Field(None, description="A name that /v1/models lists; not needed where there is only one.")
    prompt: Text | None = Field(None, description="A text.")
    messages: list[ChatMessage] | None = Field(None, min_length=1, description="A conversation.")
    tools: list[Tool] | None = Field(None, max_length=128, description="Functions that the model may call.")
    add_special_tokens: bool | None = Field(
        None, description="false leaves out the start token, where the model has one before a text."
    )
    add_generation_prompt: Literal[True] | None = Field(
        None, description="End where the assistant's answer begins; true is the only form. Default: true."
    )
    chat_template_kwargs: JsonObject | None = Field(None, description="Variables that the model's chat template reads.")
    return_token_strs: bool | None = Field(None, description="Also return each token's text.")


class TokenizeResponse(BaseModel):
    """Token ids and their number."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class DetokenizeRequest(Closed):
    """Token ids to be turned into text."""

    model: Text | None = Field(None, description="A name that /v1/models lists; not needed where there is only one.")
    tokens: list[TokenId] = Field(description="Token ids.")


class DetokenizeResponse(BaseModel):
    """The text of the tokens, special ones included."""

    prompt: str


class TokenizerInfo(BaseModel):
    """Special tokens and chat template of a model, as evaluation harnesses ask for them."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None


class ErrorDetail(BaseModel):
    """`param` names the field at fault, `code` says what is wrong in a word that programs can rely on."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer with a status of 400 or more."""

    error: ErrorDetail

"""Bodies and answers of the models that read whole texts: embeddings, rerank, score, classify."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from gristmill.core import Message
from gristmill.serve.wire.base import INT32, LABEL, Closed, Label, NonEmpty, Text, TokenId, branch_of
from gristmill.serve.wire.chat import ChatMessage

MOST_INPUTS = 2048


class _Reading(Closed):
    model: Text = Field(description="A name that /v1/models lists.")
    truncate_prompt_tokens: int | None = Field(
        None,
        ge=-1,
        le=INT32,
        description="Cut longer inputs to so many tokens; -1 to as many as the model reads. Default: they are refused.",
    )
    user: Label | None = Field(None, description="Your label.", json_schema_extra=LABEL)


def _kind_of_input(value: Any) -> str:
    if not isinstance(value, list):
        return "string"
    first = value[0] if value else ""
    return "lists of ids" if isinstance(first, list) else "ids" if isinstance(first, int) else "texts"


def _kind_of_judged(value: Any) -> str:
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, dict):
        return "pairs" if isinstance(value, list) else "pair"
    return _kind_of_input(value)


def _kind_of_document(value: Any) -> str:
    return "object" if isinstance(value, dict) else "string"


Ids = Annotated[list[TokenId], Field(min_length=1)]
Many = Field(min_length=1, max_length=MOST_INPUTS)
Inputs = Annotated[
    Annotated[NonEmpty, Tag("string")]
    | Annotated[list[NonEmpty], Many, Tag("texts")]
    | Annotated[Ids, Tag("ids")]
    | Annotated[list[Ids], Many, Tag("lists of ids")],
    Discriminator(_kind_of_input),
]


class EmbeddingRequest(_Reading):
    """Texts to be turned into vectors."""

    input: Inputs = Field(description="A text, a list of texts, token ids, or a list of lists of token ids.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="Numbers, or the base64 of float32 values, least byte first. Default: float."
    )
    dimensions: int | None = Field(
        None, ge=1, le=INT32, description="Keep so many first values, where the model was trained for that."
    )


class Document(Closed):
    """A document of a rerank request."""

    text: NonEmpty


class RerankRequest(_Reading):
    """Documents to be put in order by how well they answer a query."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "max_chunks_per_doc": "documents are not split; truncate_prompt_tokens cuts them",
        "max_tokens_per_doc": "truncate_prompt_tokens cuts query and document together",
        "rank_fields": "a document is one text",
    }

    query: NonEmpty
    documents: list[
        Annotated[
            Annotated[NonEmpty, Tag("string")] | Annotated[Document, Tag("object")], Discriminator(_kind_of_document)
        ]
    ] = Field(min_length=1, max_length=MOST_INPUTS, description="Texts, or objects with a text.")
    top_n: int | None = Field(None, ge=1, le=INT32, description="Return only so many, the best. Default: all.")
    return_documents: bool | None = Field(None, description="Return the documents' texts too. Default: true.")

    def texts(self) -> list[str]:
        """The documents' texts."""
        return [item if isinstance(item, str) else item.text for item in self.documents]


Texts = Annotated[
    Annotated[NonEmpty, Tag("string")] | Annotated[list[NonEmpty], Many, Tag("list")], Discriminator(branch_of)
]


class ScoreRequest(_Reading):
    """Pairs of texts to be scored: one with one, one with each, or each with its own."""

    text_1: Texts = Field(description="A text, or as many as text_2 has.")
    text_2: Texts = Field(description="A text, or several.")


class TextPair(Closed):
    """Two texts that are judged together."""

    text: NonEmpty
    text_pair: NonEmpty


def _conversations(value: Any) -> str:
    return "conversations" if isinstance(value, list) and value and isinstance(value[0], list) else "conversation"


Conversation = Annotated[list[ChatMessage], Field(min_length=1)]


class ClassifyRequest(_Reading):
    """Texts, pairs of texts or answered conversations to be judged: one of `input` and `messages`."""

    input: (
        Annotated[
            Annotated[NonEmpty, Tag("string")]
            | Annotated[TextPair, Tag("pair")]
            | Annotated[list[NonEmpty], Many, Tag("texts")]
            | Annotated[list[TextPair], Many, Tag("pairs")]
            | Annotated[Ids, Tag("ids")]
            | Annotated[list[Ids], Many, Tag("lists of ids")],
            Discriminator(_kind_of_judged),
        ]
        | None
    ) = Field(None, description="A text, a pair of texts, token ids, or a list of one of these.")
    messages: (
        Annotated[
            Annotated[Conversation, Tag("conversation")] | Annotated[list[Conversation], Many, Tag("conversations")],
            Discriminator(_conversations),
        ]
        | None
    ) = Field(None, description="A conversation, or a list of them, for a reward model; each with an answer.")
    use_activation: bool | None = Field(
        None, description="false returns the model's bare outputs instead of probabilities. Default: true."
    )

    def judged(self) -> list[Any]:
        """The inputs as the model takes them."""
        items: list[Any] = self.input if isinstance(self.input, list) else [self.input]
        if isinstance(items[0], int):
            return [items]
        return [(item.text, item.text_pair) if isinstance(item, TextPair) else item for item in items]

    def conversations(self) -> list[list[Message]]:
        """The conversations as a chat template takes them."""
        found: list[Any] = self.messages or []
        return [[message.plain() for message in each] for each in (found if isinstance(found[0], list) else [found])]


class PoolingUsage(BaseModel):
    """Token counts of what was read, special tokens included."""

    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    """The vector of one input, or its base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    """Vectors, in the order of the inputs."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: PoolingUsage


class RankedDocument(BaseModel):
    """What was reranked."""

    text: str


class Ranked(BaseModel):
    """A document's place in the request, and its score."""

    index: int
    relevance_score: float
    document: RankedDocument | None = None


class RerankResponse(BaseModel):
    """Documents, best first."""

    id: str
    model: str
    results: list[Ranked]
    usage: PoolingUsage


class PairScore(BaseModel):
    """The score of one pair."""

    index: int
    object: Literal["score"]
    score: float


class _Judged(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    usage: PoolingUsage


class ScoreResponse(_Judged):
    """Scores, in the order of the pairs."""

    data: list[PairScore]


class LabelScores(BaseModel):
    """The best label of one input, and `probs` of all in the model's order; of a regression or a reward, the values."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyResponse(_Judged):
    """Judgements, in the order of the inputs."""

    data: list[LabelScores]

"""/v1/embeddings, /v1/rerank, /v1/score and /v1/classify.

Who answers: embeddings any model but a classifier; classify a classifier or reward model; rerank and score a model with
one label (a cross-encoder), else one that embeds, by the cosine of the vectors.
"""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import BaseModel

from gristmill.core import Prompt
from gristmill.engine.async_engine import EngineClosed
from gristmill.engine.classifier import Classification, Encoded, Judged
from gristmill.engine.scoring import batches_of
from gristmill.errors import DataError, RequestError
from gristmill.serve.answering.jobs import Visit
from gristmill.serve.api.common import ERRORS, answer_while_connected, host_of, json_only, visit_of
from gristmill.serve.errors import ApiError, closing, refusal
from gristmill.serve.hosted import Hosted
from gristmill.serve.wire.models import Kind
from gristmill.serve.wire.pooling import (
    ClassifyRequest,
    ClassifyResponse,
    Embedding,
    EmbeddingList,
    EmbeddingRequest,
    LabelScores,
    PairScore,
    PoolingUsage,
    Ranked,
    RankedDocument,
    RerankRequest,
    RerankResponse,
    ScoreRequest,
    ScoreResponse,
)

SLICE_TOKENS = 4096
"""A long request is computed in pieces of so many tokens, between which others have their turn."""

R = TypeVar("R")

router = APIRouter(responses=ERRORS)


@dataclass(frozen=True)
class Reader:
    """The model that a request names, of a kind that can do what it asks, and whose request it is."""

    hosted: Hosted
    visit: Visit

    @property
    def model(self) -> Any:
        """An LLM or a TextClassifier."""
        return self.hosted.model

    def limit(self, truncate: int | None) -> int | None:
        """What `truncate_prompt_tokens` stands for."""
        longest: int = self.model.max_input_len
        return longest if truncate == -1 else truncate

    async def embed(
        self, prompts: Sequence[Prompt], truncate: int | None, dimensions: int | None = None
    ) -> tuple[np.ndarray, int]:
        """The vectors of texts, (texts, size), and how many tokens they have."""
        ids = await self.hosted.run(self.model.embedding_ids, prompts, self.limit(truncate))
        rows = await self._in_slices(lambda part: self.model.embed(part, dimensions=dimensions), ids, map(len, ids))
        return np.stack(rows), sum(map(len, ids))

    async def score(self, pairs: Sequence[tuple[str, str]], truncate: int | None) -> tuple[list[float], int]:
        """The score of each pair, a cross-encoder's or the cosine of the two vectors, and how many tokens were read."""
        if self.hosted.kind == "classify":
            self.model.need_one_label()
            encoded = await self.encode(pairs, truncate)
            return [found.scores[0] for found in await self.judge(encoded)], _count(encoded)
        # each text is embedded once; the second ones come first, so that an error gives their number
        texts = list(dict.fromkeys([*(right for _, right in pairs), *(left for left, _ in pairs)]))
        vectors, tokens = await self.embed(texts, truncate)
        at = dict(zip(texts, vectors, strict=True))
        return [float(at[left] @ at[right]) for left, right in pairs], tokens

    async def encode(self, inputs: Sequence[Judged], truncate: int | None) -> list[Encoded]:
        """The tokens of what a classifier judges."""
        limit = self.limit(truncate)
        encoded: list[Encoded] = await self.hosted.run(lambda: self.model.encode(inputs, max_tokens=limit))
        return encoded

    async def judge(self, encoded: Sequence[Encoded]) -> list[Classification]:
        """A classifier's judgements."""
        return await self._in_slices(self.model.judge, encoded, [len(item.ids) for item in encoded])

    async def _in_slices(
        self, function: Callable[[list[Any]], Iterable[R]], items: Sequence[Any], lengths: Iterable[int]
    ) -> list[R]:
        """function(items), where others use the model between its pieces, and which a client that leaves ends."""
        tokens = list(lengths)
        self.visit.caller.spend(sum(tokens))
        found: dict[int, R] = {}
        for members in batches_of(tokens, SLICE_TOKENS):
            self.visit.note.prompt_tokens += sum(tokens[i] for i in members)
            found |= zip(members, await self.hosted.run(function, [items[i] for i in members]), strict=True)
        return [found[i] for i in range(len(items))]


def _answers(model: type[BaseModel]) -> dict[str, Any]:
    return {"response_model": None, "dependencies": [Depends(json_only)], "responses": {200: {"model": model}}}


@router.post("/v1/embeddings", **_answers(EmbeddingList))
async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """Turn texts into vectors of length 1."""

    async def answer() -> EmbeddingList:
        reader = _reader(request, body.model, "embed texts", "embed", "generate")
        inputs = body.input if isinstance(body.input, list) else [body.input]
        prompts: Any = [inputs] if isinstance(inputs[0], int) else inputs
        vectors, tokens = await reader.embed(prompts, body.truncate_prompt_tokens, body.dimensions)
        as_text = body.encoding_format == "base64"
        data = [
            Embedding(object="embedding", index=index, embedding=_base64(vector) if as_text else vector.tolist())
            for index, vector in enumerate(vectors)
        ]
        return EmbeddingList(object="list", data=data, model=body.model, usage=_usage(tokens))

    return await _reply(request, answer(), "input")


@router.post("/v1/rerank", **_answers(RerankResponse))
@router.post("/rerank", include_in_schema=False, **_answers(RerankResponse))
async def rerank(body: RerankRequest, request: Request) -> Response:
    """Put documents in order by how well they answer a query: by a cross-encoder's score, or by the cosine of the
    vectors where the model embeds."""

    async def answer() -> RerankResponse:
        reader = _reader(request, body.model, "score pairs", "classify", "embed", "generate")
        texts = body.texts()
        scores, tokens = await reader.score([(body.query, text) for text in texts], body.truncate_prompt_tokens)
        best = sorted(range(len(texts)), key=lambda index: -scores[index])[: body.top_n]
        results = [Ranked(index=index, relevance_score=scores[index]) for index in best]
        if body.return_documents is not False:
            for each in results:
                each.document = RankedDocument(text=texts[each.index])
        return RerankResponse(id=_id("rerank"), model=body.model, results=results, usage=_usage(tokens))

    return await _reply(request, answer(), "documents")


@router.post("/v1/score", **_answers(ScoreResponse))
@router.post("/score", include_in_schema=False, **_answers(ScoreResponse))
async def score(body: ScoreRequest, request: Request) -> Response:
    """Score pairs of texts, as /v1/rerank does."""

    async def answer() -> ScoreResponse:
        reader = _reader(request, body.model, "score pairs", "classify", "embed", "generate")
        scores, tokens = await reader.score(_pairs(body), body.truncate_prompt_tokens)
        data = [PairScore(index=index, object="score", score=value) for index, value in enumerate(scores)]
        return ScoreResponse(**_head("score", body.model), data=data, usage=_usage(tokens))

    return await _reply(request, answer(), "text_2")


@router.post("/v1/classify", **_answers(ClassifyResponse))
@router.post("/classify", include_in_schema=False, **_answers(ClassifyResponse))
async def classify(body: ClassifyRequest, request: Request) -> Response:
    """Judge texts, pairs or conversations: the probability of each label, or a reward model's value."""

    async def answer() -> ClassifyResponse:
        reader = _reader(request, body.model, "classify", "classify")
        if (body.input is None) == (body.messages is None):
            raise RequestError("give one of input and messages", field="input")
        if body.messages is None:
            encoded = await reader.encode(body.judged(), body.truncate_prompt_tokens)
        elif body.truncate_prompt_tokens is not None:
            raise RequestError("conversations are not cut", field="truncate_prompt_tokens")
        else:
            encoded = await reader.hosted.run(reader.model.encode_chats, body.conversations())
        found = await reader.judge(encoded)
        bare = body.use_activation is False
        data = [
            LabelScores(
                index=index, label=each.label, probs=each.logits if bare else each.scores, num_classes=len(each.scores)
            )
            for index, each in enumerate(found)
        ]
        return ClassifyResponse(**_head("classify", body.model), data=data, usage=_usage(_count(encoded)))

    return await _reply(request, answer(), "input" if body.messages is None else "messages")


async def _reply(request: Request, answer: Coroutine[Any, Any, BaseModel], read: str) -> Response:
    """The answer as JSON. read: the field with the texts that the model reads."""
    fields = {"max_tokens": "truncate_prompt_tokens", **dict.fromkeys(("texts", "inputs", "conversation"), read)}

    async def work() -> BaseModel:
        try:
            return await answer
        except EngineClosed as error:
            raise closing() from error
        except (RequestError, DataError) as error:
            raise refusal(error, fields) from error

    return await answer_while_connected(request, work())


def _reader(request: Request, name: str, what: str, *kinds: Kind) -> Reader:
    """Who serves a request. Raises ApiError when its model is of another kind, and tells which are of the right one."""
    target, visit = visit_of(request, name)
    if _can(target.hosted, kinds) and target.adapter is None:
        return Reader(target.hosted, visit)
    served = [slot.hosted for slot in host_of(request).slots.values() if slot.hosted is not None]
    able = [each.name for each in served if _can(each, kinds) and visit.caller.allows(each.name)]
    instead = f"those that can: {', '.join(able)}" if able else "no model of this server can"
    raise ApiError(400, f"{name} does not {what}; {instead}", param="model", code="unsupported_model")


def _can(hosted: Hosted, kinds: Collection[Kind]) -> bool:
    """Whether a model is of one of these kinds. One that generates need not embed: it may run in workers."""
    return hosted.kind in kinds and (hosted.kind == "classify" or hasattr(hosted.model, "embedding_ids"))


def _pairs(body: ScoreRequest) -> list[tuple[str, str]]:
    """Raises RequestError when the two have different numbers of texts, and text_1 more than one."""
    left, right = ([texts] if isinstance(texts, str) else texts for texts in (body.text_1, body.text_2))
    if len(left) == 1:
        left = left * len(right)
    if len(left) != len(right):
        raise RequestError(f"text_1 has {len(left)} texts, text_2 {len(right)}: give one, or as many", field="text_1")
    return list(zip(left, right, strict=True))


def _count(encoded: Sequence[Encoded]) -> int:
    return sum(len(item.ids) for item in encoded)


def _usage(tokens: int) -> PoolingUsage:
    return PoolingUsage(prompt_tokens=tokens, total_tokens=tokens)


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": _id(kind), "object": "list", "created": int(time.time()), "model": model}


def _id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")

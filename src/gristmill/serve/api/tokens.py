"""Text to token ids and back."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from gristmill.errors import DataError, RequestError
from gristmill.serve.access.gate import require_model
from gristmill.serve.answering.reading import render_conversation
from gristmill.serve.api.common import ERRORS, host_of, json_answer, json_only
from gristmill.serve.errors import ApiError, refusal
from gristmill.serve.host import Target
from gristmill.serve.wire.models import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)

router = APIRouter(responses=ERRORS)


@router.post("/tokenize", response_model=TokenizeResponse, dependencies=[Depends(json_only)])
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The token ids of a text, or of a conversation up to where the assistant's answer begins."""
    target = _target(request, body.model)
    try:
        ids = await asyncio.to_thread(_encode, target, body)
    except (RequestError, DataError) as error:
        raise refusal(error, {}) from error
    model = target.hosted.model
    answer = TokenizeResponse(tokens=ids, count=len(ids), max_model_len=model.max_model_len)
    if body.return_token_strs:
        answer.token_strs = await asyncio.to_thread(
            lambda: [model.tokenizer.decode([index], skip_special_tokens=False) for index in ids]
        )
    return json_answer(answer)


@router.post("/detokenize", response_model=DetokenizeResponse, dependencies=[Depends(json_only)])
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of token ids, special tokens included."""
    tokenizer = _target(request, body.model).hosted.model.tokenizer
    for place, index in enumerate(body.tokens):
        if index >= tokenizer.vocab_size:
            raise ApiError(
                400,
                f"{index} is no token id: there are {tokenizer.vocab_size}",
                param=f"tokens[{place}]",
                code="invalid_value",
            )
    text = await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)
    return json_answer(DetokenizeResponse(prompt=text))


@router.get("/tokenizer_info", response_model=TokenizerInfo)
async def tokenizer_info(request: Request, model: str | None = None) -> Response:
    """Special tokens and chat template of a model."""
    tokenizer = _target(request, model).hosted.model.tokenizer
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    bos, eos, pad = (None if index is None else tokenizer.token_of(index) for index in ids)
    info = TokenizerInfo(
        tokenizer_class="Tokenizer",
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        chat_template=tokenizer.chat_template,
    )
    return json_answer(info)


def _target(request: Request, name: str | None) -> Target:
    host = host_of(request)
    if name is None and len(host.slots) > 1:
        raise ApiError(400, "model is missing: there are several", param="model", code="missing_required_parameter")
    name = next(iter(host.slots), "") if name is None else name
    require_model(request, name)
    return host.find(name)


def _encode(target: Target, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give prompt or messages, one of the two", field="prompt")
    if body.prompt is not None:
        for name in ("tools", "add_generation_prompt", "chat_template_kwargs"):
            if getattr(body, name) is not None:
                raise RequestError(f"{name} needs messages", field=name)
        add_bos = False if body.add_special_tokens is False else None
        return target.hosted.model.tokenizer.encode(body.prompt, add_bos=add_bos)
    if body.add_special_tokens is not None:
        raise RequestError("add_special_tokens is for prompt: a chat template has its own", field="add_special_tokens")
    messages = [message.plain() for message in body.messages or ()]
    return render_conversation(
        target.hosted.generator, messages, tools=body.tools, template_options=body.chat_template_kwargs
    )

"""The served models, and loading and unloading them while the server runs."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from gristmill.serve.access.gate import require_model
from gristmill.serve.api.common import ERRORS, admin_only, host_of, json_answer, json_only
from gristmill.serve.errors import ApiError
from gristmill.serve.host import Source
from gristmill.serve.wire.models import (
    LoadAdapterRequest,
    LoadRequest,
    ModelCard,
    ModelList,
    NameRequest,
    UnloadAdapterRequest,
)

router = APIRouter(responses=ERRORS)
CHANGES = [Depends(json_only), Depends(admin_only)]


@router.get("/v1/models", response_model=ModelList)
async def list_models(request: Request) -> Response:
    """All models of this server that the caller may use, and their adapters."""
    cards = [card for card in host_of(request).cards() if request.state.caller.allows(card.id)]
    return json_answer(ModelList(object="list", data=cards))


@router.get("/v1/models/{name:path}", response_model=ModelCard)
async def get_model(name: str, request: Request) -> Response:
    """One model of this server."""
    require_model(request, name)
    host = host_of(request)
    for card in host.cards():
        if card.id == name:
            return json_answer(card)
    host.find(name)
    raise ApiError(404, f"model {name[:200]!r} is not served here", param="model", code="model_not_found")


@router.post("/v1/models/load", response_model=ModelCard, dependencies=CHANGES)
async def load_model(body: LoadRequest, request: Request) -> Response:
    """Load one more model from this machine. Answers when it is ready."""
    return json_answer(await host_of(request).load(Source(body.model, body.name or body.model)))


@router.post("/v1/models/reload", response_model=ModelCard, dependencies=CHANGES)
async def reload_model(body: NameRequest, request: Request) -> Response:
    """Load a model anew, as after training; requests that run finish on the old one."""
    return json_answer(await host_of(request).reload(body.model))


@router.post("/v1/models/unload", response_model=ModelList, dependencies=CHANGES)
async def unload_model(body: NameRequest, request: Request) -> Response:
    """Take a model out of service; requests that run have half a minute to finish."""
    await host_of(request).unload(body.model)
    return await list_models(request)


@router.post("/v1/load_lora_adapter", response_model=ModelList, dependencies=CHANGES)
async def load_adapter(body: LoadAdapterRequest, request: Request) -> Response:
    """Load a LoRA adapter from this machine, or a newer one in its place."""
    await host_of(request).load_adapter(body.model, body.lora_name, body.lora_path)
    return await list_models(request)


@router.post("/v1/unload_lora_adapter", response_model=ModelList, dependencies=CHANGES)
async def unload_adapter(body: UnloadAdapterRequest, request: Request) -> Response:
    """Forget a LoRA adapter that no request uses."""
    await host_of(request).unload_adapter(body.model, body.lora_name)
    return await list_models(request)

"""schemathesis over the OpenAPI document: whatever the document allows or forbids, the answers are those it names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, settings

schemathesis = pytest.importorskip("schemathesis")

from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from gristmill import LLM
from gristmill.serve.app import create_app
from serve.running import running
from serve.scripted_engine import ScriptedEngine, ScriptedLLM
from serve.tiny import save_tiny_model

pytestmark = pytest.mark.peer

SECONDS = 20
CHECKS = [
    *(not_a_server_error, status_code_conformance, content_type_conformance),
    *(response_schema_conformance, negative_data_rejection, unsupported_method),
]
schema = schemathesis.openapi.from_dict(create_app(ScriptedLLM(ScriptedEngine())).openapi())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address and model."""
    llm = LLM(save_tiny_model(tmp_path_factory.mktemp("tiny")), max_model_len=32)
    with running(create_app(llm)) as url:
        yield url, llm.model_name
        assert httpx.get(f"{url}/health").status_code == 200


@schema.parametrize()
@settings(max_examples=6, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_one_of_the_document(case: Any, server: tuple[str, str]) -> None:
    url, model = server
    valid = case.meta.generation.mode == GenerationMode.POSITIVE and isinstance(case.body, dict)
    if valid and "model" in case.body and not case.path.startswith("/v1/models"):
        case.body["model"] = model  # or every request would end at its name
    case.call_and_validate(base_url=url, timeout=SECONDS, checks=CHECKS)

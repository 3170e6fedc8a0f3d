"""The tables of request fields in docs/api.md. `python -m gristmill.serve.fields` prints them."""

from __future__ import annotations

from gristmill.serve.wire.base import Closed
from gristmill.serve.wire.chat import ChatCompletionRequest
from gristmill.serve.wire.completions import CompletionRequest
from gristmill.serve.wire.files import BatchRequest
from gristmill.serve.wire.models import DetokenizeRequest, LoadAdapterRequest, LoadRequest, TokenizeRequest
from gristmill.serve.wire.pooling import ClassifyRequest, EmbeddingRequest, RerankRequest, ScoreRequest
from gristmill.serve.wire.responses import ResponseRequest

TABLES: tuple[tuple[str, type[Closed]], ...] = (
    ("/v1/chat/completions", ChatCompletionRequest),
    ("/v1/completions", CompletionRequest),
    ("/v1/responses", ResponseRequest),
    ("/v1/embeddings", EmbeddingRequest),
    ("/v1/rerank", RerankRequest),
    ("/v1/score", ScoreRequest),
    ("/v1/classify", ClassifyRequest),
    ("/v1/batches", BatchRequest),
    ("/tokenize", TokenizeRequest),
    ("/detokenize", DetokenizeRequest),
    ("/v1/models/load", LoadRequest),
    ("/v1/load_lora_adapter", LoadAdapterRequest),
)


def fields_table(body: type[Closed]) -> str:
    """Markdown: every field of a request, whether it is applied, a label or refused, and what it does."""
    rows = ["| field | | |", "|---|---|---|"]
    for name, field in body.model_fields.items():
        effect = "no effect" if isinstance(field.json_schema_extra, dict) else "applied"
        rows.append(f"| `{field.alias or name}` | {effect} | {field.description or ''} |")
    rows += [f"| `{name}` | refused | {reason} |" for name, reason in body.REFUSED.items()]
    rows.append("| any other name | refused | the closest known names are offered |")
    return "\n".join(rows)


def all_tables() -> str:
    """The tables of all routes, under their addresses."""
    return "\n\n".join(f"### `POST {path}`\n\n{fields_table(body)}" for path, body in TABLES)


if __name__ == "__main__":
    print(all_tables())

"""The table of request fields in docs/serving.md. `python -m gristmill.serve.fields` prints it."""

from gristmill.serve.request import REFUSED, ChatCompletionRequest


def fields_table() -> str:
    """Markdown: every field of a chat request, whether it is applied, a label or refused, and what it does."""
    rows = ["| field | | |", "|---|---|---|"]
    for name, field in ChatCompletionRequest.model_fields.items():
        effect = "no effect" if isinstance(field.json_schema_extra, dict) else "applied"
        rows.append(f"| `{name}` | {effect} | {field.description} |")
    rows += [f"| `{name}` | refused | {reason} |" for name, reason in REFUSED.items()]
    rows.append("| any other name | refused | the closest known names are offered |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(fields_table())

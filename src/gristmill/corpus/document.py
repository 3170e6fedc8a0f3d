"""The unit every corpus step works on."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Document:
    """A text with a stable name. Rejects and the held-out split refer to `id`, so it should be unique in a corpus."""

    id: str
    text: str
    metadata: dict[str, str] = field(default_factory=dict)

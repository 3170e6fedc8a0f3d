"""Hold documents out by the hash of their id, so that a document stays in its split whatever else changes."""

import hashlib
from collections.abc import Iterable

from gristmill.corpus.document import Document


def is_held_out(document_id: str, share: float, salt: str = "held-out") -> bool:
    """Whether the document belongs to the held-out `share` of all ids, in [0, 1].

    Depends on the id and salt alone; a larger share only adds documents. Another salt draws an independent split.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must be in [0, 1], got {share}")
    key = f"{salt}\0{document_id}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def split(documents: Iterable[Document], share: float, salt: str = "held-out") -> tuple[list[Document], list[Document]]:
    """Documents to train on and documents held out, each in the given order."""
    training: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        (held_out if is_held_out(document.id, share, salt) else training).append(document)
    return training, held_out

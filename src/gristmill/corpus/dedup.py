"""Drop documents that are in the corpus already, word for word or nearly so. The first copy stays.

Near duplicates are found with MinHash signatures in a locality-sensitive index: candidates share a whole band of
the signature, and the share of equal signature slots estimates the Jaccard similarity of the two shingle sets.
Memory grows with the documents kept, not with their text: about 2 KB each.

Source: Broder 1997 (MinHash); Indyk and Motwani 1998 (banding); Lee et al. 2022 for its use on language corpora.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from gristmill.corpus.document import Document
from gristmill.corpus.filters import words
from gristmill.corpus.step import Drop
from gristmill.errors import MissingExtra


@dataclass(frozen=True)
class ExactDuplicates:
    """Drop documents whose text equals an earlier one up to case and white space."""

    name: str = "exact-duplicates"

    def run(self, documents: Iterable[Document], drop: Drop) -> Iterator[Document]:
        """Yield first copies. Keeps 16 bytes of hash and the id of each."""
        first: dict[bytes, str] = {}
        for document in documents:
            normal = " ".join(document.text.lower().split())
            key = hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if key in first:
                drop(document, f"same text as {first[key]}")
            else:
                first[key] = document.id
                yield document


@dataclass(frozen=True)
class NearDuplicates:
    """Drop documents whose estimated Jaccard similarity with an earlier kept one reaches `threshold`.

    With 256 slots the estimate's standard error is below 0.032. A pair at 0.8 shares one of the 32 bands with
    probability 0.997, a pair at 0.5 with 0.12 (and then fails the estimate).
    Raises MissingExtra without rensa.
    """

    threshold: float = 0.8
    shingle_words: int = 5
    slots: int = 256
    bands: int = 32
    seed: int = 42
    name: str = "near-duplicates"

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold}")
        if self.slots % self.bands:
            raise ValueError(f"slots ({self.slots}) must be a multiple of bands ({self.bands})")

    def run(self, documents: Iterable[Document], drop: Drop) -> Iterator[Document]:
        """Yield documents unlike all those before them. Dropped ones are not indexed, so buckets stay small."""
        index = _rensa().RMinHashLSH(threshold=self.threshold, num_perm=self.slots, num_bands=self.bands)
        kept: list[tuple[str, Any]] = []
        for document in documents:
            signature = self.signature(document.text)
            original = self._original(signature, index.query(signature), kept)
            if original is not None:
                drop(document, original)
                continue
            index.insert(len(kept), signature)
            kept.append((document.id, signature))
            yield document

    def _original(self, signature: Any, candidates: list[int], kept: list[tuple[str, Any]]) -> str | None:
        for candidate in sorted(candidates):
            similarity = signature.jaccard(kept[candidate][1])
            if similarity >= self.threshold:
                return f"similarity {similarity:.2f} with {kept[candidate][0]}"
        return None

    def signature(self, text: str) -> Any:
        """The MinHash of a text; `a.jaccard(b)` estimates the similarity of two."""
        minhash = _rensa().RMinHash(num_perm=self.slots, seed=self.seed)
        minhash.update(sorted(shingles(text, self.shingle_words)))
        return minhash


def shingles(text: str, n: int = 5) -> set[str]:
    """The set of word n-grams; a text of fewer words is one shingle."""
    found = words(text)
    return {" ".join(found[i : i + n]) for i in range(max(len(found) - n + 1, 1))}


def jaccard(left: set[str], right: set[str]) -> float:
    """Size of the intersection over size of the union; two empty sets are alike."""
    union = len(left | right)
    return len(left & right) / union if union else 1.0


def _rensa() -> ModuleType:
    try:
        import rensa
    except ImportError as error:
        raise MissingExtra("rensa", "corpus") from error
    return rensa  # type: ignore[no-any-return]

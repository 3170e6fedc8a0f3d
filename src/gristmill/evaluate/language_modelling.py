"""How well a model foretells text it has not seen: bits per byte and perplexity on held-out documents."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gristmill.core import LanguageModel, Prompt, Score, TaskResult
from gristmill.errors import DataError
from gristmill.evaluate.metrics import perplexity, ratio
from gristmill.evaluate.provenance import content_hash


@dataclass
class HeldOutPerplexity:
    """A Task: every document is scored token by token after `start_ids`, and once only.

    The value is bits per byte of the whole set (lower is better), its standard error is over documents, and there is
    one record per document: document, digest, bytes, tokens, nats, bits_per_byte. `token_perplexity` makes the
    per-token figure of the same run. The end of a document is not scored.

    Raises DataError for no documents, an empty one, empty `start_ids` or a window without `encode`.
    """

    name: str
    documents: Sequence[str]
    start_ids: Sequence[int]
    """What stands before every document, such as the end-of-sequence token that separates documents in training."""
    encode: Callable[[str], Sequence[int]] | None = None
    """Tokenises a document; None leaves it to the model."""
    window: int | None = None
    """Most tokens in one scored sequence, `start_ids` included. A longer document is scored in pieces, each after
    the half window of text before it. None scores a document whole, and the model refuses one that is too long."""

    def __post_init__(self) -> None:
        if len(self.documents) < 2:
            raise DataError(f"{self.name}: needs at least two documents, got {len(self.documents)}")
        for index, document in enumerate(self.documents):
            if not document:
                raise DataError(f"{self.name}: document {index} is empty; leave it out")
        if not self.start_ids:
            raise DataError(f"{self.name}: start_ids is empty; give the tokenizer's start or end-of-sequence id")
        if self.window is not None:
            if self.encode is None:
                raise DataError(f"{self.name}: window needs encode, to know how long a document is")
            if self.window < len(self.start_ids) + 2:
                raise DataError(f"{self.name}: window {self.window} leaves no room after start_ids")

    def evaluate(self, model: LanguageModel) -> TaskResult:
        """Score every document; see the class for the value and the records."""
        pieces = [self._pieces(document) for document in self.documents]
        scores = iter(model.score_many([pair for document in pieces for pair in document]))
        records = []
        for index, (document, pairs) in enumerate(zip(self.documents, pieces, strict=True)):
            own = [next(scores) for _ in pairs]
            records.append(self._record(index, document, own))
        bits = [record["nats"] / math.log(2) for record in records]
        estimate = ratio(bits, [record["bytes"] for record in records])
        return TaskResult(self.name, estimate.value, estimate.standard_error, estimate.samples, list(records))

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that stand for all that is scored: equal ones make figures comparable."""
        return content_hash([list(self.documents), list(self.start_ids), self.window])[:12]

    def _pieces(self, document: str) -> list[tuple[Prompt, Prompt]]:
        if self.encode is None:
            return [(self.start_ids, document)]
        ids = list(self.encode(document))
        whole = [*self.start_ids, *ids]
        if self.window is None or len(whole) <= self.window:
            return [(self.start_ids, ids)]
        first = self.window - len(self.start_ids)
        context = self.window // 2
        step = self.window - context
        later = range(first, len(ids), step)
        return [
            (self.start_ids, ids[:first]),
            *((ids[max(0, start - context) : start], ids[start : start + step]) for start in later),
        ]

    def _record(self, index: int, document: str, scores: Sequence[Score]) -> dict[str, Any]:
        nats = -sum(score.logprob for score in scores)
        if not math.isfinite(nats):
            raise DataError(f"{self.name}: the score of document {index} is {nats}, not a finite number")
        size = len(document.encode("utf-8"))
        tokens = sum(len(score.token_ids) for score in scores)
        return {
            "document": index,
            "digest": hashlib.sha256(document.encode("utf-8")).hexdigest()[:16],
            "bytes": size,
            "tokens": tokens,
            "nats": nats,
            "bits_per_byte": nats / math.log(2) / size,
        }


def token_perplexity(result: TaskResult) -> TaskResult:
    """Perplexity per token of a HeldOutPerplexity result, with its standard error over documents.

    The error is that of the mean nats per token, carried through exp by its slope.
    """
    nats = [record["nats"] for record in result.records]
    tokens = [record["tokens"] for record in result.records]
    per_token = ratio(nats, tokens)
    value = perplexity(sum(nats), sum(tokens))
    return TaskResult(f"{result.name} (perplexity)", value, value * per_token.standard_error, per_token.samples)

"""The vocabulary every folder shares: sampling parameters, outputs, messages and the protocols.

Names follow the field: SamplingParams and the outputs are vLLM's, finish reasons and messages are OpenAI's.
Nothing here imports torch, so `import gristmill` stays light.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NotRequired, Protocol, Self, TypedDict, runtime_checkable

from gristmill.sampling_params import SamplingParams as SamplingParams
from gristmill.sampling_params import StructuredOutput as StructuredOutput

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

Prompt = str | Sequence[int]
"""A prompt is text or token ids. Ids are taken as they are, never re-tokenised."""

FinishReason = Literal["stop", "length", "abort", "error"]


class FunctionCall(TypedDict):
    """What a model asks for: `arguments` is a JSON object as text."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """One call in an assistant's message."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(TypedDict):
    """One turn of a conversation. The optional fields are OpenAI's; `content` is "" beside calls alone."""

    role: str
    content: str
    name: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[Sequence[ToolCall]]
    tool_call_id: NotRequired[str]


@dataclass(frozen=True)
class Logprob:
    """Natural-log probability of one token and its rank in the vocabulary (1 is the most probable)."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass
class CompletionOutput:
    """One completion. `finish_reason` is None while it is still running."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    """Sum of the chosen tokens' raw log-probabilities in nats; None when logprobs were not asked for."""
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for end-of-sequence and length."""
    error: str | None = None
    """What went wrong, when finish_reason is 'error'."""


@dataclass
class RequestOutput:
    """All completions of one request, so far or final (`finished`)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache."""


@dataclass(frozen=True)
class Score:
    """Log-probability of a completion given its prompt.

    `token_logprobs` are natural logs, one per completion token; `is_greedy` tells whether each token was the
    most probable one.
    """

    token_ids: list[int]
    token_logprobs: list[float]
    is_greedy: bool

    @property
    def logprob(self) -> float:
        """Sum over the completion, in nats."""
        return sum(self.token_logprobs)


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens.

    `loss_mask[i]` is 1 where token i is to be learned; `offsets[i]` is its (start, end) in `text`, in characters.
    """

    token_ids: list[int]
    loss_mask: list[int]
    offsets: list[tuple[int, int]]
    text: str


@runtime_checkable
class Renderer(Protocol):
    """Turns conversations into token ids, and says which of them a model is to learn."""

    def render(self, messages: Sequence[Message]) -> Rendered:
        """The whole conversation for training. Assistant content and its stop token have mask 1, all else 0.

        Raises DataError for an empty conversation, an unknown role or content that spells a special token.
        """

    def render_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids that end where the assistant's next answer begins. A prefix of `render` of the answered one."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an assistant turn."""


@runtime_checkable
class LanguageModel(Protocol):
    """All that prompting, retrieval, agents and evaluation may know of a model."""

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """One finished output per prompt, in order. A string or a flat list of ids is one prompt."""

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | None = None,
    ) -> list[RequestOutput]:
        """The same for conversations, rendered with the model's chat template."""

    def score(self, prompt: Prompt, completion: Prompt) -> Score:
        """Log-probability of `completion` after `prompt`. The two are tokenised apart and joined."""

    def score_many(self, pairs: Sequence[tuple[Prompt, Prompt]]) -> list[Score]:
        """`score` for many pairs at once, in order."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, shape (texts, dimensions), float32."""


@dataclass(frozen=True, eq=False)
class AttentionRule:
    """What lies between the products of queries and keys and the softmax over them.

    scale: factor of the scores, None for 1 / sqrt(head_dim). softcap: then softcap * tanh(scores / softcap). bias: then
    bias(query_positions (queries,), key_positions (keys,)) is added, shape (heads, queries, keys). Who sees whom:
    causal, no key after the query; window, only keys less than so far away; pattern, only keys for which
    pattern(query_positions (..., queries, 1), key_positions (..., 1, keys)) is True. sinks: (heads,) logits that take
    their share of the softmax and give no value.
    """

    causal: bool = True
    window: int | None = None
    pattern: Callable[[Tensor, Tensor], Tensor] | None = None
    scale: float | None = None
    softcap: float | None = None
    bias: Callable[[Tensor, Tensor], Tensor] | None = None
    sinks: Tensor | None = None


CAUSAL = AttentionRule()


class KVCache(Protocol):
    """Where attention finds the keys and values of earlier tokens. One object serves all layers of one forward.

    The model hands over what a layer computed for the tokens of this step and gets the attended values back. Which
    tokens are of one sequence, and where keys and values live, is the cache's business alone; who sees whom within
    a sequence is the layer's rule.
    """

    @property
    def keeps(self) -> bool:
        """True when keys and values outlive the step. Latent attention then hands over its compressed form."""

    @property
    def lengths(self) -> Tensor:
        """(tokens,): of the sequence that each token of this step belongs to, how many tokens are known so far."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule = CAUSAL) -> Tensor:
        """Attend within each sequence as `rule` says.

        query (tokens, heads, head_dim); key (tokens, kv_heads, head_dim); value (tokens, kv_heads, value_dim); returns
        (tokens, heads, value_dim).
        """

    def recur(self, layer: int, mixer: Callable[[Tensor, Any], tuple[Tensor, Any]], x: Tensor) -> Tensor:
        """Run a recurrent layer over each sequence: mixer(x (rows, tokens, size), state or None) returns the outputs
        and the state after the last token. x and the result are flat, (tokens, size)."""


class Batch(Protocol):
    """What one forward of training reads. Each objective knows the kind it makes."""

    @property
    def tokens(self) -> int:
        """Tokens the model reads: what speed and token budgets count."""

    def to(self, device: Any) -> Self:
        """The same batch on another device."""


class Loader(Protocol):
    """Batches by number, so that any step's are at hand at once."""

    def batch(self, number: int) -> Any:
        """The batch of a number, counted from 0 through all epochs, the same at every call."""

    @property
    def batches_per_epoch(self) -> int:
        """Batches in which every example comes once."""


class Objective(Protocol):
    """A training objective: how raw examples become batches, and what is lost on them.

    The trained loss is the sum over the terms of weight * (summed loss / count), where sums and counts run over all
    batches of a step on all processes. So neither packing, accumulation nor the number of processes changes it.
    """

    @property
    def weights(self) -> Mapping[str, float]:
        """The loss terms by name, and the weight of each."""

    def prepare(self, examples: Sequence[Any], keys: Sequence[tuple[int, ...]]) -> Batch:
        """Make a batch; most objectives take the (ids, mask) segments of a token source as examples.

        All that is random about an example follows from its key alone, so it does not matter what it is packed with.
        Called by loaders, perhaps in another process; it needs no model. Raises DataError for an unfit example.
        """

    def counts(self, batch: Any) -> Mapping[str, int]:
        """Targets of each term in a batch."""

    def loss_sums(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        """Summed loss of each term in nats, float32 scalars."""


@dataclass(frozen=True, slots=True)
class LogitsRow:
    """Whose a row of logits is, and all ids that stand before the token to choose."""

    slot: int
    """The completion's number in the batch, fixed while it runs. Several rows of one slot are drafts to verify."""
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    """Tokens generated so far, with the unverified draft tokens that stand before this row's token."""


@dataclass(frozen=True, slots=True)
class BatchUpdate:
    """How the batch changed since the last step: applied in the order removed, moved, added."""

    added: Sequence[tuple[int, SamplingParams, Sequence[int]]] = ()
    """(slot, parameters, prompt ids) of each completion that begins; its slot is free."""
    removed: Sequence[int] = ()
    """Slots that became free."""
    moved: Sequence[tuple[int, int]] = ()
    """(from, to): what was in one slot is in another, free one now."""
    end_ids: Mapping[int, Collection[int]] = field(default_factory=dict)
    """For added slots, the token ids that end them; none for a slot that is not named."""


class LogitsProcessor(Protocol):
    """Changes next-token logits; used alike for single, batched and speculative decoding.

    It keeps what it needs for each slot, told by `update`. What it does to a row depends on that row alone: on its
    slot's parameters, its prompt and its output ids. A row may be asked for again with fewer output ids, when drafts
    were refused.
    """

    @property
    def is_argmax_invariant(self) -> bool:
        """True when `apply` can never change the most probable token, so greedy requests may skip it."""

    def validate(self, params: SamplingParams) -> None:
        """Raises RequestError, naming the field, for parameters that this processor cannot serve."""

    def update(self, change: BatchUpdate) -> None:
        """Follow the batch: keep the state of each slot that this processor concerns."""

    def apply(self, logits: Tensor, rows: Sequence[LogitsRow]) -> Tensor:
        """New logits, shape (rows, vocab). Must not modify its input; returns that itself when no row is concerned."""


@dataclass(frozen=True)
class Solution:
    """A candidate answer: its text and its token ids."""

    text: str
    token_ids: list[int] = field(default_factory=list)


class Verifier(Protocol):
    """Scores candidate solutions. Higher is better; 1.0 is certainly right where the verifier is exact."""

    def score(self, problem: str, solutions: Sequence[Solution]) -> list[float]:
        """One score per solution, in order. Never raises for a malformed solution: it scores 0."""


@dataclass(frozen=True)
class Passage:
    """A piece of a document with its retrieval score (higher is nearer)."""

    document_id: str
    text: str
    score: float


class Retriever(Protocol):
    """Finds passages for a query."""

    def retrieve(self, query: str, k: int) -> list[Passage]:
        """At most k passages, best first."""


class Tool(Protocol):
    """Something an agent can call. `parameters` is a JSON schema."""

    name: str
    description: str
    parameters: dict[str, Any]

    def call(self, arguments: dict[str, Any]) -> str:
        """The observation as text. Errors the model should see are returned, not raised."""


@dataclass(frozen=True)
class TaskResult:
    """A metric with what is needed to trust it: standard error, sample count and per-sample records."""

    name: str
    value: float
    standard_error: float
    samples: int
    records: list[dict[str, Any]] = field(default_factory=list)


class Task(Protocol):
    """An evaluation: samples and how to score a model on them."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def evaluate(self, model: LanguageModel) -> TaskResult:
        """Run every sample; the same model and task give the same result."""

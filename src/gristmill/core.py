"""The vocabulary every folder shares: sampling parameters, outputs, messages and the protocols.

Names follow the field: SamplingParams and the outputs are vLLM's, finish reasons and messages are OpenAI's.
Nothing here imports torch, so `import gristmill` stays light.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, NotRequired, Protocol, Self, TypedDict, cast, runtime_checkable

from gristmill.errors import RequestError, closest

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


@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """What form the whole output has: exactly one of the first six fields.

    Raises RequestError, naming the field as structured.NAME, unless one is given and is of its type.
    """

    json_schema: Mapping[str, Any] | str | None = None
    """JSON that this schema allows; a mapping or its JSON text."""
    regex: str | None = None
    """Text that this regular expression matches from end to end."""
    grammar: str | None = None
    """Text of a context-free grammar in Lark's notation, or in EBNF as llama.cpp writes it (`root ::= ...`)."""
    choice: Sequence[str] | None = None
    """One of these texts."""
    json_object: bool = False
    """Any JSON object."""
    tools: Sequence[Mapping[str, Any]] | None = None
    """A call of one of these tools (name and parameters, or OpenAI's form) as {"name": ..., "arguments": {...}}."""
    compact: bool = False
    """JSON without white space; else there may be one line break and 16 blanks wherever JSON has white space."""
    outside: tuple[str, str] | None = None
    """(opening, closing): the form begins after a passage between these (reasoning), if the output begins with one.
    With an empty opening the output begins within it."""
    markers: Sequence[str] = ()
    """Special tokens of the vocabulary that may spell parts of the form, as any other tokens may."""
    detour: float | None = None
    """Of a grammar, where it is known: a token takes an output at most so many bytes farther from its end, and so many
    more for each of its characters that structure JSON. Spares trials of tokens."""

    def __post_init__(self) -> None:
        kinds = {
            "json_schema": (Mapping, str),
            "regex": (str,),
            "grammar": (str,),
            "choice": (list, tuple),
            "json_object": (bool,),
            "tools": (list, tuple),
        }
        given = [name for name in kinds if getattr(self, name) is not None and getattr(self, name) is not False]
        if len(given) != 1:
            raise RequestError(
                f"structured takes exactly one of {', '.join(kinds)}; got {' and '.join(given) or 'none'}",
                field="structured",
            )
        value = getattr(self, given[0])
        if not isinstance(value, kinds[given[0]]):
            named = " or ".join(kind.__name__ for kind in kinds[given[0]])
            raise RequestError(f"structured.{given[0]} must be {named}, got {value!r}", field=f"structured.{given[0]}")
        if self.outside is not None and not (_is_pair(self.outside, str) and self.outside[1]):
            raise RequestError(
                f"structured.outside must be (opening, closing), texts, got {self.outside!r}",
                field="structured.outside",
            )
        if not isinstance(self.markers, list | tuple) or not all(isinstance(one, str) for one in self.markers):
            raise RequestError(
                f"structured.markers must be a list of texts, got {self.markers!r}", field="structured.markers"
            )

    @property
    def kind(self) -> str:
        """Name of the field that is given."""
        names = ("json_schema", "regex", "grammar", "choice", "tools")
        return next((name for name in names if getattr(self, name) is not None), "json_object")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StructuredOutput:
        """Build from a plain mapping; an unknown key raises RequestError with the closest names."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise RequestError(
                    f"unknown field structured.{name}.{closest(name, known)}", field=f"structured.{name}"
                )
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens for one request. Every field is applied; an unknown one is a TypeError.

    Raises RequestError, naming the field, for a value out of range.
    """

    n: int = 1
    """How many completions to return for the prompt."""
    temperature: float = 1.0
    """0 is greedy; above 0 the logits are divided by it before the filters."""
    top_p: float = 1.0
    """Smallest set of tokens whose probability reaches this; 1 keeps all."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Drop tokens below this share of the most probable one."""
    typical_p: float = 1.0
    """Keep the tokens whose surprise is nearest to the entropy, until their probability reaches this; 1 keeps all."""
    epsilon_cutoff: float = 0.0
    """Drop tokens less probable than this, never the most probable one; 0 keeps all."""
    eta_cutoff: float = 0.0
    """Drop tokens below min(this, sqrt(this) * exp(-entropy)), never the most probable one; 0 keeps all."""
    top_n_sigma: float = 0.0
    """Keep logits within so many standard deviations below the highest; 0 keeps all."""
    temperature_last: bool = False
    """Choose the kept tokens from the distribution without temperature, then apply the temperature among them."""
    repetition_penalty: float = 1.0
    """Above 1 divides positive and multiplies negative logits of tokens in the prompt or output."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token already in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it is in the output."""
    no_repeat_ngram_size: int = 0
    """No run of so many tokens comes twice in prompt and output together; 0 is no limit."""
    bad_words: Sequence[str | Sequence[int]] | None = None
    """Token sequences that the output never completes. A text stands for the ids that the tokenizer writes it with,
    alone and after a space; the same letters made of other tokens are not found (`stop` finds them)."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of the given token ids."""
    seed: int | None = None
    """Seed of this request; None draws from the engine's seed. The batch around it has no influence."""
    stop: str | Sequence[str] | None = None
    """Strings that end the output; they are not part of the returned text."""
    stop_outside: tuple[str, str] | None = None
    """(opening, closing): no stop string counts in a passage between these with which the output begins (reasoning).
    With an empty opening the output begins within it."""
    stop_token_ids: Sequence[int] | None = None
    """Token ids that end the output, besides the model's own."""
    include_stop_str_in_output: bool = False
    """Keep the stop string at the end of the text."""
    ignore_eos: bool = False
    """Do not end at the model's end-of-sequence tokens."""
    max_tokens: int | None = 16
    """Most tokens to generate; None fills the context."""
    min_tokens: int = 0
    """End-of-sequence and stop tokens are masked until so many tokens stand."""
    length_decay: tuple[int, float] | None = None
    """(start, factor): after `start` tokens, |logit| * (factor ** (tokens - start) - 1) is added to end tokens' logits.
    A factor above 1 makes long outputs end, one below 1 makes them go on."""
    max_time: float | None = None
    """Seconds after which the output ends with the token at hand (finish reason "length")."""
    max_flops: float | None = None
    """Floating-point operations, those of the prompt among them, after which it ends likewise."""
    stop_below_probability: float = 0.0
    """End with the first token whose raw probability is below this; 0 never does."""
    repetition_stop: tuple[int, int] | None = None
    """(longest pattern, count): end when the output's last tokens are one pattern so many times in a row."""
    thinking_budget: int | None = None
    """Most tokens before `think_end`, which is forced then. Thinking begins with the output."""
    min_thinking_tokens: int = 0
    """`think_end` and end tokens are masked until so many tokens stand."""
    think_end: str | Sequence[int] = "</think>"
    """Text or token ids that end the thinking."""
    think_waits: int = 0
    """How many times `think_wait` takes the place of `think_end` or an end token, so that thinking goes on."""
    think_wait: str | int = "Wait"
    """The one token that does."""
    logprobs: int | None = None
    """Return log-probabilities of the chosen token and of this many most probable ones, from the raw logits."""
    prompt_logprobs: int | None = None
    """The same for each prompt token but the first."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text (the ids always hold them)."""
    structured: StructuredOutput | None = None
    """The form that the whole output has: a JSON schema, a regular expression, a grammar, a choice, a tool call."""

    def __post_init__(self) -> None:
        def need(name: str, fine: bool, what: str) -> None:
            if not fine:
                raise RequestError(f"{name} must be {what}, got {getattr(self, name)!r}", field=name)

        for name in _WHOLE:
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            need(name, whole or (value is None and name in _OPTIONAL), "a whole number")
        for name in _REAL:
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool)
            need(name, number or (value is None and name in _OPTIONAL), "a number")
        need("n", self.n >= 1, "at least 1")
        need("temperature", 0.0 <= self.temperature < float("inf"), "0 or more")
        need("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]")
        need("top_k", self.top_k >= -1, "0 (off) or more")
        need("min_p", 0.0 <= self.min_p <= 1.0, "in [0, 1]")
        need("repetition_penalty", 0.0 < self.repetition_penalty < float("inf"), "above 0")
        need("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "in [-2, 2]")
        need("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "in [-2, 2]")
        need("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        need("min_tokens", self.min_tokens >= 0, "0 or more")
        if self.max_tokens is not None:
            need("min_tokens", self.min_tokens <= self.max_tokens, f"at most max_tokens ({self.max_tokens})")
        need("logprobs", self.logprobs is None or self.logprobs >= 0, "0 or more")
        need("prompt_logprobs", self.prompt_logprobs is None or self.prompt_logprobs >= 0, "0 or more")
        for name in _FLAGS:
            need(name, isinstance(getattr(self, name), bool), "True or False")
        stops = isinstance(self.stop, str | Sequence | None) and not isinstance(self.stop, bytes)
        need("stop", stops and all(isinstance(stop, str) for stop in self.stop_strings), "a text or a list of texts")
        need("stop", all(self.stop_strings), "without empty strings")
        need("stop_outside", self.stop_outside is None or _is_pair(self.stop_outside, str), "(opening, closing), texts")
        need("stop_outside", self.stop_outside is None or bool(self.stop_outside[1]), "with a closing text")
        need("stop_token_ids", isinstance(self.stop_token_ids, Iterable | None), "a list of token ids")
        biases = self.logit_bias.values() if isinstance(self.logit_bias, Mapping) else ()
        need("logit_bias", isinstance(self.logit_bias, Mapping | None), "of token ids and numbers")
        need("logit_bias", all(isinstance(bias, Real) for bias in biases), "of token ids and numbers")
        need("structured", isinstance(self.structured, StructuredOutput | None), "a StructuredOutput")
        need("typical_p", 0.0 < self.typical_p <= 1.0, "in (0, 1]")
        need("epsilon_cutoff", 0.0 <= self.epsilon_cutoff < 1.0, "in [0, 1)")
        need("eta_cutoff", 0.0 <= self.eta_cutoff < 1.0, "in [0, 1)")
        need("top_n_sigma", 0.0 <= self.top_n_sigma < float("inf"), "0 (off) or more")
        need("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 (off) or more")
        need("bad_words", isinstance(self.bad_words, Iterable | None), "a list of texts or lists of token ids")
        texts_or_ids = all(isinstance(word, str) or _are_ids(word) for word in self.bad_words or ())
        need("bad_words", texts_or_ids and not isinstance(self.bad_words, str), "a list of texts or lists of token ids")
        need("bad_words", all(len(word) > 0 for word in self.bad_words or ()), "without empty ones")
        self._check_limits(need)
        self._check_thinking(need)

    def _check_limits(self, need: Callable[[str, bool, str], None]) -> None:
        limit = float("inf") if self.max_tokens is None else self.max_tokens
        if self.length_decay is not None:
            need("length_decay", _is_pair(self.length_decay, Real), "(start, factor)")
            start, factor = self.length_decay
            need("length_decay", start >= 0 and start == int(start), "of a whole start, 0 or more")
            need("length_decay", 0.0 < factor < float("inf"), "of a factor above 0")
            need("length_decay", start < limit, f"of a start below max_tokens ({self.max_tokens})")
            need("length_decay", not self.ignore_eos or bool(self.stop_token_ids), "off when ignore_eos leaves no end")
        need("max_time", self.max_time is None or 0.0 < self.max_time < float("inf"), "above 0")
        need("max_flops", self.max_flops is None or 0.0 < self.max_flops < float("inf"), "above 0")
        need("stop_below_probability", 0.0 <= self.stop_below_probability <= 1.0, "in [0, 1]")
        if self.repetition_stop is not None:
            need("repetition_stop", _is_pair(self.repetition_stop, int), "(longest pattern, count), whole numbers")
            longest, count = self.repetition_stop
            need("repetition_stop", longest >= 1 and count >= 2, "(pattern of 1 or more, count of 2 or more)")
            need("repetition_stop", count <= limit, f"of a count up to max_tokens ({self.max_tokens})")

    def _check_thinking(self, need: Callable[[str, bool, str], None]) -> None:
        limit = float("inf") if self.max_tokens is None else self.max_tokens
        need("min_thinking_tokens", self.min_thinking_tokens >= 0, "0 or more")
        need("min_thinking_tokens", self.min_thinking_tokens < limit, f"below max_tokens ({self.max_tokens})")
        need("think_waits", self.think_waits >= 0, "0 or more")
        need("think_end", isinstance(self.think_end, str) or _are_ids(self.think_end), "a text or token ids")
        need("think_end", len(self.think_end) > 0, "of one token or more")
        need("think_wait", self.think_wait != "" and not isinstance(self.think_wait, bool), "one token")
        if (budget := self.thinking_budget) is not None:
            need("thinking_budget", budget >= 0, "0 or more")
            need("thinking_budget", budget < limit, f"below max_tokens ({self.max_tokens})")
            need("min_thinking_tokens", self.min_thinking_tokens <= budget, f"at most thinking_budget ({budget})")
            need("think_waits", self.think_waits <= budget, f"at most thinking_budget ({budget})")

    @property
    def limits_thinking(self) -> bool:
        """True when any of the thinking options is set."""
        return self.thinking_budget is not None or self.min_thinking_tokens > 0 or self.think_waits > 0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def stops_count_from(self, text: str) -> int:
        """Where in an output stop strings begin to count; its length while that is not there."""
        opening, closing = self.stop_outside or ("", "")
        begun = text.lstrip()
        if not closing or not (begun.startswith(opening) or opening.startswith(begun)):
            return 0
        at = text.find(closing, len(text) - len(begun) + len(opening))
        return len(text) if at < 0 else at + len(closing)

    def ending_at(self, token_ids: Sequence[int]) -> SamplingParams:
        """The same, ending at these tokens too (those that close a chat turn), unless `ignore_eos`."""
        if self.ignore_eos:
            return self
        return dataclasses.replace(
            self, stop_token_ids=tuple(dict.fromkeys([*(self.stop_token_ids or ()), *token_ids]))
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SamplingParams:
        """Build from a plain mapping; an unknown key raises RequestError with the closest names."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise RequestError(f"unknown sampling parameter {name!r}.{closest(name, known)}", field=name)
        if isinstance(form := values.get("structured"), Mapping):
            values = {**values, "structured": StructuredOutput.from_dict(form)}
        return cls(**values)


_OPTIONAL = ("max_tokens", "logprobs", "prompt_logprobs", "seed", "max_time", "max_flops", "thinking_budget")
_FLAGS = ("temperature_last", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens")
_WHOLE = (
    *("n", "top_k", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "seed", "no_repeat_ngram_size"),
    *("thinking_budget", "min_thinking_tokens", "think_waits"),
)
_REAL = (
    *("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_n_sigma", "max_time"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "max_flops", "stop_below_probability"),
)


def _is_pair(value: object, kind: type) -> bool:
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    return pair and all(isinstance(part, kind) and not isinstance(part, bool) for part in cast("tuple[Any]", value))


def _are_ids(value: object) -> bool:
    return isinstance(value, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)


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

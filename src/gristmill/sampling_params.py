"""What a request may ask of the choice of tokens: `SamplingParams`, and the form of the output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, cast

from gristmill.errors import RequestError, closest


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

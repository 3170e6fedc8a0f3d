"""The fields of sampling that chat and plain completions share, and how the engine takes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from gristmill.core import SamplingParams, StructuredOutput
from gristmill.engine.request import Standing
from gristmill.errors import RequestError
from gristmill.serve.wire.base import (
    INT32,
    INT64,
    LABEL,
    Closed,
    FewFaults,
    JsonObject,
    Label,
    NonEmpty,
    TokenId,
    branch_of,
)

SAME_NAME = (
    *("n", "temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_n_sigma"),
    *("temperature_last", "presence_penalty", "frequency_penalty", "repetition_penalty", "no_repeat_ngram_size"),
    *("bad_words", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens"),
    *("length_decay", "max_time", "max_flops", "stop_below_probability", "repetition_stop", "skip_special_tokens"),
    *("thinking_budget", "min_thinking_tokens", "think_waits", "think_wait", "prompt_logprobs"),
)
"""Fields that SamplingParams has under the same name."""

Stop = Annotated[
    Annotated[NonEmpty, Tag("string")] | Annotated[list[NonEmpty], Field(max_length=64), Tag("list")],
    Discriminator(branch_of),
]
Word = Annotated[
    Annotated[NonEmpty, Tag("string")] | Annotated[list[TokenId], Field(min_length=1, max_length=64), Tag("list")],
    Discriminator(branch_of),
]


class StreamOptions(Closed):
    """Options of a streamed answer."""

    include_usage: bool | None = Field(None, description="Send one more chunk, with the token counts.")
    include_obfuscation: Literal[False] | None = Field(
        None, description="false only: chunks are not padded.", json_schema_extra=LABEL
    )


class StructuredOutputs(Closed):
    """The form of the whole answer: exactly one of the fields."""

    json_schema: JsonObject | None = Field(None, alias="json", description="JSON that this schema allows.")
    regex: NonEmpty | None = Field(None, description="Text that this regular expression matches from end to end.")
    choice: list[NonEmpty] | None = Field(None, min_length=1, max_length=1024, description="One of these texts.")
    grammar: NonEmpty | None = Field(None, description="A context-free grammar, in Lark's notation or llama.cpp's.")
    json_object: Literal[True] | None = Field(None, description="Any JSON object.")

    def form(self) -> StructuredOutput:
        """As the engine takes it. Raises RequestError unless exactly one is given."""
        given = {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}
        try:
            return StructuredOutput(**given)
        except RequestError as error:
            raise RequestError(str(error), field="structured_outputs") from error


class SamplingFields(Closed):
    """How to choose the tokens of the answer."""

    min_tokens: int | None = Field(None, ge=0, le=INT32, description="No end of sequence before so many tokens.")
    n: int | None = Field(None, ge=1, le=128, description="How many answers to generate. Default: 1.")
    seed: int | None = Field(None, ge=-INT64 - 1, le=INT64, description="Makes sampling repeatable.")

    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the most probable token. Default: 1.")
    top_p: float | None = Field(None, gt=0, le=1, description="Sample from the smallest set of this probability.")
    top_k: int | None = Field(None, ge=-1, le=INT32, description="Sample from the k most probable; 0 or -1 from all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Drop tokens below this share of the most probable one.")
    typical_p: float | None = Field(
        None, gt=0, le=1, description="Keep tokens of about the expected surprise, up to this probability."
    )
    epsilon_cutoff: float | None = Field(None, ge=0, lt=1, description="Drop tokens less probable than this.")
    eta_cutoff: float | None = Field(
        None, ge=0, lt=1, description="Drop tokens below min(this, sqrt(this) * exp(-entropy))."
    )
    top_n_sigma: float | None = Field(
        None, ge=0, le=1e6, description="Keep logits so many standard deviations below the highest; 0 keeps all."
    )
    temperature_last: bool | None = Field(None, description="Apply the temperature after the filters.")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="Lowers tokens that were generated before.")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="The same, for each time they were.")
    repetition_penalty: float | None = Field(
        None, ge=1e-6, le=1e6, description="Above 1 makes tokens of prompt and answer less likely."
    )
    no_repeat_ngram_size: int | None = Field(
        None, ge=0, le=INT32, description="No run of so many tokens comes twice; 0 is no limit."
    )
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]], FewFaults
        ]
        | None
    ) = Field(None, description="Token id to a number in [-100, 100], added to its logit.")
    bad_words: list[Word] | None = Field(
        None, max_length=1024, description="Texts or lists of token ids that the answer never completes."
    )

    stop: Stop | None = Field(None, description="A string, or up to 64, that end the answer and are not part of it.")
    stop_token_ids: list[TokenId] | None = Field(
        None, max_length=1024, description="Token ids that end the answer, besides the model's own."
    )
    include_stop_str_in_output: bool | None = Field(None, description="Keep the stop string in the answer.")
    ignore_eos: bool | None = Field(None, description="Go on after the model's own end of sequence.")
    length_decay: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        None, description="[start, factor]: after start tokens the end becomes likelier by a growing factor."
    )
    max_time: float | None = Field(
        None, gt=0, le=1e9, description='Seconds after which the answer ends, with "length".'
    )
    max_flops: float | None = Field(
        None, gt=0, le=1e30, description='Floating-point operations after which the answer ends, with "length".'
    )
    stop_below_probability: float | None = Field(
        None, ge=0, le=1, description="End with the first token less probable than this."
    )
    repetition_stop: Annotated[list[int], Field(min_length=2, max_length=2)] | None = Field(
        None, description="[longest pattern, count]: end when the answer repeats one pattern so often."
    )
    skip_special_tokens: bool | None = Field(None, description="Leave special tokens out of the text. Default: true.")

    thinking_budget: int | None = Field(
        None, ge=0, le=INT32, description="Most tokens of reasoning; its end is forced then."
    )
    min_thinking_tokens: int | None = Field(None, ge=0, le=INT32, description="Reasoning does not end before.")
    think_waits: int | None = Field(
        None, ge=0, le=INT32, description="How often think_wait takes the place of the end of reasoning."
    )
    think_wait: NonEmpty | None = Field(None, description='The one token that does. Default: "Wait".')

    prompt_logprobs: int | None = Field(
        None, ge=0, le=20, description="Log-probabilities of the prompt's tokens, with so many most probable ones."
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="The form of the answer: json (a schema), regex, choice, grammar or json_object."
    )
    priority: int | None = Field(
        None, ge=-INT32, le=INT32, description="Lower numbers go first when requests wait. Default: 0."
    )
    cache_salt: NonEmpty | None = Field(
        None, max_length=512, description="Cached prompts are shared with requests of the same salt only."
    )

    stream: bool | None = Field(None, description="Send the answer in chunks, as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="include_usage; needs stream.")
    user: Label | None = Field(None, description="Your label.", json_schema_extra=LABEL)

    def sampling_values(self) -> dict[str, Any]:
        """What SamplingParams takes. Raises RequestError for fields that do not go together."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream to be true", field="stream_options")
        values = {name: getattr(self, name) for name in SAME_NAME if getattr(self, name) is not None}
        for pair in ("length_decay", "repetition_stop"):
            if pair in values:
                values[pair] = tuple(values[pair])
        if self.logit_bias is not None:
            values["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        if self.structured_outputs is not None:
            values["structured"] = self.structured_outputs.form()
        return values

    @property
    def standing(self) -> Standing:
        """Where the request stands among others."""
        return Standing(priority=self.priority or 0, cache_salt=self.cache_salt)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def sampling_params(values: dict[str, Any]) -> SamplingParams:
    """Raises RequestError, naming the field as the request does."""
    try:
        return SamplingParams.from_dict(values)
    except RequestError as error:
        if error.field == "structured":
            raise RequestError(str(error), field="structured_outputs") from error
        raise

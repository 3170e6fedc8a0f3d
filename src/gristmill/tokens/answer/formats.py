"""How model families write reasoning and tool calls."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum


class CallStyle(Enum):
    """A way to write tool calls."""

    HERMES = "hermes"
    """`<tool_call>`, line break, `{"name": ..., "arguments": {...}}`, line break, `</tool_call>`: ChatML, Qwen."""
    QWEN_XML = "qwen_xml"
    """`<tool_call>` around `<function=NAME>` and, for each argument, `<parameter=KEY>`: Qwen3-Coder."""
    LLAMA3 = "llama3"
    """`{"name": ..., "parameters": {...}}` at the beginning of the answer or after `<|python_tag|>`, several with `;`
    between them."""
    MISTRAL = "mistral"
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`."""
    MISTRAL_ARGS = "mistral_args"
    """`[TOOL_CALLS]NAME[ARGS]{...}` for each call, perhaps with `[CALL_ID]ID` before `[ARGS]`."""

    @property
    def marker(self) -> str:
        """What introduces a call. Its first character comes nowhere else in it."""
        markers = {
            CallStyle.LLAMA3: "<|python_tag|>",
            CallStyle.HERMES: "<tool_call>",
            CallStyle.QWEN_XML: "<tool_call>",
        }
        return markers.get(self, "[TOOL_CALLS]")


@dataclass(frozen=True)
class AnswerFormat:
    """What an answer is made of: the style of its tool calls (None: unknown) and the markers around its reasoning
    (None: has none).

    Raises ValueError for a marker whose first character comes in it again, which a reader could not tell apart.
    """

    calls: CallStyle | None = CallStyle.HERMES
    reasoning: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        for marker in self.reasoning or ():
            if not marker or marker[0] in marker[1:]:
                raise ValueError(f"{marker!r} cannot mark reasoning: its first character comes in it again")

    def opened_by(self, prompt_end: str, continued: str = "") -> bool:
        """Whether the answer begins inside the reasoning: the prompt ends with the opening marker, or the beginning of
        the answer that is to be continued holds one that is not closed."""
        if self.reasoning is None:
            return False
        opening, closing = self.reasoning
        if continued.strip():
            return continued.rfind(opening) > continued.rfind(closing)
        return prompt_end.rstrip().endswith(opening)

    def thinking(self, opening: str = "<think>", closing: str = "</think>") -> AnswerFormat:
        """The same with reasoning between these markers."""
        return dataclasses.replace(self, reasoning=(opening, closing))


HERMES = AnswerFormat(CallStyle.HERMES)
QWEN_XML = AnswerFormat(CallStyle.QWEN_XML)
LLAMA3 = AnswerFormat(CallStyle.LLAMA3)
MISTRAL = AnswerFormat(CallStyle.MISTRAL)
MISTRAL_ARGS = AnswerFormat(CallStyle.MISTRAL_ARGS)

"""Conversations to token ids, with the mask of what is learned, from one tokenisation.

The rendered text is cut where an answer begins, and each piece is tokenised once. A model that is asked for the answer
never sees past that cut, so cutting there makes the prompt's ids a prefix of the training ids, always: no token can
straddle the cut, and nothing has to be searched for or tokenised again. Where the tokenizer would not merge across the
cut (any usual template, answers that do not begin with a blank) the ids are those of the uncut text.

Everything from the cut to the stop token that closes the answer is learned; all the rest is not.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from tokenizers import Tokenizer as Backend

from gristmill.core import Message, Rendered
from gristmill.errors import DataError
from gristmill.tokens.messages import Turn, check_messages, check_tools, in_hermes_form, texts_in, turns_of
from gristmill.tokens.probes import check_template, knows_developer, knows_tools, prompt_tokens
from gristmill.tokens.templates import CHATML, ChatTemplate
from gristmill.tokens.tokenizer import Tokenizer

_BOTH = (False, True)


class Prompt(NamedTuple):
    """A rendered prompt: its text, and where each earlier answer begins in it (number of the turn -> character)."""

    text: str
    starts: dict[int, int]


class JinjaRenderer:
    """Renders with any Hugging Face Jinja chat template: `template`, else the tokenizer's own, else ChatML.

    The template is tried on a small conversation first. Raises DataError when it is not prefix-preserving, ignores
    `add_generation_prompt` or never puts a stop token after an answer. Where only the prompt opens the reasoning
    (DeepSeek-R1), prompts are rendered and `render` refuses. `allow_special` lets message content spell special tokens,
    which then mean what they mean to the model; leave it off for text you did not write.

    Tools are given to a template that prints tools, calls and results; for any other the conversation takes the form of
    `messages.in_hermes_form`. The role developer becomes system where the template does not tell it from any other.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None = None, *, allow_special: bool = False) -> None:
        source = template if template is not None else tokenizer.chat_template
        self.tokenizer = tokenizer
        self.template = ChatTemplate(CHATML if source is None else source, tokenizer)
        self.allow_special = allow_special
        closing = check_template(self.template, tokenizer)
        self._stop_token_ids = tuple(dict.fromkeys([*tokenizer.stop_token_ids, closing]))
        self._stop_tokens = [token for index in self._stop_token_ids if (token := tokenizer.token_of(index))]
        self._special_tokens = sorted(
            {*tokenizer.special_tokens, *self._stop_tokens, *prompt_tokens(self.template, tokenizer)}
        )
        self._backend = _without_post_processor(tokenizer.backend)
        self._adds_prefix = _adds_prefix(tokenizer)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's stop tokens and the token with which the template closes an answer."""
        return self._stop_token_ids

    @cached_property
    def knows_tools(self) -> bool:
        """Whether the template prints descriptions of tools, calls and results."""
        return knows_tools(self.template)

    def render(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None) -> Rendered:
        """The whole conversation for training; answers and the stop tokens that close them have mask 1.

        Raises DataError for an empty conversation, one without an assistant message (nothing would be learned), a
        role or content that the template refuses, drops or rewrites, and content that spells a special token.
        """
        turns, own_tools = self._turns(messages, tools)
        if not any(turn["role"] == "assistant" for turn in turns):
            raise DataError("no message has the role assistant, so nothing would be learned. Add an answer.")
        text = self.template.text(turns, tools=own_tools)
        added = len(turns) - len(messages)
        self._check_printed(turns, text, added)
        starts = self.template.answer_starts(turns, text, tools=own_tools)
        ids, offsets, firsts = self._encode(text, starts)
        mask = [0] * len(ids)
        ends = [*firsts[1:], len(ids)]
        for (index, start), first, end in zip(starts.items(), firsts, ends, strict=True):
            stop = self._closing_position(ids, first, end, turns[index]["content"])
            if stop is None:
                raise DataError(f"message {index - added}: the chat template puts no stop token after this answer")
            check_answer(turns[index], text[start : offsets[stop][0]], index - added)
            mask[first : stop + 1] = [1] * (stop + 1 - first)
        return Rendered(token_ids=ids, loss_mask=mask, offsets=offsets, text=text)

    def render_prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final: bool = False,
        template_options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Ids that end where the next answer begins: a prefix of `render` of the answered conversation.

        tools: functions that may be called. continue_final: the last message is the beginning of the answer and is left
        open. template_options: further names that the template reads (`enable_thinking`). Raises DataError as `render`
        does, but the template may leave out the reasoning of earlier answers.
        """
        return self.encode_prompt(self.prompt_text(messages, tools, continue_final, template_options))

    def prompt_text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final: bool = False,
        template_options: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """The text of `render_prompt`."""
        options = template_options or {}
        self.template.check_options(options)
        turns, own_tools = self._turns(messages, tools)
        added = len(turns) - len(messages)
        if continue_final:
            text = self._open_text(turns, own_tools, options)
        else:
            text = self.template.text(turns, tools=own_tools, add_generation_prompt=True, options=options)
        self._check_printed(turns, text, added, own_tools, options)
        return Prompt(text, self.template.answer_starts(turns, text, tools=own_tools, exact=False))

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Its ids."""
        return self._encode(prompt.text, prompt.starts)[0]

    def answer_text(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """What the model would have written for the last message, without what closes it.

        Raises DataError as `render_prompt` does, and where the answer's beginning cannot be told.
        """
        turns, own_tools = self._turns(messages, tools)
        text = self.template.text(turns, tools=own_tools)
        start = self.template.answer_starts(turns, text, tools=own_tools, exact=False).get(len(turns) - 1)
        if start is None:
            raise DataError(f"message {len(messages) - 1}: the chat template does not show where this answer begins")
        closing = "|".join(re.escape(token) for token in self._special_tokens)
        return re.sub(rf"(\s*({closing}))*\s*\Z", "", text[start:])

    def _turns(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[list[Turn], list[Turn]]:
        """The checked conversation and tools as the template takes them."""
        check_messages(messages)
        turns, checked = turns_of(messages), check_tools(tools or ())
        if not self.allow_special:
            for index, turn in enumerate(turns):
                for field, value in turn.items():
                    self._check_special(f"message {index}: {field}", value)
            for number, tool in enumerate(checked):
                self._check_special(f"tools[{number}]", tool)
        if any(turn["role"] == "developer" for turn in turns) and not knows_developer(self.template):
            turns = [{**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in turns]
        if (checked or any("tool_calls" in t or t["role"] == "tool" for t in turns)) and not self.knows_tools:
            return in_hermes_form(turns, checked), []
        return turns, checked

    def _check_special(self, where: str, value: object) -> None:
        for text in texts_in(value):
            spelled = next((token for token in self._special_tokens if token in text), None)
            if spelled is not None:
                raise DataError(
                    f"{where} spells the special token {spelled!r}, which the model would take "
                    "for the end or start of a turn. Remove it, or pass allow_special=True if you mean it."
                )

    def _open_text(self, turns: list[Turn], tools: list[Turn], options: Mapping[str, Any]) -> str:
        """The conversation up to the end of the last message's content."""
        last = turns[-1]
        if last["role"] != "assistant" or "tool_calls" in last or not last["content"].strip():
            raise DataError("continue_final needs a last message with the role assistant, content and no tool calls")
        end = next(mark for mark in map(chr, range(0xE000, 0xF8FF)) if not any(mark in t for t in texts_in(turns)))
        marked = [*turns[:-1], {**last, "content": last["content"] + end}]
        text, found, _ = self.template.text(marked, tools=tools, options=options).rpartition(end)
        if not found or not text.endswith(last["content"].lstrip()):
            raise DataError("continue_final: the chat template does not print the last message as it is")
        return text

    def _check_printed(
        self,
        turns: Sequence[Turn],
        text: str,
        added: int,
        tools: Sequence[Turn] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Refuse a message that the template leaves out: a misspelt role often vanishes without a word."""

        def changes(index: int, **fields: str) -> bool:
            other = [*turns[:index], {**turns[index], **fields}, *turns[index + 1 :]]
            shown = [self.template.text(other, tools=tools, add_generation_prompt=g, options=options) for g in _BOTH]
            return not any(text.startswith(one) or one.startswith(text) for one in shown)

        position = 0
        for index, turn in enumerate(turns):
            content = turn["content"].strip()
            found = text.find(content, position)
            if found >= 0:
                position = found + len(content)
            # Not there word for word: the template may still have used it in some other form.
            elif not changes(index, content=turn["content"] + "."):
                what = "the content beside tool calls" if "tool_calls" in turn else f"the role {turn['role']!r}"
                raise DataError(f"message {index - added}: the chat template leaves out {what}")
            if "name" in turn and turn["role"] != "tool" and not changes(index, name=turn["name"] + "x"):
                raise DataError(f"message {index - added}: the chat template leaves out the field 'name'. Remove it.")

    def _closing_position(self, ids: list[int], first: int, end: int, content: str) -> int | None:
        """Position of the stop token that closes the answer whose tokens begin at `first`, within ids[:end]."""
        spelled = sum(content.count(token) for token in self._stop_tokens) if self.allow_special else 0
        stops = [i for i in range(first, end) if ids[i] in self._stop_token_ids]
        return stops[spelled] if spelled < len(stops) else None

    def _encode(self, text: str, starts: dict[int, int]) -> tuple[list[int], list[tuple[int, int]], list[int]]:
        """Ids and offsets of `text`, and the position of each answer's first token."""
        if self._adds_prefix:
            return self._encode_whole(text, starts)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        firsts: list[int] = []
        cuts = [0, *starts.values(), len(text)]
        for start, stop in itertools.pairwise(cuts):
            firsts.append(len(ids))
            encoding = self._backend.encode(text[start:stop], add_special_tokens=False)
            ids += encoding.ids
            offsets += [(start + begin, start + end) for begin, end in encoding.offsets]
        return ids, offsets, firsts[1:]

    def _encode_whole(self, text: str, starts: dict[int, int]) -> tuple[list[int], list[tuple[int, int]], list[int]]:
        """The same for a tokenizer that puts a blank before any text, so that pieces cannot be joined.

        Raises DataError when the prompt's ids are no prefix of all ids.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        firsts = []
        for index, start in starts.items():
            prompt = self._backend.encode(text[:start], add_special_tokens=False).ids
            if encoding.ids[: len(prompt)] != prompt:
                raise DataError(
                    f"message {index}: this tokenizer joins the answer's beginning {text[start : start + 10]!r} with "
                    "the prompt into one token. Remove blanks from the beginning of the answer."
                )
            firsts.append(len(prompt))
        return encoding.ids, encoding.offsets, firsts


def check_answer(turn: Turn, printed: str, index: int) -> None:
    """Raise DataError unless `printed` holds the answer's content, reasoning and calls."""
    if turn["content"].strip() not in printed:
        raise DataError(f"message {index}: the chat template rewrites this answer; it would not be learned")
    if turn.get("reasoning_content", "").strip() not in printed:
        raise DataError(f"message {index}: the chat template leaves out reasoning_content; it would not be learned")
    for call in turn.get("tool_calls", ()):
        if call["function"]["name"] not in printed:
            raise DataError(f"message {index}: the chat template leaves out a tool call; it would not be learned")


def _adds_prefix(tokenizer: Tokenizer) -> bool:
    tokens = tokenizer.backend.encode("x", add_special_tokens=False).tokens
    return bool(tokens) and tokens[0].startswith(("\u2581", "\u0120"))


def _without_post_processor(backend: Backend) -> Backend:
    """Some post-processors cut blanks off a token's offsets; what else they do (start tokens) the template does."""
    if backend.post_processor is None:
        return backend
    copy = Backend.from_str(backend.to_str())
    copy.post_processor = None
    return copy

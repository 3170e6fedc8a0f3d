"""Conversations to token ids, with the mask of what is learned, from one tokenisation.

The rendered text is cut where an answer begins, and each piece is tokenised once. A model that is asked for the answer
never sees past that cut, so cutting there makes the prompt's ids a prefix of the training ids, always: no token can
straddle the cut, and nothing has to be searched for or tokenised again. Where the tokenizer would not merge across the
cut (any usual template, answers that do not begin with a blank) the ids are those of the uncut text.

Everything from the cut to the stop token that closes the answer is learned; all the rest is not.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer as Backend

from gristmill.core import Message, Rendered
from gristmill.errors import DataError
from gristmill.tokens.templates import CHATML, ChatTemplate
from gristmill.tokens.tokenizer import Tokenizer

_PROBE: list[Message] = [
    {"role": "user", "content": "Where do herons nest?"},
    {"role": "assistant", "content": "Tall trees."},
    {"role": "user", "content": "Since when?"},
    {"role": "assistant", "content": "Early spring."},
]
_SYSTEM: Message = {"role": "system", "content": "Answer briefly."}


class JinjaRenderer:
    """Renders with any Hugging Face Jinja chat template: `template`, else the tokenizer's own, else ChatML.

    The template is tried on a small conversation first. Raises DataError when it is not prefix-preserving, ignores
    `add_generation_prompt` or never puts a stop token after an answer. `allow_special` lets message content spell
    special tokens, which then mean what they mean to the model; leave it off for text you did not write.
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
            {*tokenizer.special_tokens, *self._stop_tokens, *_prompt_tokens(self.template, tokenizer)}
        )
        self._backend = _without_post_processor(tokenizer.backend)
        self._adds_prefix = _adds_prefix(tokenizer)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's stop tokens and the token with which the template closes an answer."""
        return self._stop_token_ids

    def render(self, messages: Sequence[Message]) -> Rendered:
        """The whole conversation for training; answers and the stop tokens that close them have mask 1.

        Raises DataError for an empty conversation, one without an assistant message (nothing would be learned), a
        role or content that the template refuses, drops or rewrites, and content that spells a special token.
        """
        self._check(messages)
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError("no message has the role assistant, so nothing would be learned. Add an answer.")
        text = self.template.text(messages)
        self._check_printed(messages, text)
        starts = self.template.answer_starts(messages, text)
        ids, offsets, firsts = self._encode(text, starts)
        mask = [0] * len(ids)
        ends = [*firsts[1:], len(ids)]
        for (index, start), first, end in zip(starts.items(), firsts, ends, strict=True):
            content = messages[index]["content"]
            stop = self._closing_position(ids, first, end, content)
            if stop is None:
                raise DataError(f"message {index}: the chat template puts no stop token after this answer")
            if content.strip() not in text[start : offsets[stop][0]]:
                raise DataError(f"message {index}: the chat template rewrites this answer; it would not be learned")
            mask[first : stop + 1] = [1] * (stop + 1 - first)
        return Rendered(token_ids=ids, loss_mask=mask, offsets=offsets, text=text)

    def render_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids that end where the next answer begins: a prefix of `render` of the answered conversation.

        Raises DataError as `render` does.
        """
        self._check(messages)
        text = self.template.text(messages, add_generation_prompt=True)
        self._check_printed(messages, text)
        return self._encode(text, self.template.answer_starts(messages, text))[0]

    def _check(self, messages: Sequence[Message]) -> None:
        if not messages:
            raise DataError("the conversation is empty. Give at least one message.")
        for index, message in enumerate(messages):
            check_message(message, index)
            for field, value in message.items():
                spelled = next((token for token in self._special_tokens if token in str(value)), None)
                if spelled is not None and not self.allow_special:
                    raise DataError(
                        f"message {index}: {field} spells the special token {spelled!r}, which the model would take "
                        "for the end or start of a turn. Remove it, or pass allow_special=True if you mean it."
                    )

    def _check_printed(self, messages: Sequence[Message], text: str) -> None:
        """Refuse a message that the template leaves out: a misspelt role often vanishes without a word."""
        position = 0
        for index, message in enumerate(messages):
            content = message["content"].strip()
            found = text.find(content, position)
            if found >= 0:
                position = found + len(content)
                continue
            # Not there word for word: the template may still have used it in some other form.
            other = list(messages)
            other[index] = {"role": message["role"], "content": message["content"] + "."}
            if text in (self.template.text(other), self.template.text(other, add_generation_prompt=True)):
                raise DataError(f"message {index}: the chat template leaves out the role {message['role']!r}")

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


def check_message(message: Mapping[str, object], index: int) -> None:
    """Raise DataError, naming the message, unless it has a role and content that can be rendered, and nothing else."""
    if not isinstance(message, dict):
        raise DataError(f"message {index}: expected an object with role and content, got {type(message).__name__}")
    for field in ("role", "content"):
        value = message.get(field)
        if field not in message:
            raise DataError(f"message {index}: field {field!r} is missing (found: {', '.join(message) or 'nothing'})")
        if not isinstance(value, str):
            raise DataError(f"message {index}: field {field!r} must be text, got {type(value).__name__}")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise DataError(f"message {index}: field {field!r} holds half of a surrogate pair, which is not text")
    surplus = [name for name in message if name not in ("role", "content")]
    if surplus:
        raise DataError(f"message {index}: field {surplus[0]!r} is not supported. Remove it.")


def check_template(template: ChatTemplate, tokenizer: Tokenizer) -> int:
    """Id of the token that closes an answer.

    Tries a conversation with and without a system message; a template may refuse one of the two. Raises DataError when
    the template is not prefix-preserving, ignores `add_generation_prompt`, drops an answer or closes none.
    """
    closings: set[int] = set()
    refusals: list[DataError] = []
    for probe in (_PROBE, [_SYSTEM, *_PROBE]):
        try:
            text = template.text(probe)
        except DataError as error:
            refusals.append(error)
            continue
        starts = template.answer_starts(probe, text)
        ends = [*list(starts.values())[1:], len(text)]
        prompted = template.text(probe[:-1]) != template.text(probe[:-1], add_generation_prompt=True)
        for (index, start), end in zip(starts.items(), ends, strict=True):
            following = probe[index + 1]["content"] if index + 1 < len(probe) else None
            lead, found, tail = text[start:end].partition(probe[index]["content"])
            if not found:
                raise DataError("the chat template does not print the assistant's answer as it is")
            if any(token in lead for token in tokenizer.special_tokens) or (lead.strip() and not prompted):
                raise DataError(f"the chat template ignores add_generation_prompt: {lead!r} would be learned")
            closings.add(_closing_token(tokenizer, tail if following is None else tail.partition(following)[0]))
    if not closings:
        raise refusals[0]
    if len(closings) > 1:
        tokens = ", ".join(repr(tokenizer.token_of(index)) for index in sorted(closings))
        raise DataError(f"the chat template closes answers in different ways ({tokens}); earlier ones would never stop")
    return closings.pop()


def _closing_token(tokenizer: Tokenizer, tail: str) -> int:
    """The first stop or added token in `tail`, what the template prints after an answer."""
    closers = {*_added_tokens(tokenizer), *tokenizer.stop_token_ids}
    closing = next((index for index in tokenizer.encode(tail, add_bos=False) if index in closers), None)
    if closing is None:
        raise DataError(
            f"the chat template puts no stop token after an answer (it prints {tail!r}): the model would never learn "
            "to stop. Close answers with a special token of the tokenizer."
        )
    return closing


def _prompt_tokens(template: ChatTemplate, tokenizer: Tokenizer) -> set[str]:
    """Added tokens that the template prints around a question; older tokenizers do not flag all of them as special."""
    try:
        text = template.text(_PROBE[:1], add_generation_prompt=True)
    except DataError:
        text = template.text([_SYSTEM, *_PROBE[:1]], add_generation_prompt=True)
    added = _added_tokens(tokenizer)
    return {added[index] for index in tokenizer.encode(text, add_bos=False) if index in added}


def _added_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Tokens outside the learned vocabulary, without those that stand for mere blanks."""
    added = tokenizer.backend.get_added_tokens_decoder()
    return {index: token.content for index, token in added.items() if token.content.strip()}


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

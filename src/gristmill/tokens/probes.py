"""What a chat template does, found out by rendering small conversations."""

from __future__ import annotations

from gristmill.core import Message
from gristmill.errors import DataError
from gristmill.tokens.messages import Turn
from gristmill.tokens.templates import ChatTemplate
from gristmill.tokens.tokenizer import Tokenizer

_PROBE: list[Message] = [
    {"role": "user", "content": "Where do herons nest?"},
    {"role": "assistant", "content": "Tall trees."},
    {"role": "user", "content": "Since when?"},
    {"role": "assistant", "content": "Early spring."},
]
_SYSTEM: Message = {"role": "system", "content": "Answer briefly."}
TOOL: Turn = {
    "type": "function",
    "function": {
        "name": "count_birds",
        "description": "Counts birds.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CALLING: list[Turn] = [
    {"role": "user", "content": "How many herons?"},
    {
        "role": "assistant",
        "content": "",
        # nine characters, as Mistral's templates ask for
        "tool_calls": [
            {"id": "abcDEF123", "type": "function", "function": {"name": "count_birds", "arguments": {"place": "Mill"}}}
        ],
    },
    {"role": "tool", "content": "forty-one", "tool_call_id": "abcDEF123", "name": "count_birds"},
]
"""A question, a call of TOOL and its result."""


def knows_tools(template: ChatTemplate) -> bool:
    """Whether the template prints descriptions of tools, calls and results."""
    try:
        described = template.text(CALLING[:1], tools=[TOOL], add_generation_prompt=True)
        called = template.text(CALLING, tools=[TOOL], add_generation_prompt=True)
    except DataError:
        return False
    return "Counts birds." in described and "Mill" in called and "forty-one" in called


def knows_developer(template: ChatTemplate) -> bool:
    """Whether the template prints the role developer, and not just any role."""

    def prints(role: str) -> bool:
        try:
            return "briefly" in template.text([{"role": role, "content": "Answer briefly."}, *_PROBE[:1]])
        except DataError:
            return False

    return prints("developer") and not prints("narrator")


def check_template(template: ChatTemplate, tokenizer: Tokenizer) -> int:
    """Id of the token that closes an answer.

    Tries a conversation with and without a system message; one of the two may be refused, or not prefix-preserving
    (Mistral puts the system message before the last question). Raises DataError when neither is fine, or when the
    template ignores `add_generation_prompt`, drops an answer or closes none.
    """
    closings: set[int] = set()
    refusals: list[DataError] = []
    for probe in (_PROBE, [_SYSTEM, *_PROBE]):
        try:
            text = template.text(probe)
            starts = template.answer_starts(probe, text, exact=False)
            if len(starts) < 2:
                template.answer_starts(probe, text)  # raises
        except DataError as error:
            refusals.append(error)
            continue
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


def prompt_tokens(template: ChatTemplate, tokenizer: Tokenizer) -> set[str]:
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

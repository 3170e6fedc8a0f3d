"""Supervised fine-tuning data: conversations rendered to token ids and loss masks.

Training itself is `train.loop.train` with the causal objective: only the masks differ from pretraining.

Source: Ouyang et al. 2022, section 3.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from gristmill.core import Message, Renderer
from gristmill.errors import DataError


def render_conversations(
    conversations: Iterable[Sequence[Message]],
    renderer: Renderer,
    *,
    max_tokens: int,
    on_error: Callable[[DataError], None] | None = None,
) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and loss mask of each conversation.

    Raises DataError, naming the conversation by number from 0, when one cannot be rendered or is longer than
    `max_tokens`: nothing is cut off in silence. With `on_error` the error is handed to it instead, and when it returns
    the conversation is left out.
    """
    for number, messages in enumerate(conversations):
        try:
            yield _rendered(messages, renderer, f"conversation {number}", max_tokens)
        except DataError as error:
            if on_error is None:
                raise
            on_error(error)


def _rendered(
    messages: Sequence[Message], renderer: Renderer, name: str, max_tokens: int
) -> tuple[list[int], list[int]]:
    try:
        rendered = renderer.render(messages)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    if len(rendered.token_ids) > max_tokens:
        raise DataError(f"{name} has {len(rendered.token_ids)} tokens, more than {max_tokens}")
    return rendered.token_ids, rendered.loss_mask

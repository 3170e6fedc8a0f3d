"""Supervised fine-tuning data: conversations rendered to token ids and loss masks.

Training itself is `train.loop.train` with the causal objective: only the masks differ from pretraining.

Source: Ouyang et al. 2022, section 3.4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from gristmill.core import Message, Renderer
from gristmill.errors import DataError


def render_conversations(
    conversations: Iterable[Sequence[Message]], renderer: Renderer, *, max_tokens: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and loss mask of each conversation.

    Raises DataError, naming the conversation by number, when one cannot be rendered or is longer than `max_tokens`:
    nothing is cut off in silence.
    """
    for number, messages in enumerate(conversations):
        try:
            rendered = renderer.render(messages)
        except DataError as error:
            raise DataError(f"conversation {number}: {error}") from error
        if len(rendered.token_ids) > max_tokens:
            raise DataError(f"conversation {number} has {len(rendered.token_ids)} tokens, more than {max_tokens}")
        yield rendered.token_ids, rendered.loss_mask

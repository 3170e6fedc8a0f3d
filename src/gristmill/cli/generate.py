"""gristmill generate: complete a prompt."""

from __future__ import annotations

import secrets
import sys
from dataclasses import dataclass

from gristmill.cli.loading import Loading
from gristmill.cli.sampling import Sampling
from gristmill.cli.stream import stream
from gristmill.core import Message
from gristmill.engine.llm import LLM
from gristmill.errors import RequestError


@dataclass(frozen=True)
class Config(Loading, Sampling):
    """Complete a prompt with a model; the text is written to standard output as it comes."""

    model: str
    """Asset name, Hugging Face directory, GGUF file or run directory."""
    prompt: str = ""
    """The text to go on from; - reads standard input."""
    chat: bool = False
    """Put the prompt as a user's message through the chat template."""


def run(config: Config) -> int:
    """Print the completion. Raises RequestError for an empty prompt or one beyond the context."""
    prompt = _read_prompt() if config.prompt == "-" else config.prompt
    if not prompt:
        raise RequestError("the prompt is empty. Give one with --prompt TEXT, or --prompt - for standard input.")
    llm = LLM(config.model, **config.loading, seed=secrets.randbits(32))  # a seed that was asked for is the request's
    messages: list[Message] = [{"role": "user", "content": prompt}]
    ids = llm.renderer.render_prompt(messages) if config.chat else llm.engine.encode(prompt)
    params = config.params(room=llm.room_after(ids))
    if config.chat:
        params = params.ending_at(llm.renderer.stop_token_ids)
    output = stream(llm.engine, ids, params, sys.stdout)
    print()
    if output.outputs[0].finish_reason == "length":
        print(f"[stopped after {len(output.outputs[0].token_ids)} tokens]", file=sys.stderr)
    return 0


def _read_prompt() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input: not UTF-8 at byte {error.start}", field="prompt") from error

"""gristmill chat: talk to a model in the terminal."""

from __future__ import annotations

import secrets
import sys
from dataclasses import dataclass

from gristmill.cli.loading import Loading
from gristmill.cli.sampling import Sampling
from gristmill.cli.stream import stream
from gristmill.core import Message
from gristmill.engine.llm import LLM
from gristmill.errors import GristmillError, RequestError

_HELP = "Enter sends. /new starts a new conversation, /quit (or Ctrl-D) ends, Ctrl-C stops an answer."


@dataclass(frozen=True)
class Config(Loading, Sampling):
    """Talk to a model. Reads lines from standard input, so it can be used in a pipe."""

    model: str
    """Asset name, Hugging Face directory, GGUF file or run directory."""
    system: str = ""
    """System message; empty leaves it to the chat template."""


def run(config: Config) -> int:
    """The conversation loop. A message that cannot be answered is reported and forgotten; the talk goes on."""
    llm = LLM(config.model, **config.loading, seed=secrets.randbits(32))  # a seed that was asked for is the request's
    _ = llm.renderer  # a model that cannot chat is told before anybody types
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"{llm.model_name}, context of {llm.max_model_len} tokens. {_HELP}", file=sys.stderr)
    start: list[Message] = [{"role": "system", "content": config.system}] if config.system else []
    messages = list(start)
    while (line := _read_line(interactive)) is not None:
        if line == "/quit":
            break
        if line == "/new":
            messages = list(start)
        elif line:
            messages = _turn(llm, config, messages, line, interactive)
    return 0


def _turn(llm: LLM, config: Config, messages: list[Message], line: str, interactive: bool) -> list[Message]:
    """Ask and answer once; returns the conversation with both, or as it was when that failed."""
    asked: list[Message] = [*messages, {"role": "user", "content": line}]
    try:
        ids = llm.renderer.render_prompt(asked)
        output = stream(
            llm.engine,
            ids,
            config.params(room=llm.room_after(ids)).ending_at(llm.renderer.stop_token_ids),
            sys.stdout,
        )
    except GristmillError as error:
        print(f"{error} (use /new for a new conversation)", file=sys.stderr)
        return messages
    except KeyboardInterrupt:
        if not interactive:
            raise
        print("\n[stopped]", file=sys.stderr)
        return messages
    print()
    return [*asked, {"role": "assistant", "content": output.outputs[0].text}]


def _read_line(interactive: bool) -> str | None:
    try:
        return input("> " if interactive else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        if not interactive:
            raise
        return None
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input: not UTF-8 ({error.reason})") from error

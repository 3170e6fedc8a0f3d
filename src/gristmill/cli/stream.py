"""Print one request of an engine as its text grows."""

from __future__ import annotations

from typing import TextIO

from gristmill.core import Prompt, RequestOutput, SamplingParams
from gristmill.engine.engine import Engine


def stream(engine: Engine, prompt: Prompt, params: SamplingParams, out: TextIO) -> RequestOutput:
    """Run one request, writing its first completion as it comes. An interrupt aborts it and frees its memory."""
    request_id = engine.add(prompt, params)
    printed = 0
    try:
        while True:
            for output in engine.step():
                text = output.outputs[0].text
                out.write(text[printed:])
                out.flush()
                printed = len(text)
                if output.finished:
                    return output
    finally:
        engine.abort(request_id)

"""Print one request of an engine as its text grows."""

from __future__ import annotations

from typing import TextIO

from gristmill.core import Prompt, RequestOutput, SamplingParams
from gristmill.engine.engine import Engine
from gristmill.errors import GristmillError


def stream(engine: Engine, prompt: Prompt, params: SamplingParams, out: TextIO) -> RequestOutput:
    """Run one request, writing its first completion as it comes. An interrupt aborts it and frees its memory.

    Raises GristmillError when the engine ends it with an error.
    """
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
                    if output.outputs[0].finish_reason == "error":
                        raise GristmillError(output.outputs[0].error or "the model failed to answer")
                    return output
    finally:
        engine.abort(request_id)

"""Prefill in one process, decoding in another: prompts do not slow down the tokens of those who read already.

The prefill engine computes a prompt and its first token; the request then travels with its keys and values to the
decode engine, which goes on without computing any of it again. What is paid is the way: `transfer_seconds`.

Source: Zhong et al. 2024 (DistServe); Patel et al. 2024 (Splitwise).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from gristmill.core import Prompt, RequestOutput, SamplingParams
from gristmill.engine.engine import Engine
from gristmill.engine.handover import Blocks, Handover
from gristmill.errors import GristmillError, RequestError


def transfer_seconds(tokens: int, bytes_per_token: int, bandwidth: float) -> float:
    """How long keys and values are on their way, at `bandwidth` bytes per second."""
    return tokens * bytes_per_token / bandwidth


def prefill(engine: Engine, requests: Sequence[tuple[Prompt, SamplingParams]], sink: Connection) -> int:
    """Compute prompts and their first tokens, and send each request on as soon as it has one; returns the bytes of keys
    and values sent. A request that ends with its first token is sent finished.

    Raises RequestError for a request that `engine` refuses; none is run then. GristmillError when nobody receives.
    """
    order: list[str] = []
    if any(params.n > 1 for _, params in requests):
        raise RequestError("a request of several completions is not handed over: send it n times", field="n")
    try:
        for prompt, params in requests:
            order.append(engine.add(prompt, params))
        _send(sink, order)
        waiting, sent = set(order), 0
        while waiting:
            for output in engine.step():
                waiting.discard(output.request_id)
                sent += send(sink, output if output.finished else engine.export(output.request_id))
        return sent
    finally:
        for request_id in order:
            engine.abort(request_id)


def decode(engine: Engine, source: Connection, timeout: float = 600.0) -> list[RequestOutput]:
    """Go on with the requests of one `prefill` until all are done; in their order there.

    timeout: seconds to wait for the prefill engine when there is nothing else to do. Raises GristmillError when it says
    nothing for so long, or is gone before it has sent them all.
    """
    _wait(source, timeout)
    order: list[str] = _receive(source)
    done: dict[str, RequestOutput] = {}
    arrived: deque[Handover] = deque()
    missing = len(order)
    while len(done) < len(order):
        # wait for the prefill engine only when there is nothing else to do
        while missing and (source.poll() or not (arrived or engine.has_unfinished())):
            _wait(source, timeout)
            item = receive(source)
            missing -= 1
            if isinstance(item, RequestOutput):
                done[item.request_id] = item
            else:
                arrived.append(item)
        while arrived and (engine.can_adopt(arrived[0]) or not engine.has_unfinished()):
            engine.adopt(arrived.popleft())  # an empty engine that has no room never will: it says so
        done |= {output.request_id: output for output in engine.step(finished_only=True)}
    return [done[request_id] for request_id in order]


def send(sink: Connection, item: Handover | RequestOutput) -> int:
    """Send a request on; returns the bytes of its keys and values, which go as they are, apart from the rest."""
    if isinstance(item, RequestOutput):
        _send(sink, item)
        return 0
    blocks = item.blocks
    _send(sink, (replace(item, blocks=replace(blocks, data=[])), blocks.like))
    payload = blocks.payload()
    try:
        sink.send_bytes(payload)
    except OSError as error:
        raise GristmillError(f"the decode process is gone ({error}): start it again") from error
    return len(payload)


def receive(source: Connection) -> Handover | RequestOutput:
    """What `send` sent. Raises GristmillError when the sender is gone."""
    head: RequestOutput | tuple[Handover, list[tuple[tuple[int, ...], str]]] = _receive(source)
    if isinstance(head, RequestOutput):
        return head
    handover, like = head
    try:
        payload = source.recv_bytes()
    except (EOFError, OSError) as error:
        raise _gone() from error
    blocks = handover.blocks
    return replace(handover, blocks=Blocks.of_payload(blocks.num_tokens, blocks.block_size, like, payload))


def _send(sink: Connection, item: object) -> None:
    try:
        sink.send(item)
    except OSError as error:
        raise GristmillError(f"the decode process is gone ({error}): start it again") from error


def _wait(source: Connection, timeout: float) -> None:
    if not source.poll(timeout):
        raise GristmillError(f"the prefill process has said nothing for {timeout:g} s: see what it does")


def _receive(source: Connection) -> Any:
    try:
        return source.recv()
    except (EOFError, OSError) as error:
        raise _gone() from error


def _gone() -> GristmillError:
    return GristmillError("the prefill process is gone with requests it has not sent: start it again")

"""What crosses between processes is what is new, and the other side has the whole again."""

from __future__ import annotations

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from gristmill.core import CompletionOutput, Logprob, RequestOutput
from gristmill.serve.routing.delta import grow, shrink


@st.composite
def histories(draw: st.DrawFn) -> list[RequestOutput]:
    """Cumulative outputs of one request, with or without log-probabilities."""
    asked, n = draw(st.booleans()), draw(st.integers(1, 3))
    tokens = [draw(st.lists(st.integers(0, 50), max_size=12)) for _ in range(n)]
    known = draw(st.one_of(st.none(), st.lists(st.none(), max_size=4)))
    lengths = [sorted(draw(st.lists(st.integers(0, len(ids)), min_size=3, max_size=3))) for ids in tokens]
    outputs = []
    for step in range(3):
        choices = [
            CompletionOutput(
                index,
                "".join(chr(97 + token % 26) for token in ids[: lengths[index][step]]),
                ids[: lengths[index][step]],
                cumulative_logprob=-float(step) if asked else None,
                logprobs=[{token: Logprob(-1.0, 1, "x")} for token in ids[: lengths[index][step]]] if asked else None,
                finish_reason="stop" if step == 2 else None,
            )
            for index, ids in enumerate(tokens)
        ]
        prompt_logprobs = None if known is None else known[: 2 * step]
        outputs.append(RequestOutput("r", "text", [1, 2, 3], choices, step == 2, prompt_logprobs, num_cached_tokens=2))
    return outputs


@given(histories())
def test_every_output_arrives_as_it_was(history: list[RequestOutput]) -> None:
    sent, received = None, None
    for output in history:
        delta = shrink(sent, output)
        before = received
        sent, received = output, grow(received, delta)
        assert received == output
        assert before is None or before.finished is False


@given(histories())
def test_nothing_is_sent_twice(history: list[RequestOutput]) -> None:
    deltas = [shrink(before, now) for before, now in zip([None, *history], history, strict=False)]
    assert all(delta.prompt_token_ids == [] for delta in deltas[1:])
    for index, last in enumerate(history[-1].outputs):
        assert list(chain.from_iterable(delta.outputs[index].token_ids for delta in deltas)) == last.token_ids
        assert "".join(delta.outputs[index].text for delta in deltas) == last.text

"""A file of prompts becomes a file of answers: in order, whatever is killed, with a line for every line."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from engine import helpers
from gristmill import cli
from gristmill.core import SamplingParams
from gristmill.engine.llm import LLM
from gristmill.engine.offline import Counts, run_batch
from gristmill.errors import DataError, GristmillError, RequestError

DEFAULTS = SamplingParams(temperature=1.0, max_tokens=6)
LINES: list[Any] = [
    {"prompt": "the river", "max_tokens": 40},  # long first: the others are finished before it
    {"id": "b", "prompt": [5, 6, 7], "temperature": 0},
    {"id": "c", "prompt": "two and two", "seed": 3, "stop": ["e"]},
    "",
    {"messages": [{"role": "user", "content": "once"}]},
    {"prompt": "far sea", "bad_words": ["e"], "repetition_stop": [2, 3]},
    {"prompt": "twice", "ignore_eos": True, "logit_bias": {"9": 2.0}},
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(helpers.save(tmp_path_factory.mktemp("offline") / "model"), max_num_seqs=3)


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_come_in_order_and_equal_those_of_the_model(llm: LLM, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    assert run_batch(llm, source, target, DEFAULTS) == Counts(lines=6, kept=0, errors=0)
    answers = read(target)
    assert [answer["id"] for answer in answers] == [1, "b", "c", 5, 6, 7]
    second = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=6))[0]
    third = llm.generate("two and two", SamplingParams(temperature=1, max_tokens=6, seed=3, stop="e"))[0]
    for answer, alone in zip(answers[1:3], (second, third), strict=True):
        assert answer["text"] == alone.outputs[0].text
        assert answer["finish_reason"] == alone.outputs[0].finish_reason
        assert answer["prompt_tokens"] == len(alone.prompt_token_ids)
        assert answer["completion_tokens"] == len(alone.outputs[0].token_ids)
    assert not llm.engine.has_unfinished()


def test_a_run_killed_anywhere_goes_on_to_the_same_file(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, whole = write(tmp_path / "in.jsonl", LINES), tmp_path / "whole.jsonl"
    run_batch(llm, source, whole, DEFAULTS)
    wanted, job = whole.read_bytes(), whole.with_name("whole.jsonl.job.json").read_bytes()
    target = tmp_path / "out.jsonl"
    target.with_name("out.jsonl.job.json").write_bytes(job)
    for cut in {*range(0, len(wanted), 41), len(wanted) - 1, len(wanted)}:
        target.write_bytes(wanted[:cut])
        counts = run_batch(llm, source, target, DEFAULTS)
        assert target.read_bytes() == wanted
        assert counts.kept == wanted[:cut].count(b"\n")
    step = llm.engine.step
    for steps in (0, 1, 3, 8, 20):
        target.write_bytes(b"")
        left = [None] * steps

        def until_killed(**options: Any) -> Any:
            if not left:  # noqa: B023 - called in this turn alone
                raise KeyboardInterrupt
            left.pop()  # noqa: B023
            return step(**options)

        monkeypatch.setattr(llm.engine, "step", until_killed)
        with pytest.raises(KeyboardInterrupt):
            run_batch(llm, source, target, DEFAULTS, in_flight=2)
        assert not llm.engine.has_unfinished()
        monkeypatch.setattr(llm.engine, "step", step)
        before = target.read_bytes()
        assert wanted.startswith(before)
        run_batch(llm, source, target, DEFAULTS, in_flight=4)
        assert target.read_bytes() == wanted


def test_finished_lines_are_not_computed_again(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    run_batch(llm, source, target, DEFAULTS)
    monkeypatch.setattr(llm.engine, "add", lambda *_: pytest.fail("asked again"))
    assert run_batch(llm, source, target, DEFAULTS) == Counts(lines=6, kept=6, errors=0)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "not JSON"),
        ("[1]", "found list"),
        ({"prompt": "a", "temperatur": 1}, "Did you mean temperature"),
        ({"prompt": "a", "temperature": -1}, "temperature must be"),
        ({"prompt": "a", "stop": 5}, "stop must be a text"),
        ({"prompt": "a", "n": 2}, "n has no place"),
        ({"prompt": "a", "logprobs": 1}, "logprobs has no place"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": 5}, "a text or a list"),
        ({"prompt": [10**9]}, "not in the vocabulary"),
        ({"prompt": "a", "max_tokens": 10**6}, "context"),
        ({"prompt": "a", "messages": []}, "not both"),
        ({"id": "b"}, "one of prompt and messages"),
        ({"messages": "a"}, "must be a list"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"prompt": "a", "id": 1.5}, "id must be"),
        ({"prompt": "a", "id": "first"}, "id 'first' is that of line 1"),
        ({"prompt": "a", "\ud800": 1}, "unknown field"),
    ],
)
def test_a_bad_line_gives_an_error_line_and_the_others_go_on(llm: LLM, tmp_path: Path, line: Any, told: str) -> None:
    good = [{"prompt": "far", "id": "first"}, {"prompt": "sea", "id": "last"}]
    source, target = write(tmp_path / "in.jsonl", [good[0], line, good[1]]), tmp_path / "out.jsonl"
    assert run_batch(llm, source, target, DEFAULTS) == Counts(lines=3, kept=0, errors=1)
    first, bad, last = read(target)
    assert told in bad["error"]
    assert f"{source} line 2: " in bad["error"]
    assert set(bad) == {"id", "error"}
    assert (first["id"], last["id"]) == ("first", "last")
    assert first["completion_tokens"] > 0 < last["completion_tokens"]
    before = target.read_bytes()
    assert run_batch(llm, source, target, DEFAULTS) == Counts(lines=3, kept=3, errors=1)
    assert target.read_bytes() == before


def test_what_another_run_wrote_is_refused(llm: LLM, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    run_batch(llm, source, target, DEFAULTS)
    before = target.read_bytes()
    other = LLM(helpers.save(tmp_path / "other", helpers.bigram_model({})))
    with pytest.raises(DataError, match="another model"):
        run_batch(other, source, target, DEFAULTS)
    with pytest.raises(DataError, match="another defaults"):
        run_batch(llm, source, target, SamplingParams(max_tokens=5))
    with pytest.raises(DataError, match="another input"):
        run_batch(llm, write(source, LINES[1:]), target, DEFAULTS)
    write(source, LINES)
    for broken, told in ((b"{}\n", "line 1: not an answer"), (b'{"id": 9}\n', "not the answers to")):
        target.write_bytes(broken)
        with pytest.raises(DataError, match=told):
            run_batch(llm, source, target, DEFAULTS)
    target.write_bytes(before)
    target.with_name("out.jsonl.job.json").unlink()
    with pytest.raises(DataError, match="missing"):
        run_batch(llm, source, target, DEFAULTS)
    assert target.read_bytes() == before
    with target.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(GristmillError, match="another process"):
            run_batch(llm, source, target, DEFAULTS)


def test_what_cannot_be_run_is_refused(llm: LLM, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    for defaults, in_flight in ((SamplingParams(n=2), 1), (SamplingParams(logprobs=1), 1), (DEFAULTS, 0)):
        with pytest.raises(RequestError):
            run_batch(llm, source, target, defaults, in_flight=in_flight)
    with pytest.raises(DataError, match="cannot be read"):
        run_batch(llm, tmp_path / "none.jsonl", target, DEFAULTS)
    assert not target.exists()


def test_the_command(llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    words = ["batch", str(source), str(target), llm.model_name, "--temperature", "0", "--max_tokens", "4"]
    assert cli.main(words) == 0
    assert "6 lines" in capsys.readouterr().out
    assert len(read(target)) == 6
    write(source, [*LINES, "oops"])
    target.unlink()
    assert cli.main(words) == 1
    captured = capsys.readouterr()
    assert "1 with an error" in captured.out
    assert "lines: 7/7" in captured.err

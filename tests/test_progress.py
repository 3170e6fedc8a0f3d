"""Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io
import sys
import time

import pytest

from gristmill.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands until it is set."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_pipe_gets_few_lines_and_always_the_last(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("cleaning", 100) as advance:
        for count in range(1, 101):
            clock[0] = count * 1.0
            advance(count, note="loss 2.0")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "cleaning: 15/100, 85 s left loss 2.0"
    assert lines[-1] == "cleaning: 100/100, 0 s left loss 2.0"
    assert len(lines) == 7


def test_the_time_left_does_not_count_what_was_done_before(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("training", 1000, done=900) as advance:
        clock[0] = 20.0
        advance(910)
    assert capsys.readouterr().err == "training: 910/1000, 180 s left\n"


def test_nothing_to_do_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    for total, done in ((0, 0), (5, 5)):
        with progress("x", total, done=done) as advance:
            advance(total)
    assert capsys.readouterr().out == "", "standard output is for results"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress("pretrain", 10, done=2) as advance:
        advance(10, "loss [1.5] 20 tok/s")
    shown = terminal.getvalue()
    assert "pretrain" in shown
    assert "20%" in shown
    assert "100%" in shown
    assert "20 tok/s" in shown


def test_an_error_ends_the_bar_and_shows_the_cursor_again(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(KeyboardInterrupt), progress("pretrain", 10):
        raise KeyboardInterrupt
    assert terminal.getvalue().rfind("\x1b[?25h") > terminal.getvalue().rfind("\x1b[?25l")


def test_more_than_was_foreseen_leaves_no_time_below_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("training", 10) as advance:
        advance(12)
    assert "12/10, 0 s left" in capsys.readouterr().err

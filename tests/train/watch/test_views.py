"""What is shown of a run, on TensorBoard and in the terminal, are the figures of metrics.jsonl."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gristmill.errors import MissingExtra
from gristmill.objectives.causal import CausalLM
from gristmill.train.callbacks import Callback, Run
from gristmill.train.loop import train
from gristmill.train.metrics import read_metrics
from gristmill.train.watch.live import LiveView, sparkline
from gristmill.train.watch.monitors import Alarms, Limit, WeightMonitor, flat
from gristmill.train.watch.tensorboard import TensorBoard
from train.toy import toy_config, toy_loader, toy_model


def run(directory: Path, *callbacks: Callback, **changes: Any) -> list[dict[str, Any]]:
    config = toy_config(**{"steps": 6, "checkpoint_every": 2, "validate_every": 3, **changes})
    bar = not any(isinstance(callback, LiveView) for callback in callbacks)  # a view takes its place
    options: dict[str, Any] = {"validation": toy_loader(8, seed=1), "callbacks": callbacks, "show_progress": bar}
    train(toy_model(), CausalLM(), toy_loader(), config, directory, **options)
    return read_metrics(directory / "metrics.jsonl")


class Killed(Callback):
    """Dies once, after step 5 was shown."""

    priority = -50

    def after_step(self, run: Run) -> None:
        if run.position.step == 5:
            raise RuntimeError("killed")


@pytest.mark.peer  # reads with tensorboard
def test_tensorboard_reads_back_every_number_of_a_run_that_was_killed(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def watchers() -> list[Callback]:
        return [TensorBoard(), WeightMonitor(every=2), Alarms([Limit("loss", above=0.0, meaning="high")])]

    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, *watchers(), Killed())
    records = run(tmp_path, *watchers())
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found: dict[tuple[str, int], list[float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            found.setdefault((tag, event.step), []).append(event.value)
    expected = {
        (name, record["step"]): value
        for record in records
        for name, value in flat({k: v for k, v in record.items() if k not in ("step", "seconds")})
    }
    assert set(found) == set(expected)
    assert ("gradient_norms/layers.0", 4) in found
    for key, values in found.items():
        assert values == pytest.approx([expected[key]], rel=1e-6), "one event each, the later attempt's"
    assert "alarms/text_summary" in events.Tags()["tensors"]


def test_a_missing_tensorboard_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtra, match=r"gristmill\[watch\]"):
        TensorBoard()


def test_without_a_terminal_there_are_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alarms = Alarms([Limit("loss", above=0.0)])
    records = run(tmp_path, LiveView(seconds_between_lines=0.0), alarms)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("1 of 6 steps", "6 of 6 steps"))]
    assert len(lines) == 2
    assert f"loss {records[-1]['loss']:.4f}" in lines[1]
    assert f"validation loss {records[-1]['validation_loss']:.4f}" in lines[1]
    assert "alarms 6" in lines[1]
    assert lines[1].endswith("left 0 s")


def test_a_terminal_gets_a_panel_and_its_cursor_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    view = LiveView(width=20)
    run(tmp_path, view, Alarms([Limit("loss", above=0.0)]))
    text = terminal.getvalue()
    assert "step 6, " in text
    assert "loss is " in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_the_panel_shows_speed_time_left_and_the_newest_alarms() -> None:
    view = LiveView(width=8)
    state = SimpleNamespace(
        world=SimpleNamespace(is_main=True),
        config=SimpleNamespace(steps=None, tokens=2000),
        position=SimpleNamespace(step=10, tokens=500),
        record={"loss": 2.5, "mfu": 0.42, "tokens_per_second": 12345.6, "alarms": [f"alarm {i}" for i in range(7)]},
    )
    view.after_step(state)  # type: ignore[arg-type]
    view._began -= 10.0
    console = Console(file=io.StringIO(), width=100)
    console.print(view.panel(state))  # type: ignore[arg-type]
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("step 10, 500 tokens", "loss 2.5000", "mfu 42.0%", "12,346", "25.0 %", "alarm 6", "alarm 2"):
        assert part in text
    assert "alarm 1" not in text


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=60), st.integers(1, 20))
def test_a_sparkline_has_a_bar_for_each_stretch(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == min(len(values), width)
    assert set(line) <= set("▁▂▃▄▅▆▇█")
    if len(values) <= width and max(values) > min(values):
        assert line[values.index(max(values))] == "█"
        assert line[values.index(min(values))] == "▁"

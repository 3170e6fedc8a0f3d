"""A run at a glance in the terminal: losses, speed, time left, alarms; a line now and then where there is none."""

from __future__ import annotations

import atexit
import itertools
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gristmill.train.callbacks import Callback, Run

if TYPE_CHECKING:
    from rich.panel import Panel

_BARS = "▁▂▃▄▅▆▇█"


class LiveView(Callback):
    """Shows the run on stderr: a panel that is drawn anew on a terminal, else a line every `seconds_between_lines`.

    Comes after all monitors. Use it in the place of the loop's own bar.
    """

    priority = -20

    def __init__(self, *, width: int = 48, seconds_between_lines: float = 15.0) -> None:
        self.width, self.seconds_between_lines = width, seconds_between_lines
        self._losses: list[float] = []
        self._alarms: dict[str, int] = {}
        self._shown: dict[str, Any] = {}
        self._live: Any = None
        self._began = self._last_line = 0.0
        self._done_before = 0.0

    def start(self, run: Run) -> None:
        """Take over the terminal, if there is one."""
        self._began = self._last_line = time.monotonic()
        self._done_before = _progress(run)[0]
        if run.world.is_main and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), refresh_per_second=4)
            self._live.start()
            atexit.register(self._live.stop)  # a run that fails gives the cursor back as well

    def after_step(self, run: Run) -> None:
        """Draw the step."""
        if not run.world.is_main:
            return
        if (loss := run.record.get("loss")) is not None:
            self._losses.append(loss)
        self._shown |= {name: value for name, value in run.record.items() if isinstance(value, int | float)}
        self._alarms |= dict.fromkeys(run.record.get("alarms", []), run.position.step)
        if self._live is not None:
            self._live.update(self.panel(run))
            return
        now, (done, total) = time.monotonic(), _progress(run)
        if now - self._last_line >= self.seconds_between_lines or done >= total:
            self._last_line = now
            print(self.line(run), file=sys.stderr, flush=True)

    def end(self, run: Run) -> None:
        """Leave the last panel where it is."""
        if self._live is not None:
            self._live.stop()
            atexit.unregister(self._live.stop)
            self._live = None

    def line(self, run: Run) -> str:
        """The state in one line."""
        done, total = _progress(run)
        unit = "steps" if run.config.steps is not None else "tokens"
        parts = [f"{done:,.0f} of {total:,.0f} {unit}", *(f"{name} {text}" for name, text in self._figures())]
        if self._alarms:
            parts.append(f"alarms {len(self._alarms)}")
        return ", ".join([*parts, f"left {_duration(self._left(run))}"])

    def panel(self, run: Run) -> Panel:
        """The state as a panel; what a run has not got is left out."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        done, total = _progress(run)
        lines = [
            Text(sparkline(self._losses, self.width)),
            Text("   ".join(f"{name} {text}" for name, text in self._figures())),
            Text(f"{100 * done / max(total, 1):.1f} %   left {_duration(self._left(run))}"),
        ]
        newest = sorted(self._alarms.items(), key=lambda item: item[1])[-5:]
        lines += [Text(f"step {step}: {alarm}", style="bold red") for alarm, step in newest]
        return Panel(Group(*lines), title=f"step {run.position.step:,}, {run.position.tokens:,} tokens")

    def _figures(self) -> list[tuple[str, str]]:
        shown = self._shown
        formats = {
            "loss": "{:.4f}",
            "validation_loss": "{:.4f}",
            "gradient_norm": "{:.3g}",
            "learning_rate": "{:.2e}",
            "tokens_per_second": "{:,.0f}",
            "mfu": "{:.1%}",
        }
        return [(name.replace("_", " "), form.format(shown[name])) for name, form in formats.items() if name in shown]

    def _left(self, run: Run) -> float:
        """Seconds to go, at the mean pace of this attempt."""
        done, total = _progress(run)
        return (time.monotonic() - self._began) / max(done - self._done_before, 1) * max(total - done, 0)


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as `width` bars at most, each the mean of its stretch, between the lowest and the highest."""
    if not values:
        return ""
    edges = [round(place * len(values) / width) for place in range(width + 1)] if len(values) > width else None
    if edges is not None:
        values = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(values), max(values)
    span = high - low or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in values)


def _progress(run: Run) -> tuple[float, float]:
    """How much is done, and of how much."""
    if run.config.steps is not None:
        return run.position.step, run.config.steps
    return run.position.tokens, run.config.tokens or 0


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"

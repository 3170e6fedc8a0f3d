"""Stop when the training loss has converged.

Source: Prechelt 1998, section 2.1 (progress over a strip of training).
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from gristmill.errors import CheckpointError, GristmillError
from gristmill.train.callbacks import Callback, Run


class Convergence(Callback):
    """Ends the run when the mean loss of the last `window` steps is less than `share` of it below that of the `window`
    steps before. Skipped steps do not count; a resumed run decides the same, and one that was stopped stays stopped.

    Raises GristmillError for a window below 1 or a share below 0.
    """

    def __init__(self, window: int = 100, share: float = 0.001) -> None:
        if window < 1:
            raise GristmillError(f"window must be at least 1 step, got {window}")
        if not share >= 0.0:
            raise GristmillError(f"share must be 0 or more, got {share}")
        self.window, self.share = window, share
        self._losses: deque[float] = deque(maxlen=2 * window)

    def start(self, run: Run) -> None:
        """Go no further where an earlier attempt was stopped."""
        self._stop_if_due(run)

    def after_step(self, run: Run) -> None:
        """Count the step's loss."""
        if "skipped" not in run.record:
            self._losses.append(run.record["loss"])
            self._stop_if_due(run)

    def state(self) -> dict[str, Any]:
        """The losses of both windows."""
        return {"losses": list(self._losses)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError for a state of another kind."""
        if not isinstance(losses := state.get("losses"), list):
            raise CheckpointError("convergence: its state lacks a list of losses")
        self._losses = deque(losses, maxlen=2 * self.window)

    def _stop_if_due(self, run: Run) -> None:
        if len(self._losses) < 2 * self.window:
            return
        losses = list(self._losses)
        before, now = (math.fsum(part) / self.window for part in (losses[: self.window], losses[self.window :]))
        if before - now < self.share * abs(now):
            run.stop(f"the loss has converged: {now:.4g}, {before:.4g} over the {self.window} steps before")

"""Named settings against degenerate text, and the rate that measures it.

Sources: Holtzman et al. 2020 (repetition and the nucleus); Welleck et al. 2020, section 3 (seq-rep-n).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gristmill.core import SamplingParams
from gristmill.errors import RequestError, closest

PRESETS: dict[str, dict[str, Any]] = {
    "precise": {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1},
    "balanced": {"temperature": 0.85, "top_p": 0.92, "repetition_penalty": 1.15},
    "creative": {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.2, "no_repeat_ngram_size": 4},
}
"""From facts and code, which repeat themselves rightly, to stories. All are sampled: greedy text repeats most."""


def preset(name: str, **changes: Any) -> SamplingParams:
    """Sampling parameters by name, with changes. Raises RequestError for an unknown name or a bad change."""
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise RequestError(f"unknown preset {name!r} (known: {known}).{closest(name, PRESETS)}", field="preset")
    return SamplingParams.from_dict({**PRESETS[name], **changes})


def repetition_rate(ids: Sequence[int], size: int = 4) -> float:
    """Share of runs of `size` tokens that were there before: 0 for none, towards 1 for a loop."""
    runs = [tuple(ids[at : at + size]) for at in range(len(ids) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0

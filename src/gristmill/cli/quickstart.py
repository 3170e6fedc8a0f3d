"""gristmill quickstart: from raw text to a chat model and a report."""

import sys

from gristmill.quickstart.config import QuickstartConfig as Config
from gristmill.quickstart.pipeline import commands, quickstart
from gristmill.quickstart.stages import Quickstart

__all__ = ["Config", "run"]


def run(config: Config) -> int:
    """Run the quickstart and tell what to do next. Returns 0."""
    try:
        report = quickstart(config)
    except KeyboardInterrupt:
        print(f"\nStopped. The same command goes on from here ({config.directory}).", file=sys.stderr)
        return 130
    print(f"\n{report.name}: {report.seconds / 60:.1f} minutes")
    for result in report.results:
        if result.headline:
            scale, unit = (100, " %") if result.unit == "%" else (1, result.unit)
            error = f"{result.value * scale:.3g} ± {result.standard_error * scale:.2g}{unit}"
            print(f"  {result.name}, {result.system}: {error} (n = {result.samples})")
    for verdict in report.verdicts:
        print(f"  {verdict}")
    print(f"\nReport: {config.directory / 'report.html'}")
    for purpose, command in commands(Quickstart(config)):
        print(f"To {purpose}:\n  {command}")
    return 0

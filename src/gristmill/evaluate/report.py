"""The report of a run: `report.md` and a self-contained `report.html`, from one plain `RunReport`."""

from pathlib import Path

from gristmill.evaluate.report_html import html
from gristmill.evaluate.report_markdown import markdown
from gristmill.evaluate.run_report import Confusion, Curve, FunnelRow, Result, RunReport, Sample, Series, Stage, Table
from gristmill.files import write_text

__all__ = [
    "Confusion",
    "Curve",
    "FunnelRow",
    "Result",
    "RunReport",
    "Sample",
    "Series",
    "Stage",
    "Table",
    "write_report",
]


def write_report(report: RunReport, directory: Path) -> None:
    """Write both files, each atomically; neither is touched when one of them cannot be made.

    Raises MissingExtra where matplotlib is needed and missing, GristmillError where the folder cannot be written.
    """
    page, text = html(report), markdown(report)
    write_text(directory / "report.html", page)
    write_text(directory / "report.md", text)

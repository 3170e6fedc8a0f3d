"""Charts of a run report as SVG text that takes its colours and font from the page around it.

matplotlib is given placeholder colours, which are then replaced by CSS variables: one drawing serves light and dark.
The page defines --ink, --muted, --grid and --series-1 to --series-4.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from gristmill.errors import DataError, MissingExtra
from gristmill.evaluate.formatting import count
from gristmill.evaluate.run_report import Curve, FunnelRow, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#010101", "#020202", "#030303"
SERIES = ("#0a0101", "#0a0202", "#0a0303", "#0a0404")
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"} | {
    colour: f"--series-{index}" for index, colour in enumerate(SERIES, start=1)
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign is a dollar sign
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
# Narrow drawings keep their letters readable on a phone; a wide page sets two side by side.
_WIDTH = 4.7


def curve_svg(curve: Curve) -> str:
    """Values over tokens or sizes, with the learning rate, if any, in a low strip under them. Raises MissingExtra."""
    if len(curve.series) > len(SERIES):
        raise DataError(f"{curve.title}: a chart takes at most {len(SERIES)} series, got {len(curve.series)}")
    return _draw(curve.title, 3.0, lambda figure: _paint_curve(figure, curve))


def funnel_svg(rows: Sequence[FunnelRow]) -> str:
    """Documents left after each step, as horizontal bars. Raises MissingExtra."""
    return _draw("Documents left after each step", 0.4 + 0.3 * len(rows), lambda figure: _paint_funnel(figure, rows))


def chance_svg(name: str, results: Sequence[Result]) -> str:
    """Accuracies of several systems as bars with two standard errors, against chance. Raises MissingExtra."""
    title = f"{name}: share of right answers with two standard errors"
    return _draw(title, 2.7, lambda figure: _paint_chance(figure, results))


def _paint_curve(figure: Figure, curve: Curve) -> None:
    rate = curve.learning_rate
    panels = figure.subplots(2 if rate else 1, 1, sharex=True, squeeze=False, height_ratios=[4, 1] if rate else [1])
    losses, bottom = panels[0, 0], panels[-1, 0]
    for colour, series in zip(SERIES, curve.series, strict=False):
        # A series of few points is an evaluation: show where they are.
        few = len(series.values) <= 40
        marks: dict[str, Any] = {"marker": "o", "ms": 3, "lw": 1.8} if few else {"lw": 1.1}
        losses.plot(series.tokens, series.values, color=colour, label=_wrapped(series.name), **marks)
        if series.band is not None:
            losses.fill_between(series.tokens, *series.band, color=colour, alpha=0.2, lw=0)
    losses.set_ylabel(curve.y_label)
    losses.grid(axis="y")
    few = all(len(series.values) <= 40 for series in curve.series)  # with many points "best" takes its time
    losses.legend(loc="best" if curve.logarithmic or few else "upper right")
    if curve.logarithmic:
        _make_logarithmic(losses, curve.logarithmic)
    if rate:
        highest = max(value for value in rate.values if math.isfinite(value))
        bottom.plot(rate.tokens, rate.values, color=MUTED, lw=1.2)
        bottom.set_ylabel("rate")
        bottom.set_ylim(0, 1.1 * highest or 1)
        bottom.set_yticks([0, highest], ["0", f"{highest:.1e}"])
    bottom.set_xlabel(curve.x_label)
    bottom.xaxis.set_major_formatter(lambda value, _: count(value, trim=True))


def _make_logarithmic(axes: Axes, which: Literal["x", "xy"]) -> None:
    """Logarithmic axes with plain numbers: a law of losses spans less than a power of ten."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    if which == "xy":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _paint_funnel(figure: Figure, rows: Sequence[FunnelRow]) -> None:
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [row.documents for row in rows], color=SERIES[0], height=0.62)
    most = max(row.documents for row in rows) or 1
    for place, row in enumerate(rows):
        axes.text(row.documents + 0.015 * most, place, f"{row.documents:,}", va="center")
    axes.set_yticks(places, [_wrapped(row.step) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * most)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelcolor=INK)


def _paint_chance(figure: Figure, results: Sequence[Result]) -> None:
    axes = figure.subplots()
    tops = [100 * (result.value + 2 * result.standard_error) for result in results]
    levels = [("chance", results[0].chance, "--"), ("majority class", results[0].majority, ":")]
    highest = max([1.0, *tops, *(100 * level for _, level, _ in levels if level is not None)])
    room = 0.12 * highest
    for place, (result, top) in enumerate(zip(results, tops, strict=True)):
        axes.bar(place, 100 * result.value, color=SERIES[place % len(SERIES)], width=0.55)
        axes.errorbar(place, 100 * result.value, yerr=200 * result.standard_error, color=INK, capsize=5, lw=1.2)
        axes.text(place, top + 0.2 * room, f"{100 * result.value:.1f} %", ha="center")
    for label, level, dashes in levels:
        if level is not None:
            axes.axhline(100 * level, color=MUTED, lw=1.4, ls=dashes, label=f"{label} {100 * level:.1f} %")
    axes.set_xticks(range(len(results)), [_wrapped(result.system or result.name) for result in results])
    axes.set_xlim(-0.6, len(results) - 0.4)
    axes.set_ylim(0, highest + room)
    axes.set_ylabel("correct, %")
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    figure.legend(loc="outside upper right", ncols=2)


def _draw(title: str, height: float, paint: Callable[[Figure], None]) -> str:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "evaluate") from error
    buffer = io.StringIO()
    # A fixed salt and no date: the same run gives the same file.
    salt = re.sub(r"\W+", "-", title.lower())
    with rc_context(_STYLE | {"svg.hashsalt": salt}):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        paint(figure)
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(["Creator", "Date", "Format", "Type"]))
    return _for_page(buffer.getvalue(), title, salt)


def _for_page(svg: str, title: str, salt: str) -> str:
    """The bare <svg> element, with the page's colours and font and with names that are unique in the page."""

    def tag(match: re.Match[str]) -> str:
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{salt}-", match.group())
        text = re.sub(r"font: [^;\"]*?([\d.]+)px[^;\"]*", r"font-size: \1px", text)
        text = re.sub(r"font-family: [^;\"]*; ?", "", text)
        for colour, variable in _VARIABLES.items():
            text = text.replace(colour, f"var({variable})")
        return text

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    # Only the tags: letters between them are the run's own.
    svg = re.sub(r"<[^>]+>", tag, svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def _wrapped(text: str) -> str:
    """A label that leaves room for the drawing."""
    return textwrap.fill(text, width=24)

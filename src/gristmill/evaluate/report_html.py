"""A run report as one HTML file: no scripts, nothing loaded from elsewhere, everything escaped."""

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gristmill.evaluate.charts import chance_svg, curve_svg, funnel_svg
from gristmill.evaluate.formatting import count, dropped, duration, figure, flops, memory, percent
from gristmill.evaluate.run_report import RunReport


def html(report: RunReport) -> str:
    """The page. Raises MissingExtra where there is a chart to draw and no matplotlib."""
    environment = Environment(
        loader=PackageLoader("gristmill.evaluate", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Markup marks what charts.py wrote; all else in the page is escaped.
    return environment.get_template("report.html.jinja").render(
        report=report,
        headline=[result for result in report.results if result.headline],
        curves=[(curve, Markup(curve_svg(curve))) for curve in report.curves],
        chances=[(name, Markup(chance_svg(name, results))) for name, results in report.chance_charts.items()],
        funnel=list(zip(report.funnel, dropped(report.funnel), strict=True)),
        funnel_svg=Markup(funnel_svg(report.funnel)) if report.funnel else "",
        count=count,
        duration=duration,
        figure=figure,
        flops=flops,
        memory=memory,
        percent=percent,
    )

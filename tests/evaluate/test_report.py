"""The report shows every figure with its error, escapes all text and loads nothing from elsewhere."""

import dataclasses
import html as html_library
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gristmill.errors import DataError, GristmillError, MissingExtra
from gristmill.evaluate.formatting import count, duration, flops, memory, with_error
from gristmill.evaluate.report import (
    Confusion,
    Curve,
    FunnelRow,
    Result,
    RunReport,
    Sample,
    Series,
    Stage,
    write_report,
)

NASTY = "<script>alert('x')</script> & \"quoted\" | a *star* $x^2$ ```fence``` #010101"


def run_report() -> RunReport:
    """A run as the quickstart leaves it, with made-up figures."""
    steps = [20_000 * i for i in range(1, 301)]
    loss = [2.9 + 6.1 * math.exp(-i / 22) + 0.09 * math.sin(i * 1.7) * math.cos(i * 0.37) for i in range(300)]
    rate = [6e-4 * min(1, (i + 1) / 20) * 0.5 * (1 + math.cos(math.pi * i / 300)) for i in range(300)]
    held_x, held_y = steps[19::20], [3.02 + 5.9 * math.exp(-i / 22) for i in range(19, 300, 20)]
    tuning = [6_000 * i for i in range(1, 121)]
    tuning_loss = [0.42 + 2.2 * math.exp(-i / 12) + 0.06 * math.sin(i * 2.3) for i in range(120)]
    labels = ["biology", "geography", "history", "people", "sport"]
    counts = [[61, 4, 6, 5, 1], [3, 74, 9, 3, 2], [5, 8, 52, 11, 0], [4, 2, 10, 93, 6], [0, 1, 2, 7, 41]]
    topic = {"unit": "%", "chance": 0.2, "majority": 0.287, "task": "3fa9c2d81b07"}
    held = {"unit": "bits/byte", "task": "9be2107744ac", "note": "1,003 documents, end of text not scored"}
    return RunReport(
        name="Quickstart, preset tiny",
        summary="A decoder of 6.3 M parameters, trained on Wikipedia summaries and tuned on questions made from them.",
        stages=[
            Stage("corpus", 8.4, peak_memory_bytes=610_000_000),
            Stage("tokenizer", 3.1, peak_memory_bytes=655_000_000),
            Stage("pretraining", 356.0, 6_000_000, 2.4e14, 1_930_000_000),
            Stage("fine-tuning", 94.2, 720_000, 2.9e13, 1_720_000_000),
            Stage("evaluation", 61.0, 1_400_000, 1.8e13, 1_410_000_000),
        ],
        curves=[
            Curve(
                "Pretraining",
                [Series("train", steps, loss), Series("held-out", held_x, held_y)],
                learning_rate=Series("rate", steps, rate),
                hint="Both lines fall and stay close. A held-out line that turns up means the model memorises.",
            ),
            Curve(
                "Fine-tuning",
                [
                    Series("train", tuning, tuning_loss),
                    Series("held-out", tuning[11::12], [0.03 + v for v in tuning_loss[11::12]]),
                ],
                learning_rate=Series("rate", tuning, rate[:120]),
                hint="The loss counts answers only, so it starts lower than in pretraining.",
            ),
        ],
        funnel=[
            FunnelRow("raw", 10_033, 6_500_000),
            FunnelRow("cleaned", 9_981, 6_430_000, "52 without a sentence"),
            FunnelRow("exact duplicates out", 9_877, 6_370_000),
            FunnelRow("near duplicates out", 9_402, 6_010_000, "MinHash, Jaccard of 0.8 or more"),
        ],
        results=[
            Result("Held-out text", 2.1437, 0.0121, 1003, system="base", headline=True, **held),
            Result("Held-out text", 2.2213, 0.0128, 1003, system="fine-tuned", **held),
            Result("Perplexity", 19.83, 0.41, 1003, system="base", note="per token, vocabulary of 4,096"),
            Result("Topic questions", 0.263, 0.0218, 410, system="base", **topic),
            Result("Topic questions", 0.783, 0.0204, 410, system="fine-tuned", headline=True, **topic),
        ],
        verdicts=[
            "Topic questions: fine-tuned is better than base (+0.5200 ± 0.0279, z = 18.6, 410 samples).",
            "Topic questions: fine-tuned is better than chance (+0.5830 ± 0.0204, z = 28.6, 410 samples).",
        ],
        confusion=Confusion(labels, counts, "fine-tuned"),
        samples=[
            Sample(
                "Which topic is the article about? The Danube is the second-longest river in Europe.",
                {"base": "The Danube is a river in the river of the river", "fine-tuned": "geography"},
                "geography",
            ),
            Sample("Who was Ada Lovelace?", {"base": NASTY, "fine-tuned": "An English mathematician\nand writer."}),
        ],
        provenance={
            "seed": "0",
            "config hash": "5f1c7c0dd0b7a7b6d9b3fd0d3a5b6cfd6a0d8b8f0f4f2e1b7d6b5a4c3b2a1908",
            "git revision": "0a1b2c3d4e5f60718293a4b5c6d7e8f901234567 (modified)",
            "torch": "2.13.0",
            "machine": "Example CPU 9000, 2 cores, Linux x86_64",
            "corpus": "wikipedia-summaries 0.0.7, CC BY-SA 4.0",
            "date": "2026-01-02 03:04 UTC",
        },
        commands=[
            ("Talk to it in the terminal", "gristmill chat runs/quickstart"),
            ("Serve it over HTTP, with a chat page", "gristmill serve runs/quickstart --port 8000"),
        ],
    )


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags close in order."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    directory = tmp_path_factory.mktemp("run")
    write_report(run_report(), directory)
    assert sorted(path.name for path in directory.iterdir()) == ["report.html", "report.md"]
    page = (directory / "report.html").read_text(encoding="utf-8")
    return page, (directory / "report.md").read_text(encoding="utf-8")


def test_the_page_loads_and_runs_nothing(written: tuple[str, str]) -> None:
    page = Page(written[0])
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "srcset", "action")
        if name in ("href", "xlink:href"):
            assert value is not None
            assert value.startswith("#")
    assert "@import" not in written[0]
    assert re.findall(r"url\((?!#)", written[0]) == []


def test_ids_of_the_page_are_unique_and_references_find_them(written: tuple[str, str]) -> None:
    page = Page(written[0])
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    references = {value[1:] for name, value in page.attributes if name == "xlink:href" and value}
    references |= set(re.findall(r"url\(#([^)]+)\)", written[0]))
    assert references
    assert references <= set(ids)


def test_all_text_is_escaped_and_still_there(written: tuple[str, str]) -> None:
    page, text = written
    assert NASTY in Page(page).text
    assert html_library.escape(NASTY, quote=False).replace('"', "&#34;").replace("'", "&#39;") in page
    assert NASTY in text
    fence = re.search(r"^(`{3,})text\n" + re.escape(NASTY) + r"\n\1$", text, flags=re.MULTILINE)
    assert fence is not None
    assert len(fence.group(1)) > 3


@pytest.mark.parametrize("place", [0, 1], ids=["html", "markdown"])
def test_every_figure_stands_with_its_standard_error(written: tuple[str, str], place: int) -> None:
    text = Page(written[0]).text if place == 0 else written[1].replace("\\", "")
    for figure in ["2.144 ± 0.012 bits/byte", "19.83 ± 0.41", "26.3 % ± 2.2", "78.3 % ± 2.0", "20.0 %"]:
        assert figure in text
    for row in ["10,033", "475 (4.8 %)", "5 min 56 s", "16.9 k", "240 TFLOP", "1.80 GiB", "CC BY-SA 4.0"]:
        assert row in text
    for sentence in [*run_report().verdicts, "gristmill chat runs/quickstart", "3fa9c2d81b07"]:
        assert sentence in text


def test_charts_take_their_colours_from_the_page(written: tuple[str, str]) -> None:
    page = Page(written[0])
    assert page.tags.count("svg") == 4
    styles = " ".join(value or "" for name, value in page.attributes if name == "style")
    assert "var(--series-2)" in styles
    assert "var(--ink)" in styles
    assert re.findall(r"#[0-9a-fA-F]{6}", styles) == []
    assert "prefers-color-scheme: dark" in written[0]


def test_markdown_tables_keep_their_columns(written: tuple[str, str]) -> None:
    tables = re.findall(r"(?:^\|.*\|$\n?)+", written[1], flags=re.MULTILINE)
    assert len(tables) == 7
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.strip().split("\n")}) == 1


def test_the_same_run_gives_the_same_files(written: tuple[str, str], tmp_path: Path) -> None:
    write_report(run_report(), tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == written[0]
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == written[1]


def test_an_almost_empty_report_is_still_a_page(tmp_path: Path) -> None:
    write_report(RunReport(name="Nothing <yet>"), tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Nothing <yet>" in page.text
    assert "section" not in page.tags
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == "# Nothing \\<yet\\>\n"


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(RunReport) if field.name != "name"])
def test_any_single_part_makes_a_report(tmp_path: Path, field: str) -> None:
    write_report(RunReport(name="One part", **{field: getattr(run_report(), field)}), tmp_path)
    Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_labels_cannot_break_out_of_a_chart(tmp_path: Path) -> None:
    curve = Curve(NASTY, [Series(NASTY, [1.0, 2.0], [3.0, math.nan])], hint=NASTY)
    bar = Result(NASTY, 0.5, 0.1, 10, system=NASTY, chance=0.6)
    write_report(RunReport(NASTY, curves=[curve], funnel=[FunnelRow(NASTY, 0)], results=[bar]), tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    # Title and heading, two cells of results, one of the funnel, two figures' headings and a caption.
    assert page.text.count(NASTY) == 8
    # The line's, the bar's and the step's names once more in the charts, where they are wrapped.
    assert page.text.count("#010101") == page.text.count("$x^2$ ```fence```") == 8 + 3


def test_without_matplotlib_the_message_is_the_mend_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"gristmill\[evaluate\]"):
        write_report(run_report(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(GristmillError, match=r"report\.html"):
        write_report(RunReport(name="x"), tmp_path)


@pytest.mark.parametrize(
    "broken",
    [
        lambda: Result("x", math.nan, 0.1, 10),
        lambda: Result("x", 0.5, math.inf, 10),
        lambda: Result("x", 0.5, -0.1, 10),
        lambda: Result("x", 50.0, 0.1, 10, chance=0.2),
        lambda: Series("x", [1.0], [1.0, 2.0]),
        lambda: Series("x", [], []),
        lambda: Series("x", [1.0], [math.nan]),
        lambda: Confusion(["a", "b"], [[1, 2]]),
    ],
)
def test_what_is_no_figure_is_refused(broken: object) -> None:
    with pytest.raises(DataError):
        broken()  # type: ignore[operator]


def test_too_many_lines_for_one_chart_are_refused(tmp_path: Path) -> None:
    lines = [Series(str(i), [1.0], [1.0]) for i in range(5)]
    with pytest.raises(DataError, match="at most 4"):
        write_report(RunReport("x", curves=[Curve("many", lines)]), tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (with_error(2.14371, 0.0121, "bits/byte"), "2.144 ± 0.012 bits/byte"),
        (with_error(0.5, 0.0), "0.500 ± 0.000"),
        (with_error(1234.5, 37.2), "1234 ± 37"),
        (with_error(0.783, 0.0204, "%"), "78.3 % ± 2.0"),
        (count(None), ""),
        (count(999), "999"),
        (count(999_600), "1.00 M"),
        (count(12_345), "12.3 k"),
        (count(4_500_000, trim=True), "4.5 M"),
        (count(6_000_000, trim=True), "6 M"),
        (count(200_000, trim=True), "200 k"),
        (flops(2.4e14), "240 TFLOP"),
        (flops(12), "12 FLOP"),
        (memory(1_930_000_000), "1.80 GiB"),
        (memory(0), "0 B"),
        (duration(0.44), "0.4 s"),
        (duration(59.6), "1 min 00 s"),
        (duration(3599.7), "1 h 00 min"),
        (duration(7500), "2 h 05 min"),
    ],
)
def test_figures_read_well(text: str, expected: str) -> None:
    assert text == expected


if __name__ == "__main__":
    write_report(run_report(), Path(sys.argv[1]))

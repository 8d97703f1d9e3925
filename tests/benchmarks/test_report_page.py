"""report.html: one file, no other host, the same tables and values as the Markdown and the plot."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bbt_accel.benchmarks import compare_report
from bbt_accel.benchmarks.compare_report import CompareReport, Score
from bbt_accel.benchmarks.sweep import rendering
from bbt_accel.benchmarks.sweep.grid import Sweep
from bbt_accel.benchmarks.sweep.report import ScoreCell, SweepReport, SweepRow, TrialRow
from bbt_accel.io.report_page import hover, report_page
from bbt_accel.io.reporting import PLOT, figure, write_report

NEEDS_ANOTHER_FILE = {
    "img",
    "link",
    "iframe",
    "object",
    "embed",
    "base",
    "image",
    "audio",
    "video",
    "source",
}


class Page(HTMLParser):
    """The tags of a page, its table cells by row, and the values of its marks."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.in_cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.rows[-1][-1] += data

    @property
    def values(self) -> list[str]:
        return [value for _, found in self.tags if (value := found.get("data-hover"))]

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.tags if name == tag]


def comparison() -> tuple[CompareReport, str, Callable[[Path], None]]:
    def score(contender: str, calls: int, value: float, budget: int | None = None) -> Score:
        facts: dict[str, Any] = {
            "task": "demo",
            "metric": "accuracy",
            "seed": 42,
            "peak_mib": None,
            "chosen": None,
        }
        return Score(
            contender=contender, budget=budget, calls=calls, score=value, seconds=1.0, **facts
        )

    scores = [score("words", 1, 0.5), score("auto", 281, 0.75, 300), score("auto", 61, 0.625, 64)]
    report = compare_report.make_report(
        scores, {"bbt": "<script>alert(1)</script>"}, {"command": "bbt-accel compare"}
    )
    return report, compare_report.markdown(report), lambda file: compare_report.draw(file, report)


def a_sweep() -> tuple[SweepReport, str, Callable[[Path], None]]:
    cell = ScoreCell(
        task="demo", metric="accuracy", seeds=[1, 2], scores=[0.5, 0.75], mean=0.625, std=0.1768,
        without_prompt=0.25,
        batch_calibrated=0.375, failed=0,
    )  # fmt: skip
    row = SweepRow(
        method="bbt",
        bundle="b",
        engine="ort",
        cells=[cell],
        mean=0.625,
        without_prompt=0.25,
        batch_calibrated=0.375,
    )
    plan = Sweep(tasks=["demo"], bundles=["b"], seeds=[1, 2])
    facts: dict[str, Any] = {"task": "demo", "bundle": "b", "engine": "ort", "status": "done"}
    trials = [TrialRow(name="t", seed=1, curve=[(20, 0.25), (1020, 0.5)], **facts)]
    report = SweepReport(interrupted=False, sweep=plan, rows=[row], trials=trials, versions={})
    return report, rendering.markdown(report), lambda file: rendering.draw(file, report)


@pytest.fixture(scope="module", params=[comparison, a_sweep])
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Page, str, str]:
    """The page of a report, its source, and the report's Markdown."""
    folder = tmp_path_factory.mktemp("report")
    report, markdown, draw = request.param()
    write_report(folder, report, markdown, draw)
    assert sorted(file.name for file in folder.iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
        PLOT,
    ]
    text = (folder / "report.html").read_text(encoding="utf-8")
    return Page(text), text, markdown


def test_a_sweeps_page_has_the_dev_scores_of_each_search(tmp_path: Path) -> None:
    report, markdown, draw = a_sweep()
    write_report(tmp_path, report, markdown, draw)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    for value in (
        "demo, b, ort, seed 1, 20 calls: 25.00",
        "demo, b, ort, seed 1, 1,020 calls: 50.00",
    ):
        assert value in page.values


def test_a_full_disk_at_the_plot_keeps_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, markdown, _ = a_sweep()

    def full(file: Path) -> None:
        file.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    write_report(tmp_path, report, markdown, full)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.json", "report.md"]
    assert "could not be written (No space left on device)" in capsys.readouterr().err


def test_a_page_asks_for_nothing(written: tuple[Page, str, str]) -> None:
    page, text, _ = written
    assert not NEEDS_ANOTHER_FILE & {name for name, _ in page.tags}
    for name, found in page.tags:
        assert "src" not in found, name
        assert (found.get("href") or "#").startswith("#"), name
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", text)
    (policy,) = [
        found["content"]
        for found in page.of("meta")
        if found.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_a_page_has_every_cell_of_the_markdown(written: tuple[Page, str, str]) -> None:
    page, _, markdown = written
    lines = [line for line in markdown.splitlines() if line.startswith("| ") and "---" not in line]
    wanted = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    assert page.rows == wanted


def test_a_page_can_be_read_aloud_and_by_keyboard(written: tuple[Page, str, str]) -> None:
    page, _, _ = written
    assert page.of("html")[0]["lang"] == "en"
    regions = [found for found in page.of("div") if found.get("role") == "region"]
    assert len(regions) == len(page.of("table"))
    assert len({found["aria-label"] for found in regions}) == len(regions)
    assert all(found["tabindex"] == "0" for found in regions)
    (plot,) = [found for found in page.of("span") if found.get("role") == "img"]
    assert plot["aria-label"]
    assert len(page.of("svg")) == len(page.of("h1")) == len(page.of("main")) == 1


def test_the_plot_shows_values_and_takes_the_colours_of_the_page(
    written: tuple[Page, str, str],
) -> None:
    page, text, _ = written
    assert len(page.values) >= 3
    assert "var(--ink)" in text
    assert not re.search(r'style="[^"]*(#000000|#ffffff)', text)


def test_marks_have_the_values_of_their_points(tmp_path: Path) -> None:
    report, markdown, draw = comparison()
    write_report(tmp_path, report, markdown, draw)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    across = [float(str(found["x"])) for _, found in page.tags if found.get("data-hover")]
    assert len(set(across)) == 3
    shown = [value for _, value in sorted(zip(across, page.values, strict=True))]
    assert shown == [
        "words: 50.0 %, calls 1",
        "auto 64: 62.5 %, calls 61",
        "auto 300: 75.0 %, calls 281",
    ]


def test_text_of_a_report_is_no_markup(tmp_path: Path) -> None:
    report, markdown, draw = comparison()
    write_report(tmp_path, report, markdown, draw)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(Page(text).of("script")) == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_a_page_without_a_plot_has_its_caption_alone() -> None:
    page = Page(
        report_page("# Title\n\n![A plot](report.png)\n\n| a | b |\n| --- | ---: |\n| x | 1 |\n")
    )
    assert not page.of("svg")
    assert page.rows == [["a", "b"], ["x", "1"]]


def test_equal_plots_are_equal_files_and_values_may_hold_any_text(tmp_path: Path) -> None:
    value = "a \"quoted\" <b> & 'c' ±"
    for name in ("one.svg", "two.svg"):
        with figure(tmp_path / name, 3, 2) as (_, axes):
            hover(axes.bar([0], [1])[0], [value])
    plot = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert plot == (tmp_path / "two.svg").read_text(encoding="utf-8")
    page = Page(report_page("# T\n\n![A](report.png)", plot, "report.png"))
    assert page.values == [value]

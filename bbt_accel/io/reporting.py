"""Reports: their schema, numbers and tables in Markdown, plots, and the folder that holds them
all.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from bbt_accel.io.files import write_atomically
from bbt_accel.io.progress import note
from bbt_accel.io.report_page import report_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

JSON, TABLE, PLOT, PAGE = "report.json", "report.md", "report.png", "report.html"
METRICS = {"accuracy": "accuracy", "f1": "F1"}  # as they are written
GREY, BLUE, ORANGE, RED, GREEN = "#7f7f7f", "#0072b2", "#e69f00", "#d55e00", "#009e73"
PALETTE = (
    BLUE,
    RED,
    GREEN,
    "#cc79a7",
    ORANGE,
    "#56b4e9",
    "#000000",
)  # Okabe and Ito: distinct to the colour-blind
MARKERS = "oDs^vPX*"


class Schema(BaseModel):
    """Base of reports and of options: every field has a description, and no other field is
    allowed.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


def write_report(
    folder: Path, report: Schema, markdown: str, draw: Callable[[Path], None] | None = None
) -> None:
    """Write report.json, report.md, report.html and, with `draw`, report.png, each in one step.

    draw: writes the plot in the format of the file's suffix, .png or .svg. What was measured is
    worth more than its
    pictures: where the disk is full there may be no page and no plot; a warning is printed.
    """
    write_atomically(folder / JSON, report.model_dump_json(indent=1).encode() + b"\n")
    write_atomically(folder / TABLE, markdown.encode())
    image, inline = folder / f".{PLOT}", folder / ".report.svg"
    try:
        plot = None
        if draw is not None:
            draw(image)
            image.replace(folder / PLOT)
            draw(inline)
            plot = inline.read_text(encoding="utf-8")
        write_atomically(folder / PAGE, report_page(markdown, plot, PLOT).encode())
    except OSError as error:
        note(
            f"{folder} lacks its page or its plot, which could not be written "
            f"({error.strerror or error})"
        )
    finally:
        image.unlink(missing_ok=True)
        inline.unlink(missing_ok=True)


def now() -> str:
    """The time, UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def digits(value: float | None) -> str:
    """Three significant digits without an exponent; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(value: float | None, decimals: int = 2) -> str:
    """A share in percent, without the sign; a dash for None."""
    return "–" if value is None else f"{100 * value:.{decimals}f}"


def mean_if_complete(values: Sequence[float | None]) -> float | None:
    """The mean; None where one is missing, or all."""
    found = [value for value in values if value is not None]
    return fmean(found) if found and len(found) == len(values) else None


def mean_and_std(values: Sequence[float], decimals: int = 2, form: str = "{} ({})") -> str:
    """The mean of shares in percent, and the standard deviation of several; a dash for none."""
    if len(values) < 2:
        return percent(values[0] if values else None, decimals)
    return form.format(percent(fmean(values), decimals), percent(stdev(values), decimals))


def with_metric(task: str, metric: str, separator: str = " ") -> str:
    """A task, and its metric unless that is the accuracy."""
    return task if metric == "accuracy" else f"{task}{separator}({METRICS[metric]})"


def plain(value: object) -> str:
    """A value for a reader: four significant digits, lists and mappings with commas."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain(entry)}" for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    return str(value)


def markdown_table(
    header: Sequence[str], lines: Iterable[Sequence[str]], text_columns: int = 1
) -> str:
    """A Markdown table whose first columns hold text, the others numbers."""
    lines = [[cell(value) for value in line] for line in lines]
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *lines])


def cell(text: str) -> str:
    """A text in a cell of a table."""
    return text.replace("\n", "\\n").replace("|", "\\|")


def markdown_list(facts: Mapping[str, object]) -> str:
    """A Markdown list of names and values; empty values are left out."""
    return "\n".join(
        f"- **{name}:** {plain(value)}"
        for name, value in facts.items()
        if value not in (None, "", {})
    )


@contextmanager
def figure(file: Path, width: float, height: float, **layout: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure and its axes (`layout` goes to `Figure.subplots`), written to a .png or .svg when
    the block ends.
    """
    # Not pyplot: it would pick a window system, and keep the figure.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(drawn)
    yield drawn, drawn.subplots(**layout)
    kind = file.suffix[1:]
    nothing = {"png": ["Software"], "svg": ["Creator", "Date"]}[
        kind
    ]  # so that equal figures are equal files
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "bbt-accel"}):
        drawn.savefig(file, format=kind, metadata=dict.fromkeys(nothing))


def tidy(axes: Axes, grid: str = "both") -> None:
    """A light grid behind the data, and no frame above and on the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, alpha=0.25)  # type: ignore[arg-type]

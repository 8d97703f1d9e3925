"""The report of the load test: what report.json holds, and the same as Markdown and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from bbt_accel.benchmarks.markdown import digits
from bbt_accel.display import markdown_table, text

MEDIAN, TAIL = "#0072b2", "#e69f00"


class Measured(BaseModel):
    """One kind of request from so many clients at once."""

    model_config = ConfigDict(extra="forbid")
    what: str
    clients: int
    requests: int
    """Answered within the time, those to warm up left out."""
    errors: int
    """Clients that ended with an error."""
    per_second: float
    """Requests answered a second, by all clients together."""
    ms_median: float
    ms_p90: float
    ms_p99: float
    ms_max: float
    kib_sent: float
    """Body of one request."""


class Load(BaseModel):
    """report.json."""

    model_config = ConfigDict(extra="forbid")
    created: str
    command: str
    bundle: str
    engine: str
    threads: int | None
    rows: int
    length: int
    popsize: int
    seconds: float
    machine: dict[str, Any]
    versions: dict[str, str]
    measured: list[Measured]


def load_markdown(report: Load) -> str:
    header = ["request", "clients", "requests", "errors", "a second", "ms", "p90", "p99", "max", "KiB sent"]
    lines = [
        [m.what, str(m.clients), str(m.requests), str(m.errors)]
        + [digits(value) for value in (m.per_second, m.ms_median, m.ms_p90, m.ms_p99, m.ms_max, m.kib_sent)]
        for m in report.measured
    ]
    threads = "as many threads as it takes" if report.threads is None else f"{report.threads} thread(s)"
    facts = [
        f"- **Population:** {report.popsize} candidates, {report.rows} rows of {report.length} tokens; backbone "
        f"{report.bundle}, engine {report.engine}, {threads}",
        f"- **Clients:** threads of one process on the same machine, each sends again when it is answered; "
        f"{report.seconds:g} seconds a row",
        f"- **Machine:** {report.machine['cpu']}, {report.machine['cores']} cores",
        f"- **Command:** `{report.command}`, {report.created}",
        f"- **Versions:** {text(report.versions)}",
    ]
    table, plot = markdown_table(header, lines), "![Latency and rate by clients](report.png)"
    return "\n".join(["# Load test of bbt-accel serve", "", table, "", plot, "", *facts, ""])


def draw_load(file: Path, report: Load) -> None:
    """Write a PNG: time of a request (median to 99th percentile) and requests a second, by clients."""
    # Not pyplot: it would pick a window system, and keep the figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = [w for w in ("population", "texts") if any(m.what == w for m in report.measured)]
    figure = Figure(figsize=(9, 3.2 * len(kinds)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for row, what in zip(figure.subplots(len(kinds), 2, squeeze=False), kinds, strict=True):
        found = [m for m in report.measured if m.what == what]
        clients = [m.clients for m in found]
        row[0].plot(clients, [m.ms_median for m in found], "o-", color=MEDIAN, label="median")
        row[0].plot(clients, [m.ms_p99 for m in found], "s--", color=TAIL, label="99th percentile")
        alone = next((m for m in report.measured if m.what == f"{what}, no server"), None)
        if alone is not None:
            row[0].axhline(alone.ms_median, color="grey", linewidth=0.9, linestyle=":", label="median without a server")
            row[1].axhline(alone.per_second, color="grey", linewidth=0.9, linestyle=":")
        row[0].set_ylabel("ms a request")
        row[0].set_title(f"Time of a request: {what}", fontsize=10, loc="left")
        row[0].legend(frameon=False, fontsize=9)
        row[1].plot(clients, [m.per_second for m in found], "o-", color=MEDIAN)
        row[1].set_ylabel("requests a second")
        row[1].set_title(f"Rate: {what}", fontsize=10, loc="left")
        for axes in row:
            axes.set_ylim(0, 1.1 * max(max(line.get_ydata()) for line in axes.get_lines()))
            axes.set_xlabel("clients at once")
            axes.set_xticks(clients)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Software": None})

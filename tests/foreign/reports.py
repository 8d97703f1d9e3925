"""Pages of reports as the commands write them: of a recorded comparison, a recorded bench, and a
sweep.
"""

from __future__ import annotations

from pathlib import Path

from test_report_page import a_sweep

from bbt_accel.benchmarks import compare_report
from bbt_accel.benchmarks.bench_report import BenchReport
from bbt_accel.benchmarks.compare_report import CompareReport
from bbt_accel.io.reporting import write_report

RECORDED = Path(__file__).parents[2] / "benchmarks" / "results"


def write_reports(folder: Path) -> list[str]:
    """Write a folder for each; returns their names."""

    def place(name: str) -> Path:
        (folder / name).mkdir(parents=True)
        return folder / name

    def recorded(name: str) -> str:
        return (RECORDED / name / "report.json").read_text(encoding="utf-8")

    found = CompareReport.model_validate_json(recorded("accuracy"))
    write_report(
        place("compare"),
        found,
        compare_report.markdown(found),
        lambda file: compare_report.draw(file, found),
    )
    bench = BenchReport.model_validate_json(recorded("smollm2-135m"))
    write_report(place("bench"), bench, bench.markdown(), bench.draw)
    write_report(place("sweep"), *a_sweep())
    return sorted(own.name for own in folder.iterdir())

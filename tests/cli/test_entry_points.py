"""Engines and families of installed packages that are broken: noted, and no command stops."""

from __future__ import annotations

from pathlib import Path

import pytest

from bbt_accel.core.engine_specs import ENGINES, EngineSpec
from bbt_accel.core.plugins import with_plugins

MODULE = """
from bbt_accel.core.engine_specs import EngineSpec
TAKEN, NEW = EngineSpec("ort", {}), EngineSpec("new", {})
"""


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("no_such:ENGINE", "cannot be loaded and is ignored: No module named 'no_such'"),
        ("json:dumps", "is no EngineSpec and is ignored"),
        ("brokenplugin:TAKEN", "is ignored: there is another ort"),
    ],
)
def test_a_broken_one_is_noted_and_left_out(
    value: str,
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    info = tmp_path / "brokenplugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: brokenplugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[group]\nx = {value}\nnew = brokenplugin:NEW\n")
    (tmp_path / "brokenplugin.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    found = with_plugins(ENGINES, "group", EngineSpec, "name")
    assert list(found) == [*(spec.name for spec in ENGINES), "new"]
    assert capsys.readouterr().err == f"{value} (group) {problem}\n"

"""Engines and families of installed packages that are broken: noted, and no command stops."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from bbt_accel.core import plugins
from bbt_accel.core.engine_specs import ENGINES, EngineSpec
from bbt_accel.core.plugins import with_plugins


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (
            "no_such_package:ENGINE",
            "cannot be loaded and is ignored: No module named 'no_such_package'",
        ),
        ("json:dumps", "is no EngineSpec and is ignored"),
        ("bbt_accel.core.engine_specs:TAKEN", "is ignored: there is another ort"),
    ],
)
def test_a_broken_one_is_noted_and_left_out(
    value: str, problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bbt_accel.core.engine_specs.TAKEN", EngineSpec("ort", {}), raising=False)
    monkeypatch.setattr("bbt_accel.core.engine_specs.NEW", EngineSpec("new", {}), raising=False)
    entries = [
        EntryPoint("x", value, "g"),
        EntryPoint("new", "bbt_accel.core.engine_specs:NEW", "g"),
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda **given: entries)
    found: dict[str, Any] = with_plugins(ENGINES, "g", EngineSpec, "name")
    assert list(found) == [*(spec.name for spec in ENGINES), "new"]
    assert capsys.readouterr().err == f"{value} (g) {problem}\n"

"""Rules of the code base that no linter knows: short functions, and families that are known in one
place alone.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    file
    for folder in ("bbt_accel", "exporters", "engines", "benchmarks")
    for file in (ROOT / folder).rglob("*.py")
)
LONGEST = 60


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_no_function_is_longer_than_a_screen(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            and node.end_lineno is not None
        ):
            assert node.end_lineno - node.lineno < LONGEST, node.name


def test_no_code_outside_a_familys_own_file_names_it() -> None:
    pytest.importorskip("torch")
    from bbt_accel.exporters.families.registry import families

    owners = {
        f"exporters/{spec.backbone.__module__.rpartition('.')[2]}.py"
        for spec in families().values()
    }
    for file in SOURCES:
        if name_of(file) not in owners:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            constants = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
            assert not constants & set(families()), file

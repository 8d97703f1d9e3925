"""What a reader of the code must hold in the head, counted. A ceiling may only fall: whoever has
to raise one says why in the commit.
"""

from __future__ import annotations

import ast
import re
import tokenize
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("bbt_accel", "exporters", "engines", "benchmarks")
CODE = {
    ".".join(("bbt_accel", *file.relative_to(ROOT).with_suffix("").parts))
    .replace("bbt_accel.bbt_accel", "bbt_accel")
    .removesuffix(".__init__"): file
    for folder in FOLDERS
    for file in sorted((ROOT / folder).rglob("*.py"))
}
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# ARCHITECTURE.md lists the folders in the order in which data passes through them.
FOLDERS_IN_ORDER = re.findall(
    r"^\| `([\w/]+)/` \|", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), re.M
)
ORDER = ["errors", *FOLDERS_IN_ORDER, "__main__"]

TOKENS = 177_300
LINES = 28_350
TEST_LINES = 22_000
OPTIONS = 139
MOST_OPTIONS = 26
PARAMETERS = 8
FUNCTIONS_WITH_MORE_PARAMETERS = 9
DEPENDENCIES = 18
PATCHED_NAMES = 162


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def lines(files: list[Path]) -> int:
    return sum(file.read_text(encoding="utf-8").count("\n") for file in files)


def tokens(file: Path) -> int:
    """Of the code, without comments and docstrings."""
    docstrings = {
        node.body[0].lineno
        for node in ast.walk(parse(file))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node, clean=False) is not None
    }
    layout = {
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.COMMENT,
        tokenize.ENCODING,
        tokenize.ENDMARKER,
    }
    with file.open("rb") as stream:
        return sum(
            token.type not in layout
            and not (token.type == tokenize.STRING and token.start[0] in docstrings)
            for token in tokenize.tokenize(stream.readline)
        )


def imports(module: str) -> set[str]:
    """Modules of this project that `module` imports anywhere, in functions and for type checking
    too.
    """
    found = set()
    for node in ast.walk(parse(CODE[module])):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(CODE) - {module, "bbt_accel"}


# bbt_accel/__init__.py names everything public, and loads it on first use.
IMPORTS = {module: imports(module) for module in CODE if module != "bbt_accel"}


def place(module: str) -> int:
    """Where the folder of a module lies in `ORDER`: the deepest folder that is listed."""
    path = str(CODE[module].relative_to(ROOT).with_suffix("")).removeprefix("bbt_accel/")
    names = [folder.removeprefix("bbt_accel/") for folder in ORDER]
    return max(
        rank for rank, name in enumerate(names) if path == name or path.startswith(f"{name}/")
    )


def test_every_folder_is_described_in_the_architecture() -> None:
    folders = {str(file.parent.relative_to(ROOT)) for file in CODE.values()}
    assert set(FOLDERS_IN_ORDER) <= folders
    undescribed = folders - set(FOLDERS_IN_ORDER) - {"bbt_accel", "exporters"}
    assert {
        folder
        for folder in undescribed
        if not any(folder.startswith(f"{described}/") for described in FOLDERS_IN_ORDER)
    } == set()


def test_the_top_of_the_package_holds_three_modules() -> None:
    assert {file.name for file in (ROOT / "bbt_accel").glob("*.py")} == {
        "__init__.py",
        "__main__.py",
        "errors.py",
    }


def test_a_folder_imports_only_from_those_before_it() -> None:
    upward = [
        (module, name)
        for module, names in IMPORTS.items()
        for name in sorted(names)
        if place(name) > place(module)
    ]
    assert upward == []


def test_no_module_imports_itself_through_others() -> None:
    TopologicalSorter(IMPORTS).prepare()


def test_the_code_grows_no_further() -> None:
    assert sum(map(tokens, CODE.values())) <= TOKENS
    assert lines(list(CODE.values())) <= LINES


def test_the_tests_grow_no_further() -> None:
    assert lines(TESTS) <= TEST_LINES
    patched = [re.findall(r"monkeypatch\.setattr", f.read_text(encoding="utf-8")) for f in TESTS]
    assert sum(map(len, patched)) <= PATCHED_NAMES


def test_a_function_takes_few_parameters_or_a_settings_object() -> None:
    counted = [
        f"{module}.{function.name}"
        for module, file in CODE.items()
        for function in functions(parse(file))
        if len(function.args.posonlyargs + function.args.args + function.args.kwonlyargs)
        > PARAMETERS
    ]
    assert len(counted) <= FUNCTIONS_WITH_MORE_PARAMETERS, counted


def test_the_base_install_needs_few_packages() -> None:
    assert len(PROJECT["project"]["dependencies"]) <= DEPENDENCIES


def test_the_options_of_the_command_line_fit_in_a_head() -> None:
    """Every option that a user can give but --help, hidden ones and those of the program too. The
    commands are classes (bbt_accel/cli/base.py), so that none has too many parameters.
    """
    from typer.main import get_command

    from bbt_accel.cli.commands import app

    program: Any = get_command(app)
    counts = {
        name: len([p for p in command.params if p.param_type_name == "option"])
        for name, command in {"": program, **program.commands}.items()
    }
    assert sum(counts.values()) <= OPTIONS, counts
    assert max(counts.values()) <= MOST_OPTIONS, counts


def test_no_code_outside_a_familys_own_file_names_it() -> None:
    pytest.importorskip("torch")
    from bbt_accel.exporters.families.registry import families

    owners = {spec.backbone.__module__ for spec in families().values()}
    for module in CODE.keys() - owners:
        constants = {
            node.value for node in ast.walk(parse(CODE[module])) if isinstance(node, ast.Constant)
        }
        assert not constants & set(families()), module

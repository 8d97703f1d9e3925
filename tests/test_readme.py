"""README.md and CONTRIBUTING.md say what the program has: its tables, commands, options, files and task example."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import Export

from bbt_accel.cli import app
from bbt_accel.engine_specs import ENGINES, engine_names
from bbt_accel.tasks import load_task, task_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
cli: Any = typer.main.get_command(app)
COMMANDS = cli.commands


def table(first: str) -> list[dict[str, str]]:
    """The rows of the table whose first column has this header, by column."""
    start = README.index(f"\n| {first} |") + 1
    lines = README[start:].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def commands(text: str) -> list[str]:
    """Every `bbt-accel ...` of a document, in code blocks and in lines of text."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(bbt-accel [^`]+)`", text)
    return [line.removeprefix(".venv/bin/") for line in lines if re.match(r"(\.venv/bin/)?bbt-accel ", line)]


def options(command: str) -> set[str]:
    return {name for parameter in COMMANDS[command].params for name in parameter.opts} | {"--help", "--debug"}


@pytest.mark.parametrize("line", sorted(set(commands(README) + commands(CONTRIBUTING))))
def test_commands_and_their_options_exist(line: str) -> None:
    words = shlex.split(line)[1:]
    if words[0].startswith("-"):
        assert words[0] in {name for parameter in cli.params for name in parameter.opts} | {"--help"}
        return
    assert words[0] in COMMANDS
    assert {word for word in words[1:] if re.match("--?[a-z]", word)} <= options(words[0])


def test_every_command_has_a_section_with_an_example() -> None:
    for name in COMMANDS:
        section = README.split(f"### {name}: ")[1].split("\n#")[0]
        assert any(line.startswith(f"bbt-accel {name}") for line in commands(section))


def test_options_named_alone_exist() -> None:
    text = README.split("## Coming from")[0]
    known = set().union(*map(options, COMMANDS), *(parameter.opts for parameter in cli.params))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) <= known


def test_options_that_replace_those_of_the_original_exist() -> None:
    for row in table("original"):
        for command, names in re.findall(r"`(\w+)((?: --?[\w-]+)+)", row["here"]):
            assert {name for name in names.split() if name.startswith("-")} <= options(command), row["here"]
    same = next(row["original"] for row in table("original") if "same names" in row["here"])
    assert {name.replace("_", "-") for name in re.findall(r"--\w+", same)} <= options("tune")


def test_table_of_families() -> None:
    pytest.importorskip("torch")
    from tiny_backbones import BACKBONES, RELATIVES, VARIANTS

    from bbt_accel.exporters.families import FAMILIES

    rows = table("`model_type`")
    assert {row["`model_type`"]: row["class"] for row in rows} == {s.model_type: s.class_name for s in FAMILIES}
    of_class = {spec.class_name: spec.model_type for spec in FAMILIES}
    tested = {(of_class[BACKBONES[name][1]], method, mode) for name, method, mode in VARIANTS + RELATIVES}
    for row in rows:
        for method, mode in (("bbt", "add"), ("bbt", "cat"), ("bbtv2", "add")):
            wanted = "yes" if (row["`model_type`"], method, mode) in tested else "untested"
            assert row[f"{method}, {mode}"] == wanted, row
        assert {name for name in engine_names() if row.get(name) == "yes"} == set(engine_names()) - {"remote"}, row


def test_table_of_engines() -> None:
    rows = {row["`--engine`"]: row for row in table("`--engine`")}
    assert set(rows) == set(engine_names())
    for spec in ENGINES:
        if spec.internal or spec.name == "remote":  # which runs whatever its server runs
            continue
        row = rows[spec.name]
        assert row["optimized for it"] == ", ".join(spec.optimized)
        assert row["bundles as exported"] == ("yes" if "onnx" in spec.reads else "no")
        assert row["devices"] == ", ".join(spec.backends)
        assert row["extra"] == next(iter(spec.backends.values())).extra


def test_table_of_extras() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    rows = {row["extra"].strip("`"): row["brings"] for row in table("extra")}
    assert set(rows) == set(extras) - {"test", "dev"}
    for name, brings in rows.items():
        assert set(brings.split(", ")) == {re.split("[>=;]", need)[0] for need in extras[name]}, name


def test_optimizations_and_tasks_are_named() -> None:
    from bbt_accel.optimizations import OPTIMIZATIONS

    assert {row["optimization"].strip("`") for row in table("optimization")} == set(OPTIMIZATIONS)
    listed = re.search(r"Built-in tasks: ([\w, ]+) \(", README)
    assert listed is not None
    assert {*listed[1].split(", "), "demo"} == set(task_names())


def test_task_example_loads(tmp_path: Path) -> None:
    example = re.findall(r"^```toml\n(.*?)^```", README, re.M | re.S)
    tickets = next(text for text in example if 'name = "tickets"' in text)
    (tmp_path / "tickets.toml").write_text(tickets, encoding="utf-8")
    task = load_task(tmp_path / "tickets.toml")
    assert (task.n_classes, task.text) == (3, ["subject", "body"])
    for group in ("masked", "span", "causal"):
        assert len(task.words(group)) == 3  # type: ignore[arg-type]


def test_sweep_example_is_the_command_above_it(tmp_path: Path) -> None:
    from bbt_accel.sweeps.grid import read_sweep

    section = README.split("### sweep: ")[1]
    (tmp_path / "sweep.toml").write_text(re.findall(r"^```toml\n(.*?)^```", section, re.M | re.S)[0], encoding="utf-8")
    found, words = read_sweep(tmp_path / "sweep.toml", {}), shlex.split(commands(section)[0])
    for option, values in (("--bundles", found.bundles), ("--tasks", found.tasks), ("--seeds", found.seeds)):
        assert words[words.index(option) + 1] == ",".join(map(str, values))
    assert found.settings == {"budget": int(words[words.index("--budget") + 1])}


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_files_named_exist(text: str) -> None:
    named = re.findall(r"`((?:exporters|engines|bbt_accel|tests|benchmarks)/[\w/.]+\.py)`", text)
    named += re.findall(r"\]\(([\w/.]+)\)", text)
    assert named
    for name in named:
        assert "NAME" in name or (ROOT / name).exists(), name


@pytest.mark.slow
@pytest.mark.parametrize("file", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda f: f.name)
def test_python_blocks_run_as_printed(
    file: Path, tiny: Export, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, as a reader would; but with a tiny backbone in place of the demo's, and few calls."""
    pytest.importorskip("onnxruntime")
    from bbt_accel import bundle_cache
    from bbt_accel.exporters import export

    tiny("roberta")
    best = {"engine": "ort", "device": "cpu", "precision": "fp32", "reason": ""}
    monkeypatch.setattr(bundle_cache, "diagnose", lambda: {"recommended": best})
    monkeypatch.setattr(export, "BACKBONE", shared / "roberta")
    monkeypatch.setenv("BBT_ACCEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", file.read_text(encoding="utf-8"), re.M | re.S):
        exec(compile(re.sub(r"(budget\W+)\d+", r"\g<1>21", block), file.name, "exec"), names)

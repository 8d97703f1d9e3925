"""README.md, docs/ and CONTRIBUTING.md say what the program has: tables, commands, options, files,
links, examples.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import typer
from conftest import Export

from bbt_accel.cli.base import COMMANDS as CLASSES
from bbt_accel.cli.commands import app
from bbt_accel.core.engine_specs import ENGINES, engine_names
from bbt_accel.tasks.task import load_task, task_names

ROOT = Path(__file__).parents[2]
START = ROOT / "README.md"
PAGES = {file: file.read_text() for file in [START, *sorted((ROOT / "docs").rglob("*.md"))]}
PAGES_FOR_CONTRIBUTORS = ("CONTRIBUTING.md", "ARCHITECTURE.md")
CONTRIBUTING = {ROOT / name: (ROOT / name).read_text() for name in PAGES_FOR_CONTRIBUTORS}
OTHER_PROGRAMS = re.compile(r"^(python3?|pip|npm|docker|curl) .*", re.M)
cli: Any = typer.main.get_command(app)
COMMANDS = cli.commands


def table(first: str) -> list[dict[str, str]]:
    """The rows of the one table whose first column has this header, by column."""
    (found,) = [part for page in PAGES.values() for part in page.split(f"\n| {first} |")[1:]]
    lines = f"| {first} |{found}".split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def blocks(text: str, language: str = r"\w*") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def section(title: str) -> str:
    """The one section of this title, of all pages."""
    parts = [part for page in PAGES.values() for part in re.split("^#+ ", page, flags=re.M)]
    (found,) = [part for part in parts if part.startswith(title)]
    return found


def commands(text: str) -> list[str]:
    """Every `bbt-accel ...` of a document, in code blocks and in lines of text."""
    lines = [line for block in blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(bbt-accel [^`]+)`", text)
    lines = [line.removeprefix(".venv/bin/") for line in lines]
    return [line for line in lines if line.startswith("bbt-accel ")]


def options(command: Any) -> set[str]:
    """Of the program, or of a command."""
    return {"--help", "--debug", *(name for option in command.params for name in option.opts)}


def rows_of(title: str) -> dict[str, dict[str, str]]:
    """The rows of a table by its first column."""
    return {row[title].strip("`"): row for row in table(title)}


@pytest.mark.parametrize(
    "line", sorted({line for page in (PAGES | CONTRIBUTING).values() for line in commands(page)})
)
def test_commands_and_their_options_exist(line: str) -> None:
    words = shlex.split(line)[1:]
    given = {word for word in words if re.match("--?[a-z]", word)}
    assert given <= options(cli if words[0].startswith("-") else COMMANDS[words[0]])
    settings = [words[at + 1].split("=")[0] for at, word in enumerate(words) if word == "--set"]
    assert not settings or {*settings} <= {*CLASSES[words[0]].without_option()}  # type: ignore[attr-defined]


def test_every_command_has_a_section_with_an_example() -> None:
    for name in COMMANDS:
        assert any(line.startswith(f"bbt-accel {name}") for line in commands(section(f"{name}: ")))


def test_options_named_alone_exist() -> None:
    known = set().union(*map(options, [cli, *COMMANDS.values()]))
    for file, text in PAGES.items():
        if file.name != "from-black-box-tuning.md":  # which names those of the original
            named = re.findall(r"(?<![\w-])--[a-z][\w-]+", OTHER_PROGRAMS.sub("", text))
            assert {*named} <= known, file


def test_options_that_replace_those_of_the_original_exist() -> None:
    for row in table("original"):
        for command, names in re.findall(r"`(\w+)((?: --?[\w-]+)+)", row["here"]):
            given = {name for name in names.split() if name.startswith("-")}
            assert given <= options(COMMANDS[command]), row["here"]
    same = next(row["original"] for row in table("original") if "same names" in row["here"])
    names = {name.replace("_", "-") for name in re.findall(r"--\w+", same)}
    assert names <= options(COMMANDS["tune"])


def test_table_of_families() -> None:
    pytest.importorskip("torch")
    from tiny_backbones import BACKBONES, RELATIVES, VARIANTS

    from bbt_accel.exporters.families.registry import FAMILIES

    rows = rows_of("`model_type`")
    of_family = {spec.model_type: spec.class_name for spec in FAMILIES}
    assert {name: row["class"] for name, row in rows.items()} == of_family
    of_class = {spec.class_name: spec.model_type for spec in FAMILIES}
    tested = {
        (of_class[BACKBONES[name][1]], method, mode) for name, method, mode in VARIANTS + RELATIVES
    }
    for name, row in rows.items():
        for method, mode in (("bbt", "add"), ("bbt", "cat"), ("bbtv2", "add")):
            wanted = "yes" if (name, method, mode) in tested else "untested"
            assert row[f"{method}, {mode}"] == wanted, row
        runs = {engine for engine in engine_names() if row.get(engine) == "yes"}
        assert runs == {*engine_names()} - {"remote"}, row


def test_table_of_engines() -> None:
    rows = rows_of("`--engine`")
    assert set(rows) == set(engine_names())
    for spec in ENGINES:
        if spec.internal or spec.remote:  # which runs whatever its server runs
            continue
        row = rows[spec.name]
        assert row["optimized for it"] == ", ".join(spec.optimized)
        assert row["bundles as exported"] == ("yes" if "onnx" in spec.reads else "no")
        assert row["devices"] == ", ".join(spec.backends)
        assert row["extra"] == next(iter(spec.backends.values())).extra


def test_table_of_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras, rows = project["optional-dependencies"], rows_of("extra")
    assert rows.keys() == extras.keys() - {"docs", "test", "dev"}
    for name, row in rows.items():
        needs = {re.split("[>=;]", need)[0] for need in extras[name]}
        assert {*row["brings"].split(", ")} == needs, name


def test_optimizations_and_tasks_are_named() -> None:
    from bbt_accel.core.optimizations import OPTIMIZATIONS

    described = rows_of("optimization")
    assert described.keys() == OPTIMIZATIONS.keys()
    for name, optimization in OPTIMIZATIONS.items():
        assert described[name][""].endswith(optimization.what)
    (listed,) = re.findall(r"Built-in tasks: ([\w, ]+) \(", "".join(PAGES.values()))
    assert {*listed.split(", "), "demo"} == set(task_names())


def test_the_start_page_is_short_and_names_every_backbone_and_engine() -> None:
    assert len(PAGES[START].splitlines()) <= 250
    pytest.importorskip("torch")
    from bbt_accel.exporters.families.registry import FAMILIES

    lines = re.findall(r"^\| ([\w -]+) \| ([\w, -]+) \|$", PAGES[START], re.M)
    found = {title: set(names.split(", ")) for title, names in lines}
    for architecture in ("encoder", "encoder-decoder", "decoder"):
        known = {s.model_type for s in FAMILIES if s.architecture == architecture}
        assert found[f"{architecture}s"] == known
    for title, device in (("engines on a CPU", "cpu"), ("engines on an NVIDIA GPU", "cuda")):
        local = [spec for spec in ENGINES if not spec.internal and not spec.remote]
        assert found[title] == {spec.name for spec in local if device in spec.backends}


def tickets() -> str:
    """The example of a task file."""
    files = [text for page in PAGES.values() for text in blocks(page, "toml")]
    (found,) = [text for text in files if 'name = "tickets"' in text]
    return found


def test_task_example_loads(tmp_path: Path) -> None:
    (tmp_path / "tickets.toml").write_text(tickets())
    task = load_task(tmp_path / "tickets.toml")
    assert (task.n_classes, task.text) == (3, ["subject", "body"])
    for group in ("masked", "span", "causal"):
        assert len(task.words(group)) == 3  # type: ignore[arg-type]


def test_the_schema_of_a_task_takes_every_example_and_refuses_a_misspelled_key() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    from bbt_accel.tasks.task import FOLDER, Task

    schema = jsonschema.Draft202012Validator(Task.model_json_schema())
    written = [file.read_text() for file in FOLDER.glob("*.toml")]
    for text in [*written, tickets()]:
        task = tomllib.loads(text)
        assert schema.is_valid(task), task["name"]
        assert not schema.is_valid({**task, "metrik": "f1"})
        del task["templates"]
        assert not schema.is_valid(task)


@pytest.mark.parametrize(
    "name", re.findall(r"generated: fields (\S+)", PAGES[ROOT / "docs/reference/files.md"])
)
def test_every_field_of_a_file_is_described(name: str) -> None:
    schema = resolve_name(name).model_json_schema()
    fields = [
        (field, about.get("description"))
        for model in (schema, *schema.get("$defs", {}).values())
        for field, about in model.get("properties", {}).items()
    ]
    assert fields
    assert [field for field, description in fields if not description] == []


def test_sweep_example_is_the_command_above_it(tmp_path: Path) -> None:
    from bbt_accel.benchmarks.sweep.grid import read_sweep

    text = section("sweep: ")
    (tmp_path / "sweep.toml").write_text(blocks(text, "toml")[0])
    found, words = read_sweep(tmp_path / "sweep.toml", {}), shlex.split(commands(text)[0])
    for name in ("bundles", "tasks", "seeds"):
        assert words[words.index(f"--{name}") + 1] == ",".join(map(str, getattr(found, name)))
    settings = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
    assert settings == [f"{name}={value}" for name, value in found.settings.items()]


def test_files_named_exist() -> None:
    for file, text in (PAGES | CONTRIBUTING).items():
        folders = "exporters|engines|bbt_accel|tests|benchmarks"
        for name in re.findall(rf"`((?:{folders})/[\w/.]+\.py)`", text):
            assert "NAME" in name or (ROOT / name).exists(), (file, name)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site name them."""
    titles = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_links_lead_somewhere() -> None:
    found = 0
    for file, text in (PAGES | CONTRIBUTING).items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            name, _, anchor = target.partition("#")
            if re.match("[a-z]+:", target):
                continue
            there = (file.parent / name).resolve() if name else file
            assert there.exists(), (file, target)
            known = anchors(there.read_text()) if anchor else {""}
            assert anchor in known, (file, target)
            found += 1
    assert found > 50


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for file in [*PAGES, *(ROOT / "docs").rglob("*.ipynb")]:
        if file != START:
            page = file.relative_to(ROOT / "docs").with_suffix(".md").as_posix()
            assert f"{page}\n" in navigation, file


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", [file for file, text in PAGES.items() if blocks(text, "python")], ids=lambda f: f.name
)
def test_python_blocks_run_as_printed(
    file: Path, tiny: Export, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, as a reader would; but with a tiny backbone in place of the demo's, and
    few calls.
    """
    pytest.importorskip("onnxruntime")
    if file.name == "tutorial.md":
        pytest.skip("its blocks run when the site is built")
    from bbt_accel.engines.availability import Availability
    from bbt_accel.exporters.trace import export
    from bbt_accel.predict import bundle_cache

    tiny("roberta")
    best = {"engine": "ort", "device": "cpu", "precision": "fp32", "reason": ""}
    monkeypatch.setattr(bundle_cache, "availability", lambda: Availability({}, best))
    monkeypatch.setattr(export, "BACKBONE", shared / "roberta")
    monkeypatch.setenv("BBT_ACCEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks(PAGES[file], "python"):
        exec(compile(re.sub(r"(budget\W+)\d+", r"\g<1>21", block), file.name, "exec"), names)


def test_accuracies_are_those_of_the_recorded_reports() -> None:
    from bbt_accel.benchmarks.compare_report import CompareReport, summary

    folder = ROOT / "benchmarks" / "results" / "accuracy"
    recorded = summary(CompareReport.model_validate_json((folder / "report.json").read_bytes()))
    assert recorded in (folder / "report.md").read_text(encoding="utf-8")
    page = section("On the shipped backbone")
    shown = means(page[page.index("| | calls |") :])
    assert len(shown) > 10
    known = means(recorded)
    for row in shown:
        assert row in known


def means(text: str) -> list[dict[str, str]]:
    """The rows of the table at the start of a text: task → its score, without the deviation."""
    header, _, *rows = [line.strip("|").split("|") for line in text.split("\n\n")[0].splitlines()]
    tasks = [name.split()[0] if name.strip() else "" for name in header]
    found = [
        {task: cell.split()[0] for task, cell in zip(tasks, row, strict=True) if cell.strip()}
        for row in rows
    ]
    return [{task: row[task] for task in tasks if task in {*task_names(), "mean"}} for row in found]

"""MkDocs hooks: what the pages of the site take from the repository and from the program when they
are built.

Pages link to files as they lie in the repository, so that the links work there too. README.md is
the start page; the other files outside docs/ that pages link to are part of the site at their own
paths.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
START = "README.md"
MOUNTED = (
    START,
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE",
    "benchmarks/README.md",
    "benchmarks/results/**/*.md",
    "benchmarks/results/**/*.png",
    "examples/**/*.md",
    "bbt_accel/core/demo/**/*.md",
)
EXECUTED = "tutorial.md"
GENERATED = re.compile(r"<!-- generated: (\w+) ?(.*?) -->")


_tutorial: list[str] = []  # the page, after it was run
_names: dict[
    str, str
] = {}  # where a file outside docs/ lies in the site → its name in the repository


def on_files(files: Any, config: Any) -> Any:
    for pattern in MOUNTED:
        for file in sorted(ROOT.glob(pattern)):
            name = file.relative_to(ROOT).as_posix()
            files.append(File.generated(config, _in_site(name), abs_src_path=str(file)))
            _names[_in_site(name)] = name
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.environ.update(
        {"PATH": paths, "COLUMNS": "80", "HF_HUB_OFFLINE": "1"}
    )  # of what is run on the pages
    with ThreadPoolExecutor(2) as pool:
        notebooks = {
            file: pool.submit(_notebook, file) for file in sorted((ROOT / "docs").rglob("*.ipynb"))
        }
        _tutorial.append(_executed((ROOT / "docs" / EXECUTED).read_text(encoding="utf-8")))
    for file, page in notebooks.items():
        place = _in_site(file.relative_to(ROOT).as_posix())
        files.append(File.generated(config, place, content=page.result()))
    for page in (ROOT / "docs").rglob("*.md"):
        for kind, what in GENERATED.findall(page.read_text(encoding="utf-8")):
            if kind == "schema":
                name, file = what.split()
                place = (page.parent / file).relative_to(ROOT / "docs").as_posix()
                content = json.dumps(_model(name).model_json_schema(), indent=1) + "\n"
                files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    place = page.file.src_uri
    name = _names.get(place, f"docs/{place}")
    markdown = _tutorial.pop() if place == EXECUTED else markdown
    markdown = re.sub(
        r"(?<=\]\()[^)\s]+(?=\))", lambda found: _link(found[0], name, place), markdown
    )
    return GENERATED.sub(_generated, markdown)


def _in_site(name: str) -> str:
    """Where a file of the repository lies in the site; a notebook is a page."""
    return "index.md" if name == START else name.removeprefix("docs/").replace(".ipynb", ".md")


def _link(target: str, name: str, place: str) -> str:
    """A link of the file `name`, from the page at `place`."""
    if re.match(r"[a-z]+:|#", target):
        return target
    path, mark, anchor = target.partition("#")
    found = _in_site(posixpath.normpath(posixpath.join(posixpath.dirname(name), path)))
    return posixpath.relpath(found, posixpath.dirname(place) or ".") + mark + anchor


def _model(name: str) -> Any:
    module, model = name.split(":")
    return getattr(import_module(module), model)


def _generated(found: re.Match[str]) -> str:
    kind, what = found.groups()
    return {
        "commands": _commands,
        "settings": _settings,
        "fields": _fields,
        "schema": _schema,
        "api": _api,
    }[kind](what)


def _commands(_: str) -> str:
    """The commands as typer documents them, without its title."""
    import typer
    from typer.cli import get_docs_for_click

    from bbt_accel.cli.commands import app

    program = typer.main.get_command(app)
    pages = get_docs_for_click(obj=program, ctx=typer.Context(program), name="bbt-accel")
    return pages.split("\n", 1)[1]


def _settings(_: str) -> str:
    """What --help-settings lists of each command, as tables."""
    from bbt_accel.cli.base import COMMANDS, HEADER, Settable
    from bbt_accel.io.reporting import markdown_table

    import_module("bbt_accel.cli.commands")  # fills COMMANDS
    parts = [
        f"### Settings of {name}\n{markdown_table(HEADER, command.table(), text_columns=4)}"
        for name, command in COMMANDS.items()
        if issubclass(command, Settable)
    ]
    return "\n\n".join(parts)


def _api(_: str) -> str:
    import bbt_accel

    names = [name for name in bbt_accel.__all__ if not name.startswith("_")]
    return "\n\n".join(f"::: {bbt_accel._HOMES[name]}.{name}" for name in names)


def _schema(what: str) -> str:
    file = what.split()[1]
    return f"[{file}]({file}) is its JSON schema, for editors."


def _fields(what: str) -> str:
    """A table of a model's fields, and one for each model that they refer to."""
    schema = _model(what).model_json_schema()
    parts = [_table(schema)]
    for name, part in schema.get("$defs", {}).items():
        if "properties" in part:
            parts += [
                f'<a id="{name.lower()}"></a>**{name}.** {part.get("description", "")}',
                _table(part),
            ]
    return "\n\n".join(parts)


def _table(schema: dict[str, Any]) -> str:
    lines = ["| field | type | default | |", "|---|---|---|---|"]
    for name, field in schema["properties"].items():
        known = "default" in field and not isinstance(
            field["default"], dict
        )  # a model's is in its own table
        default = f"`{json.dumps(field['default'])}`" if known else ""
        about = " ".join(field.get("description", "").split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {_type(field)} | {default} | {about} |")
    return "\n".join(lines)


def _type(field: dict[str, Any]) -> str:
    """A JSON schema's type in words."""
    if "$ref" in field:
        return field["$ref"].rpartition("/")[2]
    for several in ("anyOf", "allOf", "oneOf"):
        if several in field:
            return " or ".join(dict.fromkeys(map(_type, field[several])))
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    if field.get("type") == "object":
        values = field.get("additionalProperties")
        return f"mapping to {_type(values)}" if isinstance(values, dict) else "mapping"
    return str(field.get("type", "any"))


def _notebook(file: Path) -> str:
    """A notebook as a page, with what its cells print and return; run from the first to the last in
    an empty folder.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(file, as_version=4)
    with tempfile.TemporaryDirectory(prefix="bbt-accel-docs-") as folder:
        environment = os.environ | {"BBT_ACCEL_CACHE": folder}
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute(
            env=environment
        )
    parts = []
    for cell in notebook.cells:
        parts.append(
            cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```"
        )
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":  # warnings of this machine's libraries
                continue
            text = output.text if "text" in output else output.data["text/plain"]
            parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _executed(markdown: str) -> str:
    """The page with the output of its bash and python blocks, run one after the other in an empty
    folder.
    """
    with tempfile.TemporaryDirectory(prefix="bbt-accel-docs-") as folder:

        def run(found: re.Match[str]) -> str:
            words = {"bash": ["bash", "-e", "-c"], "python": [sys.executable, "-c"]}[found[1]] + [
                found[2]
            ]
            made = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=600)
            if made.returncode:
                raise PluginError(
                    f"{EXECUTED}: this block ends with {made.returncode}\n{found[2]}\n{made.stderr}"
                )
            return f"{found[0]}\n```text\n{made.stdout}```\n" if made.stdout else found[0]

        return re.sub(r"^```(bash|python)\n(.*?)^```\n", run, markdown, flags=re.M | re.S)

"""A corpus of malformed inputs, made from sound ones, and what bbt-accel says to each of them.

python tests/cli/malformed.py [EVERY]

Every kind of file that a command reads is damaged in the same ways: each value is replaced by each
of some others, and bytes are cut, flipped, repeated or replaced. An input is handled when it is
accepted, or refused in a line that says what is wrong, within `LIMIT` seconds; what has a checksum
must be refused, and no library may print lines of its own. EVERY: try only every n-th input.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import pyarrow as pa
from pyarrow import parquet
from search_parts import SETTINGS, TASK, search_bundle, task_file

from bbt_accel import Bundle, Encoder, Run, load_engine, load_rows, load_task, predict_texts, tune
from bbt_accel.benchmarks.sweep.grid import read_sweep
from bbt_accel.errors import ExportError
from bbt_accel.io.command import explain
from bbt_accel.io.manifests import facts_digest
from bbt_accel.io.tables import read_table
from bbt_accel.package.manifest import INFO, Comparison, PackageInfo, Source, read_info, write_info
from bbt_accel.predict.fit import check_table

LIMIT = 10  # seconds
NAN, INF = float("nan"), float("inf")
VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, 2**31, 10**9, 2**63, 10**400, NAN, INF, "", "x", "\0", "../.."),
    *("é" * 5000, [], [[]], {}, {"x": 1}, [None] * 3),
)
"""In place of each value of a JSON file."""
TOML_VALUES = (
    *("-1", "0", "1e400", "nan", "9" * 5000, '""', '"\\u0000"', "[]", "[1]", "{}", "true"),
    *("1979-05-27", "[" * 9000),
)
Reader = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A malformed input: what it is, the file to damage, its content, and who reads it. strict:
    must be refused. beside: files that change with it, e.g. a checksum of it.
    """

    name: str
    file: Path
    content: bytes
    read: Reader
    strict: bool = False
    beside: dict[Path, bytes] = field(default_factory=dict)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a JSON value has values, itself not included."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs if isinstance(value, (dict, list)) else ():
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The same with another value in one place."""
    changed = json.loads(json.dumps(value))
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return changed


def damaged_json(sound: Any, values: int = len(VALUES)) -> Iterator[tuple[str, Any]]:
    for path in places(sound):
        for value in VALUES[:values]:
            yield f"{path} → {value!r:.20}", put(sound, path, value)


def damaged_bytes(content: bytes, count: int = 20) -> Iterator[tuple[str, bytes]]:
    rng = random.Random(len(content))
    yield from (("empty", b""), ("zeros", bytes(len(content))), ("twice", content * 2))
    yield from (("bom", b"\xff\xfe" + content), ("number", b"9" * 5000))
    yield from (("deep list", b"[" * 100_000), ("deep object", b'{"a":' * 100_000))
    for bit in range(count):
        at = rng.randrange(len(content) - 1)  # a line break at the end may be missing
        flipped = bytes([content[at] ^ (1 << bit % 8)])
        yield f"cut at {at}", content[:at]
        yield f"flipped at {at}", content[:at] + flipped + content[at + 1 :]
        yield f"noise at {at}", content[:at] + rng.randbytes(40) + content[at + 40 :]


def hashed(bundle: Path, name: str, content: bytes) -> dict[Path, bytes]:
    """The manifest of a bundle with the checksum of a damaged file."""
    manifest = bundle / "bundle.json"
    sound = json.loads(manifest.read_text())
    sound["sha256"][name] = hashlib.sha256(content).hexdigest()
    sound["facts"] = facts_digest(json.dumps(sound).encode())
    return {manifest: json.dumps(sound).encode()}


class Corpus:
    """The sound inputs, in a folder, and every case made from them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        self.task = task_file(self.data)
        self.bundle = search_bundle(folder / "bundle").path
        self.run = self.tuned(folder / "run")

    def tuned(self, output: Path, resume: bool = False) -> Run:
        options: Any = {"data": self.data, "engine": "dummy", "settings": SETTINGS}
        options |= {"output": output, "resume": resume, "progress": False}
        return tune(self.bundle, self.task, **options)

    def cases(self) -> Iterator[Case]:
        kinds = [self.tasks, self.rows, self.tables, self.bundles, self.runs, self.histories]
        kinds += [self.sweeps, self.packages]
        kinds += [self.checkpoints, self.graphs] if find_spec("torch") is not None else []
        for kind in kinds:
            yield from kind()

    def file_cases(self, file: Path, read: Reader, values: int = len(VALUES)) -> Iterator[Case]:
        """A JSON file with other values, and with other bytes."""
        for what, changed in damaged_json(json.loads(file.read_text()), values):
            yield Case(f"{file.name}: {what}", file, json.dumps(changed).encode(), read)
        for what, content in damaged_bytes(file.read_bytes()):
            yield Case(f"{file.name}: {what}", file, content, read)

    def tasks(self) -> Iterator[Case]:
        def read() -> object:
            return Encoder(Bundle.read(self.bundle), load_task(self.task))

        for line in filter(lambda line: " = " in line, TASK.splitlines()):
            for value in TOML_VALUES:
                content = TASK.replace(line, f"{line.split(' = ')[0]} = {value}").encode()
                yield Case(f"task: {line:.20} → {value:.20}", self.task, content, read)
        for what, content in damaged_bytes(TASK.encode()):
            yield Case(f"task: {what}", self.task, content, read)

    def rows(self) -> Iterator[Case]:
        def read() -> object:
            return load_rows(load_task(self.task), "train", self.data)

        file = self.data / "train.jsonl"
        first, *others = file.read_text().splitlines()
        for what, changed in damaged_json(json.loads(first)):
            content = "\n".join([json.dumps(changed), *others]).encode()
            yield Case(f"rows: {what}", file, content, read)
        for what, content in damaged_bytes(file.read_bytes()):
            yield Case(f"rows: {what}", file, content, read)

    def tables(self) -> Iterator[Case]:
        """Files that `fit` reads, in every format that needs no further package."""
        records = [{"text": f"w{i} é; w{i}", "label": ["a", "b"][i % 2]} for i in range(12)]
        lines = "\n".join(f'"{row["text"]}"\t{row["label"]}' for row in records)
        parquet.write_table(pa.Table.from_pylist(records), self.data / "table.parquet")
        contents = {
            ".tsv": f"text\tlabel\n{lines}\n".encode("cp1252"),
            ".csv": f"text;label\n{lines}\n".replace("\t", ";").encode("cp1252"),
            ".json": json.dumps(records).encode(),
            ".parquet": (self.data / "table.parquet").read_bytes(),
        }
        for suffix, content in contents.items():
            file = self.data / f"table{suffix}"
            file.write_bytes(content)

            def read(file: Path = file) -> object:
                return check_table(read_table(file), file, ["text"], "label")

            for what, damaged in damaged_bytes(content):
                yield Case(f"table {suffix}: {what}", file, damaged, read)

    def bundles(self) -> Iterator[Case]:
        def use() -> object:
            encoder = Encoder(Bundle.read(self.bundle), load_task(self.task))
            return encoder.encode(load_rows(encoder.task, "train", self.data))

        manifest, read = self.bundle / "bundle.json", partial(Bundle.read, self.bundle)
        sound = json.loads(manifest.read_text())
        for what, changed in damaged_json(sound, 15):
            text = json.dumps(changed).encode()
            strict = json.loads(text) != sound
            yield Case(f"bundle.json: {what}", manifest, text, read, strict)
            if changed["facts"] == sound["facts"]:  # as by someone who corrects the checksum, too
                text = json.dumps(changed | {"facts": facts_digest(text)}).encode()
                yield Case(f"bundle.json, hashed: {what}", manifest, text, use)
        for what, content in damaged_bytes(manifest.read_bytes()):
            yield Case(f"bundle.json: {what}", manifest, content, read, strict=True)
        tokenizer = self.bundle / "tokenizer.json"
        for what, content in damaged_bytes(tokenizer.read_bytes()):
            yield Case(f"tokenizer.json: {what}", tokenizer, content, read, strict=True)
            beside = hashed(self.bundle, tokenizer.name, content)
            yield Case(f"tokenizer, hashed: {what}", tokenizer, content, use, beside=beside)

    def runs(self) -> Iterator[Case]:
        read = partial(predict_texts, self.run.path, [{"text": "w1 w2"}])
        file = self.run.path / "run.json"
        yield from self.file_cases(file, read, 15)
        sound = json.loads(file.read_text())
        for name, path in (("prompt", ("prompt_sha256",)), ("readout", ("readout", "sha256"))):
            tensors = self.run.path / f"{name}.safetensors"
            for what, content in damaged_bytes(tensors.read_bytes()):
                yield Case(f"{name}: {what}", tensors, content, read, strict=True)
                changed = put(sound, path, hashlib.sha256(content).hexdigest())
                beside = {file: json.dumps(changed).encode()}
                yield Case(f"{name}, hashed: {what}", tensors, content, read, beside=beside)

    def histories(self) -> Iterator[Case]:
        """A search that was killed before its end."""
        partial_run = self.folder / ".resumed.partial"
        partial_run.mkdir()
        lines = (self.run.path / "history.jsonl").read_text().splitlines()[:8]
        unfinished = {"status": "running", "calls": 0, "best": None, "prompt_sha256": ""}
        running = self.run.info.model_copy(update=unfinished).model_dump_json().encode()

        def resume() -> None:
            shutil.rmtree(self.tuned(self.folder / "resumed", resume=True).path)

        def case(what: str, content: bytes, strict: bool = False) -> Case:
            file, beside = partial_run / "history.jsonl", {partial_run / "run.json": running}
            return Case(f"history: {what}", file, content, resume, strict, beside)

        sound = json.loads(lines[2])
        followed = {"generation", "calls", "layer", "candidates"}  # by the rest of a search
        for what, changed in damaged_json(sound, 13):
            content = "\n".join([*lines[:2], json.dumps(changed), *lines[3:]]).encode() + b"\n"
            strict = any(changed[name] != sound[name] for name in followed & sound.keys())
            yield case(what, content, strict)
        for what, content in damaged_bytes("\n".join(lines).encode() + b"\n"):
            yield case(what, content)

    def packages(self) -> Iterator[Case]:
        folder, source = self.folder / "package", Source(name="run", digest="0")
        folder.mkdir()
        (folder / "README.md").write_text("A card.")
        facts: dict[str, Any] = {"kind": "onnx", "model": "onnx/model.onnx", "precision": "fp32"}
        facts |= {"quantized": False, "run": source, "bundle": source, "task": "toy"}
        facts |= {"architecture": "encoder", "template_group": "masked", "columns": ["text"]}
        facts |= {"labels": ["bad", "great"], "readout": "verbalizer", "max_tokens": 9}
        facts |= {"versions": {"numpy": "2"}, "command": "bbt-accel package run -o package"}
        found = Comparison(rows=1, digest="0", largest_error=0.0, labels_differ=0)
        write_info(folder, PackageInfo(**facts, comparison=found))
        read = partial(read_info, folder)
        yield from self.file_cases(folder / INFO, read, 15)
        for what, content in damaged_bytes(b"A card.", 5):
            yield Case(f"package: {what}", folder / "README.md", content, read, strict=True)

    def sweeps(self) -> Iterator[Case]:
        file = self.folder / "sweep.json"
        sound = {"tasks": [str(self.task)], "bundles": [str(self.bundle)], "engines": ["dummy"]}
        sound |= {"seeds": [1], "settings": {"budget": 40, "k_shot": 3}, "data": str(self.folder)}
        file.write_text(json.dumps(sound))
        yield from self.file_cases(file, lambda: read_sweep(file, {}).absolute().trials())

    def checkpoints(self) -> Iterator[Case]:
        """What export reads, up to the graphs."""
        from tiny_backbones import save_recorded_backbone

        from bbt_accel.exporters.trace import export

        folder = self.folder / "checkpoint"
        save_recorded_backbone("roberta", folder)

        def trace(*_: object) -> list[str]:
            raise ExportError("would be traced")

        def read() -> object:
            former, export.trace = export.trace, trace
            try:
                return export.export_bundle(folder, self.folder / "exported", n_prompt_tokens=3)
            finally:
                export.trace = former

        yield from self.file_cases(folder / "config.json", read, 12)
        for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
            for what, content in damaged_bytes((folder / name).read_bytes(), 6):
                yield Case(f"checkpoint, {name}: {what}", folder / name, content, read)

    def graphs(self) -> Iterator[Case]:
        """Graphs whose checksums are those of the damaged files, in every program that reads
        them.
        """
        import onnx

        from bbt_accel.exporters.convert.optimize import optimize_bundle
        from bbt_accel.exporters.trace import export, validate

        export.validated = validate.validate  # in this process
        folder, made = self.folder / "exported", self.folder / "made"
        export.export_bundle(self.folder / "checkpoint", folder, n_prompt_tokens=3)
        engines = ["ort", "torch"] + (["openvino"] if find_spec("openvino") is not None else [])

        def optimize(precision: str) -> None:
            optimize_bundle(folder, made, precision=precision)  # type: ignore[arg-type]
            shutil.rmtree(made)

        readers: dict[str, Reader] = {
            name: partial(load_engine, folder, name, threads=1) for name in engines
        }
        readers |= {f"optimize, {p}": partial(optimize, p) for p in ("fp32", "int8")}
        graph = folder / "model.onnx"
        damaged = [*damaged_bytes(graph.read_bytes(), 3)]
        for key, values in {
            "location": ("", "nothing", "../run/run.json", "/etc/passwd", "a\0b", "x" * 5000),
            "offset": ("-1", "3", str(2**62), "x", ""),
            "length": ("0", "-1", "7", str(2**62), "x"),
        }.items():
            for value in values:
                model = onnx.load(str(graph), load_external_data=False)
                tensor = next(t for t in model.graph.initializer if t.external_data)
                entry = next(entry for entry in tensor.external_data if entry.key == key)
                entry.value = value
                damaged.append((f"{key} → {value:.20}", model.SerializeToString()))
        for what, content in damaged:
            beside = hashed(folder, graph.name, content)
            for name, read in readers.items():
                yield Case(f"graph, {name}: {what}", graph, content, read, beside=beside)
        for target in engines[:1] + engines[2:]:  # what one engine reads of its own bundle
            place = optimize_bundle(folder, self.folder / f"for-{target}", target=target).path
            for name in json.loads((place / "bundle.json").read_text())["sha256"]:
                for what, content in damaged_bytes((place / name).read_bytes(), 3):
                    load = partial(load_engine, place, target, threads=1)
                    beside = hashed(place, name, content)
                    yield Case(
                        f"{target}, {name}: {what}", place / name, content, load, False, beside
                    )


def attack(case: Case) -> str | None:
    """What is wrong with the answer to a case; None if it is handled."""
    files = {**case.beside, case.file: case.content}
    former = {file: file.read_bytes() if file.exists() else None for file in files}
    for file, content in files.items():
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    try:
        with time_limit(), silent_libraries():
            case.read()
        return "accepted" if case.strict else None
    except Exception as error:
        line = explain(error)[1]
        if line.strip() and not line.startswith("internal error"):
            return None
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error!s:.100} ({where.filename}:{where.lineno})"
    finally:
        for file, before in former.items():
            if before is None:
                file.unlink(missing_ok=True)
            else:
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(before)


@contextlib.contextmanager
def silent_libraries() -> Iterator[None]:
    """As the command line has it. Raises AssertionError for lines on standard error."""
    logging.disable(logging.WARNING)
    former = os.dup(2)
    with TemporaryFile() as file, warnings.catch_warnings(action="ignore"):
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(former, 2)
            os.close(former)
            file.seek(0)
            if text := file.read().decode(errors="replace").strip():
                raise AssertionError(f"a library prints {text[:200]!r}")


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def late(*_: object) -> None:
        raise RuntimeError(f"took more than {LIMIT} seconds")

    former = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


if __name__ == "__main__":
    every = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    tried, mishandled = 0, []
    with TemporaryDirectory() as folder:
        for case in islice(Corpus(Path(folder)).cases(), 0, None, every):
            tried += 1
            if (problem := attack(case)) is not None:
                mishandled.append(f"{case.name}: {problem}")
    print(*mishandled, f"{tried} malformed inputs, mishandled {len(mishandled)}", sep="\n")

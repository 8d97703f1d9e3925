"""A corpus of malformed inputs, made from sound ones, and what bbt-accel says to each of them.

python tests/malformed.py [EVERY]

Every kind of file that a command reads is damaged in the same ways: each value is replaced by each
of some others, and bytes are cut, flipped, repeated or replaced. An input is handled when it is
accepted, or refused in a line that says what is wrong, within `LIMIT` seconds; what has a checksum
must be refused, and no library may print lines of its own.
EVERY: try only every n-th input.
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
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import pyarrow as pa
from pyarrow import parquet
from search_parts import SETTINGS, TASK, search_bundle, task_file

from bbt_accel import Bundle, Encoder, load_engine, load_task, tune
from bbt_accel.benchmarks.sweep.grid import read_sweep
from bbt_accel.errors import ExportError
from bbt_accel.io.command import explain
from bbt_accel.io.manifests import facts_digest
from bbt_accel.io.tables import read_table
from bbt_accel.package.manifest import INFO, Comparison, PackageInfo, Source, read_info, write_info
from bbt_accel.predict.fit import check_table
from bbt_accel.predict.inference import predict_texts
from bbt_accel.search.run import Run
from bbt_accel.tasks.data import load_rows

LIMIT = 10  # seconds
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 2**31, 10**9, 2**63, 10**400, float("nan"), float("inf"), "", "x", "\0", "../..",
    "é" * 5000, [], [[]], {}, {"x": 1}, [None] * 3,
)  # fmt: skip
"""In place of each value of a JSON file."""
TOML_VALUES = (
    "-1",
    "0",
    "1e400",
    "nan",
    "9" * 5000,
    '""',
    '"\\u0000"',
    "[]",
    "[1]",
    "{}",
    "true",
    "1979-05-27",
    "[" * 9000,
)


@dataclass(frozen=True)
class Case:
    """A malformed input: what it is, the file to damage, its content, and who reads it. strict:
    must be refused.
    """

    name: str
    file: Path
    content: bytes
    read: Callable[[], object]
    strict: bool = False
    beside: tuple[tuple[Path, bytes], ...] = ()
    """Files that change with it, e.g. a checksum of it."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a JSON value has values, itself not included."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The same with another value in one place."""
    changed = json.loads(json.dumps(value))
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return changed


def damaged_bytes(content: bytes, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    rng = random.Random(seed)
    yield from (
        ("empty", b""),
        ("zeros", bytes(len(content))),
        ("twice", content * 2),
        ("bom", b"\xff\xfe" + content),
    )
    yield from (
        ("deep list", b"[" * 100_000),
        ("deep object", b'{"a":' * 100_000),
        ("number", b"9" * 5000),
    )
    for i in range(count):
        at = rng.randrange(len(content))
        yield f"cut at {at}", content[:at]
        yield (
            f"flipped at {at}",
            content[:at] + bytes([content[at] ^ (1 << i % 8)]) + content[at + 1 :],
        )
        yield f"noise at {at}", content[:at] + rng.randbytes(40) + content[at + 40 :]


class Corpus:
    """The sound inputs, in a folder, and every case made from them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        self.task = task_file(self.data)
        self.bundle = search_bundle(folder / "bundle")
        self.run = self.tuned(folder / "run")
        self.manifest = self.bundle.path / "bundle.json"

    def tuned(self, output: Path, **more: Any) -> Run:
        options = {
            "data": self.data,
            "engine": "dummy",
            "settings": SETTINGS,
            "progress": False,
            **more,
        }
        return tune(self.bundle.path, self.task, output=output, **options)

    def cases(self) -> Iterator[Case]:
        yield from self.tasks()
        yield from self.rows()
        yield from self.tables()
        yield from self.bundles()
        yield from self.runs()
        yield from self.histories()
        yield from self.sweeps()
        yield from self.packages()
        if find_spec("torch") is not None:
            yield from self.checkpoints()
            yield from self.graphs()

    def tasks(self) -> Iterator[Case]:
        def read() -> object:
            return Encoder(Bundle.read(self.bundle.path), load_task(self.task))

        lines = TASK.splitlines()
        for number, line in enumerate(lines):
            if " = " in line:
                for value in TOML_VALUES:
                    changed = [
                        *lines[:number],
                        f"{line.split(' = ')[0]} = {value}",
                        *lines[number + 1 :],
                    ]
                    yield Case(
                        f"task: {line:.20} → {value:.20}",
                        self.task,
                        "\n".join(changed).encode(),
                        read,
                    )
        for what, content in damaged_bytes(TASK.encode(), 1, 20):
            yield Case(f"task: {what}", self.task, content, read)

    def rows(self) -> Iterator[Case]:
        def read() -> object:
            return load_rows(load_task(self.task), "train", self.data)

        file = self.data / "train.jsonl"
        first, *others = file.read_text().splitlines()
        for path in places(json.loads(first)):
            for value in VALUES:
                changed = json.dumps(put(json.loads(first), path, value))
                yield Case(
                    f"rows: {path} → {value!r:.20}",
                    file,
                    "\n".join([changed, *others]).encode(),
                    read,
                )
        for what, content in damaged_bytes(file.read_bytes(), 2, 20):
            yield Case(f"rows: {what}", file, content, read)

    def tables(self) -> Iterator[Case]:
        """Files that `fit` reads, in every format that needs no further package."""
        records = [{"text": f'w{i} "é; w{i}', "label": ["a", "b"][i % 2]} for i in range(12)]
        lines = "\n".join(
            f'"{r["text"].replace(chr(34), chr(34) * 2)}";{r["label"]}' for r in records
        )
        sound = {
            ".csv": f"text;label\n{lines}\n",
            ".tsv": f"text;label\n{lines}\n".replace(";", "\t"),
        }
        parquet.write_table(pa.Table.from_pylist(records), self.data / "table.parquet")
        contents = {suffix: text.encode("cp1252") for suffix, text in sound.items()}
        contents |= {
            ".json": json.dumps(records).encode(),
            ".parquet": (self.data / "table.parquet").read_bytes(),
        }
        for suffix, content in contents.items():
            file = self.data / f"table{suffix}"
            file.write_bytes(content)

            def read(file: Path = file) -> object:
                return check_table(read_table(file), file, ["text"], "label")

            for what, damaged in damaged_bytes(content, 3, 20):
                yield Case(f"table {suffix}: {what}", file, damaged, read)

    def bundles(self) -> Iterator[Case]:
        def read() -> object:
            return Bundle.read(self.bundle.path)

        def use() -> object:
            encoder = Encoder(Bundle.read(self.bundle.path), load_task(self.task))
            return encoder.encode(load_rows(encoder.task, "train", self.data))

        sound = json.loads(self.manifest.read_text())
        for path in places(sound):
            for value in VALUES[:15]:
                changed = put(sound, path, value)
                if changed == sound and type(value) is type(sound):
                    continue
                text = json.dumps(changed).encode()
                strict = json.loads(text) != sound
                yield Case(
                    f"bundle.json: {path} → {value!r:.20}", self.manifest, text, read, strict=strict
                )
                if path != ("facts",):  # as someone would who also corrects the checksum
                    text = json.dumps(changed | {"facts": facts_digest(text)}).encode()
                    yield Case(
                        f"bundle.json, hashed: {path} → {value!r:.20}", self.manifest, text, use
                    )
        for what, content in damaged_bytes(self.manifest.read_bytes(), 3, 20):
            yield Case(f"bundle.json: {what}", self.manifest, content, read, strict=True)
        tokenizer = self.bundle.path / "tokenizer.json"
        for what, content in damaged_bytes(tokenizer.read_bytes(), 4, 20):
            yield Case(f"tokenizer.json: {what}", tokenizer, content, read, strict=True)
            hashed = sound | {
                "sha256": sound["sha256"] | {"tokenizer.json": hashlib.sha256(content).hexdigest()}
            }
            hashed["facts"] = facts_digest(json.dumps(hashed).encode())
            beside = ((self.manifest, json.dumps(hashed).encode()),)
            yield Case(f"tokenizer.json, hashed: {what}", tokenizer, content, use, beside=beside)

    def runs(self) -> Iterator[Case]:
        def read() -> object:
            return predict_texts(self.run.path, [{"text": "w1 w2"}])

        file = self.run.path / "run.json"
        sound = json.loads(file.read_text())
        for path in places(sound):
            if path[0] in ("task", "versions", "data"):
                continue
            for value in VALUES[:15]:
                yield Case(
                    f"run.json: {path} → {value!r:.20}",
                    file,
                    json.dumps(put(sound, path, value)).encode(),
                    read,
                )
        for what, content in damaged_bytes(file.read_bytes(), 5, 20):
            yield Case(f"run.json: {what}", file, content, read)
        for name, path in (("prompt", ("prompt_sha256",)), ("readout", ("readout", "sha256"))):
            tensors = self.run.path / f"{name}.safetensors"
            for what, content in damaged_bytes(tensors.read_bytes(), 6, 20):
                yield Case(f"{name}: {what}", tensors, content, read, strict=True)
                hashed = put(sound, path, hashlib.sha256(content).hexdigest())
                beside = ((file, json.dumps(hashed).encode()),)
                yield Case(f"{name}, hashed: {what}", tensors, content, read, beside=beside)

    def histories(self) -> Iterator[Case]:
        """A search that was killed before its end."""
        partial = self.folder / ".resumed.partial"
        partial.mkdir()
        lines = (self.run.path / "history.jsonl").read_text().splitlines()[:8]
        running = self.run.info.model_copy(
            update={"status": "running", "calls": 0, "best": None, "prompt_sha256": ""}
        )
        manifest, history = partial / "run.json", partial / "history.jsonl"

        def resume() -> None:
            shutil.rmtree(self.tuned(self.folder / "resumed", resume=True).path)

        def case(name: str, content: bytes, strict: bool = False) -> Case:
            beside = ((manifest, running.model_dump_json().encode()),)
            return Case(f"history: {name}", history, content, resume, strict, beside)

        sound = json.loads(lines[2])
        free = (
            "seconds",
            "calls_per_second",
            "best_loss",
            "mean_loss",
            "metric",
            "step_size",
        )  # nothing follows
        for path in places(sound):
            for value in VALUES[:13]:
                line = json.dumps(put(sound, path, value))
                strict = (
                    path[0] not in free
                    and path[0] not in ("dev_score", "dev_loss")
                    and put(sound, path, value) != sound
                )
                content = "\n".join([*lines[:2], line, *lines[3:]]).encode() + b"\n"
                yield case(f"{path} → {value!r:.20}", content, strict and path[0] != "losses")
        for what, content in damaged_bytes("\n".join(lines).encode() + b"\n", 7, 20):
            yield case(what, content)

    def packages(self) -> Iterator[Case]:
        folder = self.folder / "package"
        folder.mkdir()
        (folder / "README.md").write_text("A card.")
        source = Source(name="run", digest="0")
        sound = PackageInfo(
            kind="onnx", model="onnx/model.onnx", precision="fp32", quantized=False, run=source, bundle=source,
            task="toy", architecture="encoder", template_group="masked", labels=["bad", "great"], columns=["text"],
            readout="verbalizer", max_tokens=9, versions={"numpy": "2"}, command="bbt-accel package run -o package",
            comparison=Comparison(rows=1, digest="0", largest_error=0.0, labels_differ=0),
        )  # fmt: skip
        found, file = write_info(folder, sound).model_dump(mode="json"), folder / INFO
        for path in places(found):
            for value in VALUES[:15]:
                content = json.dumps(put(found, path, value)).encode()
                yield Case(
                    f"{INFO}: {path} → {value!r:.20}", file, content, partial(read_info, folder)
                )
        for what, content in damaged_bytes(file.read_bytes(), 9, 20):
            yield Case(f"{INFO}: {what}", file, content, partial(read_info, folder))
        card = folder / "README.md"
        for what, content in damaged_bytes(card.read_bytes(), 10, 5):
            yield Case(f"package: {what}", card, content, partial(read_info, folder), strict=True)

    def sweeps(self) -> Iterator[Case]:
        file = self.folder / "sweep.json"
        sound = {
            "tasks": [str(self.task)], "bundles": [str(self.bundle.path)], "engines": ["dummy"], "seeds": [1],
            "settings": {"budget": 40, "k_shot": 3}, "data": str(self.folder),
        }  # fmt: skip
        file.write_text(json.dumps(sound))

        def read() -> object:
            return read_sweep(file, {}).absolute().trials()

        for path in places(sound):
            for value in VALUES:
                yield Case(
                    f"sweep: {path} → {value!r:.20}",
                    file,
                    json.dumps(put(sound, path, value)).encode(),
                    read,
                )
        for what, content in damaged_bytes(file.read_bytes(), 8, 10):
            yield Case(f"sweep: {what}", file, content, read)

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

        config = folder / "config.json"
        sound = json.loads(config.read_text())
        for path in places(sound):
            for value in VALUES[:12]:
                yield Case(
                    f"config.json: {path} → {value!r:.20}",
                    config,
                    json.dumps(put(sound, path, value)).encode(),
                    read,
                )
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
            for what, content in damaged_bytes((folder / name).read_bytes(), 9, 6):
                yield Case(f"checkpoint, {name}: {what}", folder / name, content, read)

    def graphs(self) -> Iterator[Case]:
        """Graphs whose checksums are those of the damaged files, in every program that reads
        them.
        """
        import onnx

        from bbt_accel.exporters.convert.optimize import optimize_bundle
        from bbt_accel.exporters.convert.triton import write_repository
        from bbt_accel.exporters.trace import export, validate

        folder, made = self.folder / "exported", self.folder / "made"
        export.validated = validate.validate
        export.export_bundle(self.folder / "checkpoint", folder, n_prompt_tokens=3)

        def reader(read: Callable[[], object]) -> Callable[[], None]:
            def call() -> None:
                read()
                shutil.rmtree(made, ignore_errors=True)

            return call

        readers = {
            name: partial(load_engine, folder, name, threads=1)
            for name in ("ort", "torch", "openvino")
        }
        readers |= {
            f"optimize --{p}": partial(optimize_bundle, folder, made, precision=p)
            for p in ("fp32", "int8")
        }
        readers |= {"triton": lambda: write_repository(Bundle.read(folder), made)}
        manifest = folder / "bundle.json"
        sound = json.loads(manifest.read_text())

        def cases(what: str, file: Path, content: bytes) -> Iterator[Case]:
            hashed = sound | {
                "sha256": sound["sha256"] | {file.name: hashlib.sha256(content).hexdigest()}
            }
            hashed["facts"] = facts_digest(json.dumps(hashed).encode())
            beside = ((manifest, json.dumps(hashed).encode()),)
            for name, read in readers.items():
                if name != "openvino" or find_spec("openvino") is not None:
                    yield Case(f"graph, {name}: {what}", file, content, reader(read), beside=beside)

        file = folder / "model.onnx"
        for key, values in {
            "location": ("", "nothing", "../run/run.json", "/etc/passwd", "a\0b", "x" * 5000),
            "offset": ("-1", "3", str(2**62), "x", ""),
            "length": ("0", "-1", "7", str(2**62), "x"),
        }.items():
            for value in values:
                model = onnx.load(str(file), load_external_data=False)
                tensor = next(t for t in model.graph.initializer if t.external_data)
                for entry in tensor.external_data:
                    if entry.key == key:
                        entry.value = value
                yield from cases(f"{key} → {value:.20}", file, model.SerializeToString())
        for name in ("model.onnx", "model.safetensors"):
            for what, content in damaged_bytes((folder / name).read_bytes(), 10, 3):
                yield from cases(f"{name} {what}", folder / name, content)
        yield from self.optimized(folder)

    def optimized(self, source: Path) -> Iterator[Case]:
        """The files that one engine reads of a bundle that is optimized for it."""
        from bbt_accel.exporters.convert.optimize import optimize_bundle

        for target in ("ort", "openvino"):
            if find_spec("openvino") is None and target == "openvino":
                continue
            bundle = optimize_bundle(source, self.folder / f"for-{target}", target=target)
            manifest = bundle.path / "bundle.json"
            sound = json.loads(manifest.read_text())
            read = partial(load_engine, bundle.path, target, threads=1)
            for name in sound["sha256"]:
                for what, content in damaged_bytes((bundle.path / name).read_bytes(), 11, 3):
                    hashed = put(sound, ("sha256", name), hashlib.sha256(content).hexdigest())
                    hashed["facts"] = facts_digest(json.dumps(hashed).encode())
                    beside = ((manifest, json.dumps(hashed).encode()),)
                    yield Case(
                        f"optimized for {target}, {name}: {what}",
                        bundle.path / name,
                        content,
                        read,
                        beside=beside,
                    )


def attack(case: Case) -> str | None:
    """What is wrong with the answer to a case; None if it is handled."""
    files = dict([*case.beside, (case.file, case.content)])
    former = {file: file.read_bytes() if file.exists() else None for file in files}
    for file, content in files.items():
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    try:
        with time_limit(), silent_libraries():
            case.read()
        return "accepted" if case.strict else None
    except Printed as error:
        return f"prints {error}"
    except Exception as error:
        line = explain(error)[1]
        if line.strip() and not line.startswith("internal error"):
            return None
        where = traceback.extract_tb(error.__traceback__)[-1]
        return (
            f"{type(error).__name__}: {error!s:.100} ({Path(where.filename).name}:{where.lineno})"
        )
    finally:
        for file, content in former.items():
            if content is None:
                file.unlink(missing_ok=True)
            else:
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(content)


class Printed(Exception):
    """What a library has written to standard error."""


@contextlib.contextmanager
def silent_libraries() -> Iterator[None]:
    """As the command line has it. Raises Printed, after the block, when its standard error is not
    empty.
    """
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
                raise Printed(" ".join(text.split())[:200])


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"took more than {LIMIT} seconds")

    former = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def attack_all(folder: Path, every: int = 1) -> tuple[int, list[str]]:
    """Try every n-th case; returns how many were tried, and a line for each that was mishandled."""
    tried, mishandled = 0, []
    for number, case in enumerate(Corpus(folder).cases()):
        if number % every == 0:
            tried += 1
            if (problem := attack(case)) is not None:
                mishandled.append(f"{case.name}: {problem}")
    return tried, mishandled


if __name__ == "__main__":
    begun = time.monotonic()
    with TemporaryDirectory() as place:
        count, found = attack_all(Path(place), int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    print(*found, sep="\n")
    kinds = Counter(line.partition(":")[0] for line in found)
    print(
        f"{count} malformed inputs in {time.monotonic() - begun:.0f} s, mishandled {len(found)}",
        dict(kinds) or "",
    )

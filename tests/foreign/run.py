"""Packages in the tools that they are made for: python tests/foreign/run.py [-o REPORT.md] [--work
DIR] [LOADER ...]

Packages the demo and tiny backbones of other families, loads each with the real loaders at pinned
versions, in environments of their own, and compares what they compute with `predict`. A loader
whose environment cannot be made here (no network, no Node.js, no Chromium) is skipped, and the
report says why. Exits with 1 where a loader differs.
"""

from __future__ import annotations

import argparse
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import venv
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "benchmarks")]

from package_parts import TEXTS, task_file  # noqa: E402
from reports import write_reports  # noqa: E402
from tiny_backbones import save_backbone  # noqa: E402

from bbt_accel import tune  # noqa: E402
from bbt_accel.core.bundle import Bundle  # noqa: E402
from bbt_accel.core.demo import DATA  # noqa: E402
from bbt_accel.exporters.convert.optimize import optimize_bundle  # noqa: E402
from bbt_accel.exporters.trace.export import export_bundle  # noqa: E402
from bbt_accel.package.package import Options, package_run  # noqa: E402
from bbt_accel.predict.inference import predict_texts  # noqa: E402
from bbt_accel.search.calibration import calibrate_on  # noqa: E402
from bbt_accel.search.run import Run  # noqa: E402

DEMO = [
    "The striker scored twice in the final",
    "Shares fell after the bank cut its forecast",
    "",
    "  \n ",
    "[MASK] a faster chip [SEP] </s>",
    "👩‍🚀 é 東京 doctors recommend a flu shot 🎉",
    "one\ntwo  three\u00a0",
    "the market fell and the team won again, " * 100,
]
PAIRS = [
    ["The striker scored", "twice in the final"],
    ["", "shares fell"],
    ["a faster chip", ""],
    ["[MASK] it", "[SEP] 🎉"],
    ["the market fell " * 150, "the team won " * 200],
]
TINY = [*TEXTS[:4], "", "<mask> </s> it", "👩‍🚀 é", "was " * 120]
OTHERS = (
    ("roberta", "bbt", "cat"),
    ("bart", "bbt", "add"),
    ("t5", "bbt", "cat"),
    ("gpt2", "bbtv2", "add"),
    ("llama", "bbt", "cat"),
)
LISTED = ("demo", "roberta", "bart")  # as classifiers, by transformers.js
TOLERANCE = {"fp32": 1e-5, "int8": 0.05}  # of probabilities


@dataclass
class Case:
    """A package, texts for it, and their probabilities (N, C) by `predict`."""

    kind: str
    name: str
    folder: Path
    model: str
    precision: str
    texts: list[Any]
    wanted: np.ndarray
    checkpoint: str = ""


@dataclass
class Loaded:
    """What a loader made of the cases of its kind. found: case → mode → probabilities (N, C)."""

    versions: dict[str, str]
    found: dict[str, dict[str, Any]]


class Skipped(Exception):
    """A loader that cannot be had here."""


Load = Callable[[Path, Path, list[Case]], Loaded]
"""From the folder of a loader's environment, WORK and cases to what it made of them."""


# The packages


class Packages:
    """Makes every case in a folder; what is there from an earlier call is made again."""

    def __init__(self, work: Path) -> None:
        self.work = work
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        self.cases: list[Case] = []

    def add(
        self, run: Run, kind: str, name: str, texts: list[Any], bundle: Bundle, checkpoint: str = ""
    ) -> None:
        folder = self.work / kind / name
        info = package_run(run.path, folder, Options(format=kind, bundle=bundle.path, threads=1))  # type: ignore[arg-type]
        rows = [
            dict(zip(run.task.text, [text] if isinstance(text, str) else text, strict=True))
            for text in texts
        ]
        engine = "openvino" if kind == "openvino" else "ort"
        found = predict_texts(run.path, rows, bundle=bundle.path, engine=engine, threads=1)
        wanted = np.array([list(answer["probabilities"].values()) for answer in found])
        self.cases.append(
            Case(kind, name, folder, info.model, info.precision, texts, wanted, checkpoint)
        )

    def demo(self) -> None:
        """The demo backbone in fp32 and int8, with one text and with a pair."""
        bundle = export_bundle("demo", self.work / "demo", n_prompt_tokens=20)
        run = self.tuned(bundle, "demo", None)
        for kind, target in (("onnx", "ort"), ("openvino", "openvino")):
            self.add(run, kind, "demo", DEMO, bundle)
            options = {"target": target, "precision": "int8", "calibration": calibrate_on("demo")}
            int8 = optimize_bundle(bundle.path, self.work / f"demo-int8-{target}", **options)  # type: ignore[arg-type]
            self.add(run, kind, "demo-int8", DEMO, int8)
            if kind == "onnx":
                self.add(run, "web", "demo", DEMO, bundle)
                self.add(run, "web", "demo-int8", DEMO, int8)
        pair = self.tuned(
            bundle, str(self.pair_task()), self.work / "pair-data", readout="verbalizer"
        )
        for kind in ("onnx", "openvino", "web"):
            self.add(pair, kind, "demo-pair", PAIRS, bundle)

    def others(self) -> None:
        """Tiny backbones of other families, whose labels mean nothing."""
        for name, method, mode in OTHERS:
            bundle, checkpoint = self.tiny(name, method, mode)
            run = self.tuned(
                bundle, str(task_file(self.work / "tiny-data")), self.work / "tiny-data", name=name
            )
            self.add(run, "onnx", name, TINY, bundle)
            if mode == "cat" and name != "roberta":
                self.add(run, "peft", name, TEXTS[:4], bundle, str(checkpoint))

    def tiny(self, name: str, method: str, mode: str) -> tuple[Bundle, Path]:
        checkpoint = save_backbone(name, self.work / f"{name}-checkpoint")
        options = {"method": method, "prompt_mode": mode, "n_prompt_tokens": 3}
        return export_bundle(checkpoint, self.work / f"{name}-bundle", **options), checkpoint  # type: ignore[arg-type]

    def tuned(
        self, bundle: Bundle, task: str, data: Path | None, readout: str = "", name: str = ""
    ) -> Run:
        settings: dict[str, object] = {
            "budget": 20,
            "popsize": 10,
            "readout": readout or ("states" if not name else "verbalizer"),
        }
        if name:
            settings |= {"k_shot": 4, "intrinsic_dim": 6, "sigma": 3.0, "alpha": 3.0}
        output = self.work / f"run-{name or Path(task).stem}"
        return tune(
            bundle,
            task,
            data=data,
            engine="ort",
            threads=1,
            output=output,
            settings=settings,
            progress=False,
        )

    def pair_task(self) -> Path:
        """The demo's rows, each text in two halves."""
        folder = self.work / "pair-data"
        folder.mkdir()
        for split in ("train", "test"):
            rows = [
                json.loads(line)
                for line in (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
            ]
            halves = [
                (row["text"][: len(row["text"]) // 2], row["text"][len(row["text"]) // 2 :])
                for row in rows
            ]
            lines = [
                json.dumps({"first": first, "second": second, "label": row["label"]})
                for (first, second), row in zip(halves, rows, strict=True)
            ]
            (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        file = folder / "pair.toml"
        words = '["sports", "financial", "computer", "health"]'
        file.write_text(
            'name = "pair"\ntext = ["first", "second"]\nn_classes = 4\n'
            f'[templates]\nmasked = "{{first}} ? {{mask}} , {{second}}"\n[label_words]\nmasked = '
            f"{words}\n",
            encoding="utf-8",
        )
        return file


# The loaders


def python_environment(name: str, work: Path) -> Path:
    """An environment with the pinned requirements of a loader, made once for each of their
    versions.
    """
    requirements = HERE / f"requirements-{name}.txt"
    stamp = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    place = work / f"{name}-{stamp}"
    if not (place / "installed").exists():
        shutil.rmtree(place, ignore_errors=True)
        venv.create(place, with_pip=True)
        command = [place / "bin" / "pip", "install", "--quiet", "-r", requirements]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise Skipped(f"pip: {(done.stderr.strip().splitlines() or ['failed'])[-1]:.200}")
        (place / "installed").touch()
    return place


def in_python(script: str) -> Load:
    """A script in an environment of Python."""

    def load(place: Path, work: Path, cases: list[Case]) -> Loaded:
        return exchange([str(place / "bin" / "python"), str(HERE / script)], work, cases, HERE)

    return load


def node_modules(work: Path) -> Path:
    """A folder with what package-lock.json names, without running any script of a package."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise Skipped("Node.js with npm is not installed")
    stamp = hashlib.sha256((HERE / "package-lock.json").read_bytes()).hexdigest()[:12]
    place = work / f"node-{stamp}"
    if not (place / "installed").exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copyfile(HERE / name, place / name)
        done = subprocess.run(
            [npm, "ci", "--ignore-scripts"], cwd=place, capture_output=True, text=True
        )
        if done.returncode:
            raise Skipped(f"npm: {(done.stderr.strip().splitlines() or ['failed'])[-1]:.200}")
        (place / "installed").touch()
    for script in HERE.glob("*.mjs"):  # modules are found beside the script
        shutil.copyfile(script, place / script.name)
    return place


def transformers_js(place: Path, work: Path, cases: list[Case]) -> Loaded:
    return exchange(["node", str(place / "transformers_js.mjs")], work, cases, place)


def find_chromium() -> str:
    found = shutil.which("chromium")
    if found is None:
        raise Skipped("Chromium is not installed (Debian: apt-get install chromium)")
    return found


def check_reports(place: Path, work: Path) -> str:
    """Report pages in headless Chromium, by keyboard, pointer and axe's rules; what was checked
    with what.
    """
    chromium, folder = find_chromium(), work / "reports"
    shutil.rmtree(folder, ignore_errors=True)
    names = write_reports(folder)
    with served(folder) as url:
        axe = called(
            ["node", "reports.mjs", str(work / "screenshots"), chromium, url, *names], place
        ).strip()
    return (
        f"Report pages ({', '.join(names)}): no violation of axe-core {axe}, sorted by "
        "keyboard, hover values."
    )


def browser(place: Path, work: Path, cases: list[Case]) -> Loaded:
    """Each page in headless Chromium; screenshots in WORK/screenshots."""
    chromium = find_chromium()
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        shots = work / "screenshots" / case.name
        texts, out = work / "texts.json", work / "page.json"
        texts.write_text(json.dumps(case.texts), encoding="utf-8")
        with served(case.folder) as url:
            called(["node", "browser.mjs", url, str(texts), str(out), str(shots), chromium], place)
        labels = json.loads((case.folder / "bbt_accel.json").read_text(encoding="utf-8"))["labels"]
        results = json.loads(out.read_text(encoding="utf-8"))["found"]
        found[case.name] = {
            "page": [[row["probabilities"][label] for label in labels] for row in results]
        }
    version = subprocess.run([chromium, "--version"], capture_output=True, text=True).stdout.split()
    lock = json.loads((place / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    ort = lock["node_modules/onnxruntime-web"]["version"]
    return Loaded(
        {"chromium": version[1] if len(version) > 1 else "?", "onnxruntime-web": ort}, found
    )


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder that python's http.server serves."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()


def exchange(command: list[str], work: Path, cases: list[Case], place: Path) -> Loaded:
    """Call a loader's script with all cases, and read what it found."""
    request, reply = work / "request.json", work / "reply.json"
    given = {
        case.name: {
            "folder": str(case.folder), "model": case.model, "texts": case.texts,
            "checkpoint": case.checkpoint,
            "listed": case.name.split("-")[0] in LISTED,
        }
        for case in cases
    }  # fmt: skip
    request.write_text(json.dumps(given), encoding="utf-8")
    called([*command, str(request), str(reply)], place)
    return Loaded(**json.loads(reply.read_text(encoding="utf-8")))


def called(command: list[str], place: Path) -> str:
    """What a command prints, without this Python's settings; scripts find each other. Raises
    RuntimeError.
    """
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }
    environment |= {"PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=place, capture_output=True, text=True, errors="replace", env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:2])} failed:\n{done.stderr[-3000:]}")
    return done.stdout


@dataclass(frozen=True)
class Loader:
    """kind: of the packages that it loads. environment: makes the folder that it needs in WORK, and
    returns it.
    """

    kind: str
    environment: Callable[[Path], Path]
    load: Load


LOADERS = {
    "optimum-onnx": Loader(
        "onnx", partial(python_environment, "optimum-onnx"), in_python("optimum_onnx.py")
    ),
    "optimum-intel": Loader(
        "openvino",
        partial(python_environment, "optimum-openvino"),
        in_python("optimum_openvino.py"),
    ),
    "transformers.js": Loader("onnx", node_modules, transformers_js),
    "browser": Loader("web", node_modules, browser),
    "peft": Loader("peft", partial(python_environment, "peft"), in_python("peft_adapter.py")),
}


# The comparison


@dataclass
class Report:
    lines: list[str] = field(
        default_factory=lambda: [
            "| loader | package | precision | texts | largest difference | labels |",
            "|---|---|---|---|---|---|",
        ]
    )
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def of(self, loader: str) -> Iterator[None]:
        """What is skipped or fails in the block is a line."""
        try:
            yield
        except Skipped as reason:
            self.lines.append(f"| {loader} | | | | skipped: {reason} | |")
        except RuntimeError as error:
            self.failures.append(f"{loader}: {error}")

    def add(self, loader: str, versions: dict[str, str], case: Case, modes: dict[str, Any]) -> None:
        name = f"{loader}: " + ", ".join(f"{own} {version}" for own, version in versions.items())
        errors, same = [], []
        for rows in modes.values():
            error = np.abs(np.array(rows) - case.wanted).max(1)
            margin = np.diff(np.sort(case.wanted, axis=1)[:, -2:], axis=1)[:, 0]
            errors.append(error.max())
            same.append((np.argmax(rows, 1) == case.wanted.argmax(1)) | (margin <= 2 * error))
        ok = max(errors) <= TOLERANCE[case.precision] and np.all(same)
        labels = "equal" if ok else "DIFFERENT"
        count = f"{len(case.texts)} ({', '.join(modes)})"
        self.lines.append(
            f"| {name} | {case.name} | {case.precision} | {count} | {max(errors):.1e} | {labels} |"
        )
        if not ok:
            self.failures.append(f"{loader}, {case.name}: {max(errors):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("loaders", nargs="*", choices=[[], *LOADERS])
    parser.add_argument("-o", "--output", type=Path, default=Path("build/foreign/report.md"))
    parser.add_argument("--work", type=Path, default=Path("build/foreign"))
    options = parser.parse_args()
    work: Path = options.work.absolute()
    packages = Packages(work / "packages")
    report, names = Report(), options.loaders or list(LOADERS)
    with ThreadPoolExecutor(1) as pool:  # environments are installed while packages are made
        places = {name: pool.submit(LOADERS[name].environment, work) for name in names}
        packages.demo()
        packages.others()
        for name in names:
            own = [case for case in packages.cases if case.kind == LOADERS[name].kind]
            with report.of(name):
                loaded = LOADERS[name].load(places[name].result(), work, own)
                for case in own:
                    report.add(name, loaded.versions, case, loaded.found[case.name])
        if "browser" in names:
            with report.of("reports"):
                report.lines += ["", check_reports(places["browser"].result(), work)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("\n".join(report.lines) + "\n", encoding="utf-8")
    print("\n".join(report.lines))
    if report.failures:
        sys.exit("\n".join(report.failures))


if __name__ == "__main__":
    main()

"""Packages for the browser: a static folder with a page, the model, and the libraries that run it.

The page tokenizes with transformers.js and runs the graph in onnxruntime-web, which npm fetches at
these versions. Both are files of the folder, so the page makes no request to another host.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bbt_accel.errors import MissingDependency, PackageError

PAGE = Path(__file__).parent / "page"
"""What a package has besides the libraries: the page, and the licence of ONNX Runtime, which npm's
archive lacks.
"""
VENDOR = "vendor"
LARGEST = 2**31
"""Bytes of a model that a browser takes as one file."""


@dataclass(frozen=True)
class NpmPackage:
    """A package of npm: its version, the hash of its archive, and the files of it that the page
    needs by new names.
    """

    name: str
    version: str
    integrity: str
    files: dict[str, str]

    @property
    def specifier(self) -> str:
        return f"{self.name}@{self.version}"


PACKAGES = (
    NpmPackage(
        "@huggingface/transformers",
        "4.3.1",
        "sha512-5+voSeUCFK6PCKlY15dPhNOKq3/zOTxDN7oC+Wy9dFb1QZ0TSQomZRRy7URRK8YRuUoE9fGMQTTPC5d/pWBJhA==",
        {"dist/transformers.web.min.js": "transformers.js", "LICENSE": "transformers.LICENSE"},
    ),
    NpmPackage(
        "onnxruntime-web",
        "1.31.0-dev.20260914-8d85527a0",
        "sha512-Iy7rtadoBgxS/LLvDr3QW38DB1PNXRnr0GJMcL0TAt7c9qjgVQl83UlGCVyeAnK2InpmW8Uc3PL8XIuqtDeF6g==",
        {
            "dist/ort.wasm.bundle.min.mjs": "ort.js",
            "dist/ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
        },
    ),
)
IMPORTS = {
    'from"onnxruntime-web/webgpu"': 'from"./ort.js"',
    'from"onnxruntime-common"': 'from"./ort.js"',
}
"""In transformers.js: bare names, which a browser does not find, and the file that stands for
both.
"""


def write_page(folder: Path, model: Path) -> None:
    """Write the page into a folder that has the model. Raises PackageError for one that is too
    large for a browser.
    """
    if sum(file.stat().st_size for file in model.parent.iterdir()) > LARGEST:
        raise PackageError(
            "the model is larger than the 2 GiB that a browser takes; use --int8 or a smaller "
            "backbone"
        )
    for file in (
        file for file in PAGE.rglob("*") if file.is_file()
    ):  # copytree would copy a folder's read-only mode
        target = folder / file.relative_to(PAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def add_libraries(folder: Path) -> None:
    """Add the libraries of the page to its folder. Raises PackageError if npm fails,
    MissingDependency without it.
    """
    (folder / VENDOR).mkdir()
    with tempfile.TemporaryDirectory(prefix="bbt-accel-") as place:
        for package, archive in zip(PACKAGES, fetch(Path(place)), strict=True):
            unpack(package, archive, folder / VENDOR)
    library = folder / VENDOR / "transformers.js"
    content = library.read_text(encoding="utf-8")
    for bare, own in IMPORTS.items():
        if content.count(bare) != 1:
            raise PackageError(f"{PACKAGES[0].specifier} is not as expected: it has no {bare}")
        content = content.replace(bare, own)
    library.write_text(content, encoding="utf-8")


def fetch(folder: Path) -> list[Path]:
    """The archives of `PACKAGES`, by npm or from its cache; no script of a package is run."""
    npm = shutil.which("npm")
    if npm is None:
        raise MissingDependency(
            "the page's libraries come from npm, which is not installed; install Node.js with npm"
        )
    names = [package.specifier for package in PACKAGES]
    command = [npm, "pack", "--ignore-scripts", "--prefer-offline", "--json", "--silent", *names]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[0]
        raise PackageError(
            f"npm cannot fetch {', '.join(names)} ({reason:.200}); is the network there?"
        )
    files = (entry["filename"] for entry in json.loads(done.stdout))
    return [
        folder / file.removeprefix("@").replace("/", "-") for file in files
    ]  # npm 8 writes the package's name


def integrity(archive: Path) -> str:
    """The hash of an archive as npm's registry writes it."""
    return f"sha512-{base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()}"


def unpack(package: NpmPackage, archive: Path, folder: Path) -> None:
    """Raises PackageError for an archive with another hash than that of the version's release."""
    if integrity(archive) != package.integrity:
        raise PackageError(
            f"npm's archive of {package.specifier} has another sha512 than its release; do not "
            "use it"
        )
    with tarfile.open(archive) as files:
        for name, target in package.files.items():
            member = files.extractfile(f"package/{name}")
            assert member is not None
            (folder / target).write_bytes(member.read())

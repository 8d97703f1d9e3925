"""What all tests share: no network, a fixed number of threads, and bundles that are exported once a
session.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from bbt_accel.core.bundle import Bundle
from bbt_accel.core.option_types import MAX_RMSE
from bbt_accel.engines.base import Engine
from bbt_accel.engines.registry import load_engine
from bbt_accel.io.files import reserved

# Child processes find modules beside this file as pytest does, for `dummy_engine`, an engine that
# is a plug-in of the tests.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
)

THREADS = 1
"""More than one wait for each other where the machine is shared, and gain nothing on tiny
backbones.
"""


def pytest_collection_finish() -> None:
    """What has been imported stays: every export collects garbage, which takes a second among so
    many objects.
    """
    gc.collect()
    gc.freeze()


Export = Callable[..., Bundle]
Load = Callable[..., Engine]


def blank_plot(file: Path, *given: object) -> None:
    """As little as a report takes for its plot: drawing one takes longer than most tests."""
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"><metadata/></svg>'
    file.write_bytes(svg.encode() if file.suffix == ".svg" else b"\x89PNG")


@pytest.fixture(scope="session", autouse=True)
def _no_curves() -> Iterator[None]:
    """The plot of a search takes longer than the search itself here; test_learning_curve.py draws
    it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bbt_accel.search.workspace.draw_curve", blank_plot)
        yield


@pytest.fixture
def without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports without their graphs, which PyTorch does not read: tracing takes most of the time."""
    from bbt_accel.exporters.trace import export

    monkeypatch.setattr(export, "trace", lambda *given: [])
    monkeypatch.setattr(export, "validated", lambda folder: 0.0)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test run share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def exported(shared: Path) -> Iterator[Export]:
    """`exported(checkpoint, method, mode, n)`: a bundle, made at the first call. Not to be changed
    by a test.

    The validation against eager PyTorch that ends every export runs in this process here, which
    saves half of the time.
    """
    torch = pytest.importorskip("torch")
    from bbt_accel.exporters.trace import export, validate

    torch.set_num_threads(THREADS)
    made: dict[tuple[object, ...], Bundle] = {}

    def call(
        checkpoint: Path,
        method: str = "bbt",
        mode: str = "add",
        n: int = 10,
        without: tuple[str, ...] = (),
    ) -> Bundle:
        key = (checkpoint, method, mode, n, without)
        if key not in made:
            output = (
                shared
                / sha256(repr(key).encode()).hexdigest()[:12]
                / f"{checkpoint.name}-{method}-{mode}"
            )
            options = {
                "method": method,
                "prompt_mode": mode,
                "n_prompt_tokens": n,
                "without": without,
            }
            with reserved(Path(f"{output.parent}.making"), patience=math.inf):
                if not output.exists():
                    export.export_bundle(checkpoint, output, **options)  # type: ignore[arg-type]
            made[key] = Bundle.read(output, verify=False)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "validated", validate.validate)
        yield call


@pytest.fixture(scope="session")
def tiny(exported: Export, shared: Path) -> Export:
    """`tiny(name, method, mode, without)`: the bundle of a tiny backbone, with few prompt
    tokens.
    """
    from tiny_backbones import N_PROMPT, save_recorded_backbone

    def call(
        name: str, method: str = "bbt", mode: str = "add", without: tuple[str, ...] = ()
    ) -> Bundle:
        checkpoint = shared / name
        with reserved(Path(f"{checkpoint}.making"), patience=math.inf):
            if not checkpoint.exists():
                save_recorded_backbone(name, checkpoint)
        return exported(checkpoint, method, mode, N_PROMPT, without)

    return call


@pytest.fixture(scope="session")
def optimized(tiny: Export, shared: Path) -> Export:
    """`optimized(variant, precision, target, max_rmse)`: of a bundle of `tiny`. Not to be changed
    by a test.
    """
    from bbt_accel.exporters.convert.optimize import optimize_bundle

    folder = shared / "optimized"
    folder.mkdir(exist_ok=True)

    def call(
        variant: tuple[str, str, str],
        precision: str = "fp32",
        target: str = "ort",
        max_rmse: float = MAX_RMSE,
    ) -> Bundle:
        output = folder / "-".join((*variant, target, precision, str(max_rmse)))
        with reserved(Path(f"{output}.making"), patience=math.inf):
            if not output.exists():
                options = {"precision": precision, "target": target, "max_rmse": max_rmse}
                optimize_bundle(tiny(*variant).path, output, **options)  # type: ignore[arg-type]
        return Bundle.read(output, verify=False)

    return call


@pytest.fixture(scope="session")
def bundle_cache(tiny: Export, exported: Export, shared: Path) -> Path:
    """A folder for BBT_ACCEL_CACHE, with the bundles of the demo and of the tiny roberta in
    `shared`.
    """
    from tiny_backbones import N_PROMPT

    from bbt_accel.predict.bundle_cache import CACHE, cache_folder

    folder = shared / "cache"
    folder.mkdir(exist_ok=True)
    bundles = [
        (str(shared / "roberta"), N_PROMPT, tiny("roberta")),
        ("demo", 20, exported(Path("demo"), n=20)),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(folder))
        for backbone, n, made in bundles:
            place = cache_folder(backbone, "bbt", "add", n)
            with reserved(Path(f"{place}.making"), patience=math.inf):
                if not place.exists():
                    shutil.copytree(made.path, f"{place}.new")
                    os.rename(f"{place}.new", place)
    return folder


@pytest.fixture(scope="session")
def loaded() -> Iterator[Load]:
    """`loaded(bundle, engine)`: an engine, loaded at the first call and closed at the end."""
    with contextlib.ExitStack() as stack:
        made: dict[tuple[object, ...], Engine] = {}

        def call(bundle: Bundle, name: str) -> Engine:
            key = (bundle.path, name)
            if key not in made:
                made[key] = stack.enter_context(load_engine(bundle, name, threads=THREADS))
            return made[key]

        yield call


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of this machine, started once a module, with CPUs that are only counted."""
    pytest.importorskip("ray", reason="ray is not installed")
    from bbt_accel.io.cluster import connect

    with connect("local", 4):
        yield


def one_line(call: Callable[[], object], error: type[Exception]) -> str:
    """The message of an error, which has one line."""
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)

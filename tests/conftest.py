"""What all tests share: no network, a fixed number of threads, and bundles that are exported once a session."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from bbt_accel.bundle import Bundle
from bbt_accel.engines.base import Engine
from bbt_accel.engines.registry import load_engine

THREADS = 1
"""More than one wait for each other where the machine is shared, and gain nothing on tiny backbones."""

Export = Callable[..., Bundle]
Load = Callable[..., Engine]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Export]:
    """`exported(checkpoint, method, mode, n)`: a bundle, made at the first call. Not to be changed by a test.

    The validation against eager PyTorch that ends every export runs in this process here, which saves half of the time.
    """
    torch = pytest.importorskip("torch")
    from bbt_accel.exporters import export, validate

    torch.set_num_threads(THREADS)
    made: dict[tuple[object, ...], Bundle] = {}

    def call(
        checkpoint: Path, method: str = "bbt", mode: str = "add", n: int = 10, without: tuple[str, ...] = ()
    ) -> Bundle:
        key = (checkpoint, method, mode, n, without)
        if key not in made:
            output = tmp_path_factory.mktemp("exported") / f"{checkpoint.name}-{method}-{mode}"
            made[key] = export.export_bundle(
                checkpoint,
                output,
                method=method,
                prompt_mode=mode,
                n_prompt_tokens=n,
                without=without,  # type: ignore[arg-type]
            )
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "validated", validate.validate)
        yield call


@pytest.fixture(scope="session")
def tiny(exported: Export, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """`tiny(name, method, mode, without)`: the bundle of a tiny backbone, with few prompt tokens."""
    from tiny_backbones import N_PROMPT, save_recorded_backbone

    root = tmp_path_factory.mktemp("checkpoints")

    def call(name: str, method: str = "bbt", mode: str = "add", without: tuple[str, ...] = ()) -> Bundle:
        checkpoint = root / name
        if not checkpoint.exists():
            save_recorded_backbone(name, checkpoint)
        return exported(checkpoint, method, mode, N_PROMPT, without)

    return call


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
    from bbt_accel.cluster import connect

    with connect("local", 4):
        yield

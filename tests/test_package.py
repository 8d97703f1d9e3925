"""Packages: what another tool computes from the folder alone is what `predict` computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Export

pytest.importorskip("torch")

from package_parts import TEXTS, Foreign, tuned
from tiny_backbones import VARIANTS

from bbt_accel.inference import predict
from bbt_accel.packaging.package import Options, package_run
from bbt_accel.run import Run

HARD = ["", "  ", "[MASK] </s> <mask> it", "👩‍🚀 é 東京", "was " * 120]


def packaged(run: Run, folder: Path, **options: Any) -> Foreign:
    info = package_run(run.path, folder, Options(**{"threads": 1, **options}))
    return Foreign(folder, info.model)


def wanted(run: Run, texts: list[Any]) -> Any:
    rows = [dict(zip(run.task.text, [text] if isinstance(text, str) else text, strict=True)) for text in texts]
    found = predict(run.path, rows, threads=1)
    return np.array([list(answer["probabilities"].values()) for answer in found])


@pytest.mark.parametrize(("name", "method", "mode"), VARIANTS)
def test_a_package_computes_what_predict_computes(
    tiny: Export, tmp_path: Path, name: str, method: str, mode: str
) -> None:
    run = tuned(tiny(name, method, mode), tmp_path)
    foreign = packaged(run, tmp_path / "package")
    texts = TEXTS + HARD
    assert foreign.probabilities(texts) == pytest.approx(wanted(run, texts), abs=1e-5)

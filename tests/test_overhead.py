"""Where the time of a search goes."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from conftest import Export

from bbt_accel.benchmarks.overhead import measure, table


@pytest.mark.parametrize("method", ["bbt", "bbtv2"])
def test_every_part_of_a_generation_is_accounted_for(tiny: Export, method: str) -> None:
    found = measure(tiny("roberta", method, "add"), "demo", "ort", 1, 2, "command")
    assert set(found.ms) == {"model", "CMA-ES", "projection", "loss", "the rest"}
    assert all(ms > 0 for ms in found.ms.values())
    assert sum(found.ms.values()) == pytest.approx(found.ms_generation)
    assert found.outside == pytest.approx(1 - found.ms["model"] / found.ms_generation)
    assert all(part in table(found) for part in found.ms)

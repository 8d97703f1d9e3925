"""Bundles of one backbone for every engine and precision, made in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bbt_accel import processes
from bbt_accel.engine_specs import EngineSpec
from bbt_accel.errors import BbtError
from bbt_accel.optimizations import in_graph


def export(**arguments: Any) -> None:
    """Calls `export_bundle`."""
    from bbt_accel.exporters.export import export_bundle

    export_bundle(**arguments)


def optimize(data: str | None = None, **arguments: Any) -> None:
    """Calls `optimize_bundle`."""
    from bbt_accel.exporters.optimize import optimize_bundle

    optimize_bundle(data=None if data is None else Path(data), **arguments)


def conversion(spec: EngineSpec, precision: str) -> dict[str, str] | None:
    """Target and precision of the bundle that an engine reads; None for the bundle as exported."""
    if precision == "fp32" and "onnx" in spec.reads and "fp32" not in spec.optimized:
        return None
    target = spec.name if spec.optimized else next(name for name in spec.reads if name != "onnx")
    return {"target": target, "precision": precision}


class Bundles:
    """The bundles of a backbone in the folder `work`, each made when it is first needed. Failures are remembered.

    exporting, optimizing: further arguments of `export_bundle` and `optimize_bundle`.
    """

    def __init__(self, work: Path, backbone: str | Path, exporting: dict[str, Any], **optimizing: Any) -> None:
        self.work, self.backbone, self.exporting, self.optimizing = work, backbone, exporting, optimizing
        self._made: dict[str, Path | BbtError] = {}

    def exported(self, without: Sequence[str] = ()) -> Path:
        """The exported bundle whose graphs have these optimizations switched off. Raises BbtError."""
        arguments = {"backbone": self.backbone, "without": list(without), **self.exporting}
        return self._make(["exported", *without], export, arguments)

    def bundle(self, spec: EngineSpec, precision: str, without: Sequence[str] = ()) -> Path:
        """The bundle that an engine reads at a precision. Raises BbtError."""
        off, wanted = in_graph(without), conversion(spec, precision)
        if wanted is None:
            return self.exported(off)
        arguments = {"source": self.exported(off), **wanted, **self.optimizing}
        return self._make([*wanted.values(), *off], optimize, arguments)

    def _make(self, words: Sequence[str], step: Callable[..., None], arguments: dict[str, Any]) -> Path:
        name = "-".join(words)
        if name not in self._made:
            try:
                processes.call(step, output=self.work / name, **arguments)
                self._made[name] = self.work / name
            except BbtError as error:
                self._made[name] = error
        if isinstance(found := self._made[name], BbtError):
            raise found
        return found

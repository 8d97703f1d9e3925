"""The plans of a whole bundle, from its cache or built now, with progress: a build takes from
seconds to minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from time import monotonic
from typing import Any

from bbt_accel.core.bundle import Bundle
from bbt_accel.engines.plans import Key, build, find_plan, keep_plan
from bbt_accel.engines.trt_api import Api
from bbt_accel.io.progress import Tell

PARTS = 100
"""Parts of a plan that progress is counted in."""
EXPECTED = "this takes minutes, and is done once per GPU, driver and profile"
"""An estimate for TensorRT, which times kernels as it builds; TensorRT for RTX needs seconds."""


def each_plan(
    bundle: Bundle, wanted: dict[str, Key], api: Api, announce: Callable[[str], None], tell: Tell
) -> Iterator[tuple[str, bytes]]:
    """Every stage and its plan, one at a time; those that the cache lacks are built.

    announce: gets a line when the first is built, with the reason, and one for each that cannot be
    cached. Raises PlanError.
    """
    progress = PlanProgress(len(wanted), tell)
    for done, (stage, key) in enumerate(wanted.items()):
        plan, why = find_plan(bundle.path, stage, key)
        if plan is None:
            if not progress.built:
                name = key.gpu or ", ".join(key.capability)
                announce(f"building TensorRT plans for {name}, {stage} first: {why}; {EXPECTED}")
                rest = list(wanted.items())[done:]
                progress.start(sum(find_plan(bundle.path, *other)[0] is None for other in rest))
            monitor = progress.begin(stage, done, api)
            plan, record = build(api, bundle, stage, key, monitor)
            keep_plan(bundle, stage, key, plan, record, announce)
            progress.built += 1
        yield stage, plan


class PlanProgress:
    """How far the plans of a bundle are, and from the first on how long the rest will take."""

    def __init__(self, plans: int, tell: Tell) -> None:
        self.plans, self.tell, self.built = plans, tell, 0

    def start(self, missing: int) -> None:
        """The first of so many plans that the cache lacks is built next."""
        self.missing, self.started = missing, monotonic()

    def begin(self, stage: str, done: int, api: Api) -> Any:
        """Begin a plan; returns TensorRT's monitor of its build."""
        words = f"plan of {stage}, {done + 1} of {self.plans}"
        if self.built:
            left = (monotonic() - self.started) / self.built * (self.missing - self.built)
            words += f", about {timedelta(seconds=round(left))} left"
        self.tell(words, done * PARTS, self.plans * PARTS)
        return new_monitor(
            api, lambda share: self.tell(words, int((done + share) * PARTS), self.plans * PARTS)
        )


def new_monitor(api: Api, report: Callable[[float], None]) -> Any:
    """A progress monitor that reports the share of a build that is done, 0 to 1; None where
    TensorRT has none.
    """
    if not hasattr(api.module, "IProgressMonitor"):
        return None

    class Monitor(api.module.IProgressMonitor):  # type: ignore[name-defined,misc]
        """Phases are nested: a phase is the current step of its parent."""

        def __init__(self) -> None:
            api.module.IProgressMonitor.__init__(self)
            self.phases: dict[
                str, list[int]
            ] = {}  # name → steps done, and their number; the outermost first

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = [0, max(1, num_steps)]

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.phases:
                self.phases[phase_name][0] = step + 1
            report(self.share())
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

        def share(self) -> float:
            found, width = 0.0, 1.0
            for done, steps in list(self.phases.values()):
                found, width = found + width * min(1.0, done / steps), width / steps
            return min(1.0, found)

    return Monitor()

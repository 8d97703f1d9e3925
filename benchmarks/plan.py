"""Which rows a benchmark has."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from bbt_accel.bundle import Method
from bbt_accel.errors import UsageError
from bbt_accel.savings import SAVINGS, check_savings

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
POSSIBLE = {
    "torch": ("fp32",),
    "ort": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "int8"),
    "trt": ("fp32", "fp16", "bf16"),
    "dummy": ("fp32",),
}
"""Engine → precisions that make sense for it. `dummy` computes nothing and is for tests."""
USUAL = {"torch": ("fp32",), "ort": ("fp32", "fp16", "int8"), "openvino": ("fp32", "int8"), "trt": ("fp16",)}
"""Engine → precisions that are measured unless others are asked for."""


@dataclass(frozen=True)
class Case:
    """One row to be measured; `problem` says why it cannot be."""

    engine: str
    precision: str
    without: tuple[str, ...] = ()
    problem: str | None = None
    saving: bool = False
    """Measured for what its savings bring; not tuned, for its numbers are those of the row with the savings."""


EAGER = Case("eager", "fp32")


def plan(
    engines: Sequence[str] | None,
    precisions: Sequence[str] | None,
    without: Sequence[str] = (),
    savings: bool = False,
    method: Method = "bbt",
) -> list[Case]:
    """The rows after the eager one, in the order of the arguments.

    An engine and a precision that do not go together are left out, unless both were asked for: then the row says so.
    savings: for each engine, at its first precision, one row more for each saving switched off and one for all.
    Raises UsageError for an unknown name, or when nothing is left.
    """
    _check(engines, POSSIBLE, "engines")
    _check(precisions, PRECISIONS, "precisions")
    off = tuple(sorted(check_savings(without)))
    cases = []
    for engine in dict.fromkeys(USUAL if engines is None else engines):
        if engine == "eager":
            continue  # is always there
        possible = POSSIBLE[engine]
        found = [
            Case(engine, precision, off, None if precision in possible else f"{engine} takes {', '.join(possible)}")
            for precision in dict.fromkeys(USUAL.get(engine, possible) if precisions is None else precisions)
        ]
        if engines is None or precisions is None:
            found = [case for case in found if case.problem is None]
        cases += found
        if savings and found and found[0].problem is None:
            cases += [Case(engine, found[0].precision, names, saving=True) for names in switched_off(method, off)]
    if not cases and engines is None:
        raise UsageError(f"no engine takes the precisions {', '.join(precisions or ())}")
    return cases


def switched_off(method: Method, off: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Each saving of the method alone, then all of them; on top of those that are off anyway.

    Which of them the backbone's family has is known when it is exported: see `Harness.prepare`.
    """
    names = [name for name, saving in SAVINGS.items() if name not in off and saving.method in (None, method)]
    each = [(*off, name) for name in names]
    return [*each, (*off, *names)] if len(names) > 1 else each


def _check(given: Sequence[str] | None, known: Sequence[str] | dict[str, tuple[str, ...]], what: str) -> None:
    if given is not None and not given:
        raise UsageError(f"--{what} names none; known are {', '.join(known)}")
    for name in given or ():
        if name not in known and name != "eager":
            near = difflib.get_close_matches(name, list(known), n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise UsageError(f"--{what} does not know {name!r}; {hint}")

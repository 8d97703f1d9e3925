"""Settings of a search, with their limits and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from bbt_accel.core.bundle import BundleInfo
from bbt_accel.core.option_types import Budget, Demonstrations, KShot, Seed
from bbt_accel.errors import UsageError, check_known, first_problem

Loss = Literal["ce", "hinge", "perf"]
ReadoutName = Literal[
    "verbalizer", "calibrated", "found", "prototype", "words", "state", "mean", "states", "ensemble"
]
READOUTS: tuple[ReadoutName, ...] = get_args(ReadoutName)
FITTED = tuple(name for name in READOUTS if name != "verbalizer")
"""Readouts that are fitted on labelled rows."""
ReadoutChoice = Literal["auto", ReadoutName]
Preset = Literal["paper"]
PRESETS: dict[Preset, dict[str, object]] = {"paper": {"readout": "verbalizer"}}
"""Settings besides the tasks' own. `paper`: the search of the original program, bit for bit."""
Metric = Literal["accuracy", "f1"]


class Settings(BaseModel, frozen=True, extra="forbid"):
    """Everything that determines a search, besides the bundle, the task and its rows."""

    k_shot: KShot = 16
    intrinsic_dim: int = Field(default=500, ge=2, description="Dimension d of the search space.")
    # With fewer than 4, pycma does not update the step size.
    popsize: int = Field(default=20, ge=4, description="Candidates per generation, P.")
    budget: Budget = 8000
    sigma: FiniteFloat = Field(default=1.0, gt=0, description="Initial step size of CMA-ES.")
    alpha: FiniteFloat = Field(default=1.0, gt=0, description="Scale of the normal projection.")
    bound: FiniteFloat = Field(
        default=0.0, ge=0, description="Half width of the box that z is kept in; 0 for none."
    )
    loss: Loss = Field(
        default="ce", description="Loss to minimize; hinge and perf are for --readout verbalizer."
    )
    eval_every: int = Field(
        default=100, ge=1, description="Calls between two evaluations on the dev set."
    )
    seed: Seed = 42
    demonstrations: Demonstrations = 0
    readout: ReadoutChoice = Field(
        default="auto", description=f"How classes are read: auto, {', '.join(READOUTS)}."
    )
    allow_rare_classes: bool = Field(
        default=False,
        description="Of a class with too few rows for --k-shot, use up to a third each for train "
        "and for dev (half without hold_out).",
    )
    hold_out: bool = Field(
        default=False, description="Use the train rows that the search leaves over as test rows."
    )
    covariance: Literal["full", "diagonal"] = Field(
        default="full",
        description="What CMA-ES adapts; diagonal (separable CMA-ES) learns d numbers, full d²/2.",
    )
    random_proj: Literal["normal", "uniform"] = Field(
        default="normal", description="The projection's distribution."
    )

    def generations(self, layers: int) -> int:
        """Generations within the budget, in whole sweeps over the layers that are searched.

        A fitted readout takes the first call, and needs no search. Without one, raises UsageError
        if there are none.
        """
        turn = self.turn(layers)
        if self.fitted:
            return (self.budget - 1) // turn * layers
        if self.budget < turn:
            need = f"popsize {self.popsize}" + ("" if layers == 1 else f" times {layers} layers")
            raise UsageError(
                f"budget {self.budget} is too small: a search needs at least {turn} calls ({need})"
            )
        return self.budget // turn * layers

    def check_budget(self) -> None:
        """Raises UsageError, before an export, for a budget without a generation of a single
        layer.
        """
        self.generations(1)

    def turn(self, layers: int) -> int:
        """Calls of one generation for each layer that is searched, the least that a search can
        spend.
        """
        return self.popsize * layers

    def calls(self, generations: int) -> int:
        """Calls after so many generations."""
        return generations * self.popsize + self.fitted

    def scores_dev(self, number: int) -> bool:
        """Whether generation `number`, counted from 0, is due for a dev score: it passes a multiple
        of eval_every.
        """
        return self.calls(number + 1) // self.eval_every > self.calls(number) // self.eval_every

    def differences(self, other: Settings) -> dict[str, tuple[object, object]]:
        """Values of both that keep a search with `other` from continuing one with these: a larger
        budget does not.
        """
        pairs = {
            name: (getattr(self, name), getattr(other, name)) for name in Settings.model_fields
        }
        larger = self.budget < other.budget
        return {
            n: (was, now)
            for n, (was, now) in pairs.items()
            if was != now and not (larger and n == "budget")
        }

    @property
    def parts(self) -> int | None:
        """Into how many parts the rows of a rare class are divided: train, dev and test rows; see
        `splits.examples`.
        """
        return (3 if self.hold_out else 2) if self.allow_rare_classes else None

    @property
    def fitted(self) -> bool:
        """Whether the readout is fitted on labelled rows."""
        return self.readout != "verbalizer"


DEFAULTS = Settings()


def resolve(*layers: Mapping[str, object]) -> Settings:
    """Settings from mappings of which a later one overrides an earlier; a value None means not
    given.

    Raises UsageError, in one line, for an unknown name or an invalid value.
    """
    given = {key: value for layer in layers for key, value in layer.items() if value is not None}
    for key in given:
        check_known("setting", key, Settings.model_fields)
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        raise UsageError(
            f"settings: {first_problem(error)}; got {error.errors()[0]['input']!r}"
        ) from None


def as_given(
    settings: Mapping[str, object] | None, preset: Preset | None = None
) -> dict[str, object]:
    """What was given, the preset's settings included, and the readout of a loss that is for one
    alone.
    """
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    implied = {} if given.get("loss") in (None, "ce") else {"readout": "verbalizer"}
    return implied | (PRESETS[preset] if preset else {}) | given


def without_effect(settings: Settings, info: BundleInfo | None = None) -> dict[str, str]:
    """Settings that another one, or this bundle, leaves without effect, each with what an error
    says of it.
    """
    found = dict[str, str]()
    if info is not None and settings.demonstrations and not info.causal:
        problem = f"demonstrations are for decoders; {info.backbone} is an {info.architecture}"
        found["demonstrations"] = problem
    if settings.random_proj == "uniform":
        found["alpha"] = (
            "--alpha is the scale of the normal projection; omit it with random_proj=uniform"
        )
    if settings.fitted and settings.loss != "ce":
        found["loss"] = (
            f"--loss {settings.loss} is for --readout verbalizer; others minimize the cross entropy"
        )
    return found


def check_given(
    settings: Settings, given: Mapping[str, object], info: BundleInfo | None = None
) -> None:
    """Raises UsageError for settings that were given and have no effect; those of a task's preset
    are ignored then.

    info: of the bundle, once it is known.
    """
    for name, problem in without_effect(settings, info).items():
        if given.get(name) is not None:
            raise UsageError(problem)

"""Settings of a search: their order of precedence, their limits, and how the budget is divided."""

from __future__ import annotations

import pytest

from bbt_accel.core.settings import Settings, check_given, resolve
from bbt_accel.errors import UsageError


def test_given_values_override_the_preset_which_overrides_the_defaults() -> None:
    settings = resolve({"sigma": 0.2, "budget": 20000}, {"budget": 400, "sigma": None})
    assert (settings.sigma, settings.budget, settings.popsize) == (0.2, 400, 20)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("popsize", 0),
        ("popsize", 3),
        ("budget", -5),
        ("k_shot", 0),
        ("intrinsic_dim", 0),
        ("sigma", 0.0),
        ("sigma", float("nan")),
        ("alpha", float("inf")),
        ("bound", -1.0),
        ("loss", "mse"),
        ("seed", -1),
        ("seed", 2**32),
        ("eval_every", 0),
        ("random_proj", "cauchy"),
        ("budget", "many"),
    ],
)
def test_an_invalid_value_is_one_line_that_names_the_setting(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name) as error:
        resolve({name: value})
    assert "\n" not in str(error.value)


def test_a_misspelt_name_suggests_the_right_one() -> None:
    with pytest.raises(UsageError, match="did you mean popsize"):
        resolve({"pop_size": 3})


def test_alpha_is_refused_where_it_has_no_effect() -> None:
    with pytest.raises(UsageError, match="--alpha is the scale of the normal projection; omit it"):
        check_given(resolve({"random_proj": "uniform"}), {"alpha": 2.0})
    check_given(
        resolve({"alpha": 2.0, "random_proj": "uniform"}), {"random_proj": "uniform"}
    )  # the task's own


def test_generations_never_exceed_the_budget() -> None:
    settings = Settings(readout="verbalizer", popsize=20, budget=110)
    assert settings.generations(1) == 5
    assert settings.generations(2) == 4  # two sweeps of two layers, 80 calls
    assert Settings(readout="verbalizer").generations(1) == 400


def test_a_fitted_readout_takes_one_call_and_needs_no_search() -> None:
    assert Settings(readout="states", popsize=20, budget=100).generations(1) == 4
    assert Settings(readout="auto", popsize=20, budget=101).generations(1) == 5
    assert Settings(budget=1).generations(24) == 0


def test_a_generation_that_passes_a_multiple_of_eval_every_is_scored() -> None:
    for name in ("verbalizer", "calibrated"):
        settings = Settings(readout=name, popsize=20, eval_every=101)  # type: ignore[arg-type]
        due = [settings.calls(number + 1) for number in range(12) if settings.scores_dev(number)]
        assert due == ([120, 220] if name == "verbalizer" else [101, 221])


def test_a_budget_below_one_generation_or_sweep_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 20 calls"):
        Settings(readout="verbalizer", budget=19).generations(1)
    with pytest.raises(UsageError, match="at least 240 calls"):
        Settings(readout="verbalizer", budget=100).generations(12)

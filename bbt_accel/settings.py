"""What a search can be told."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bbt_accel.bundle import Method, first_problem
from bbt_accel.errors import UsageError
from bbt_accel.objective import Loss


class Settings(BaseModel):
    """Everything that decides the course of a search, besides the bundle, the task and its rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    k_shot: int = Field(16, gt=0)
    """Rows a class in the train set, and as many in the dev set."""
    intrinsic_dim: int = Field(500, gt=1)
    """d, the dimension of the search space."""
    popsize: int = Field(20, ge=4)  # pycma's update of the step size needs as many
    """P, candidates a generation."""
    budget: int = Field(8000, gt=0)
    """API calls (one candidate on the train set is one call) that the search may make, never exceeded."""
    sigma: float = Field(1.0, gt=0, allow_inf_nan=False)
    """First step size of CMA-ES."""
    alpha: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Factor of the projection's standard deviation."""
    bound: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Half the side of the box that holds z; 0 for none."""
    loss: Loss = "ce"
    eval_every: int = Field(100, gt=0)
    """API calls between two scorings on the dev set."""
    seed: int = Field(42, ge=0, lt=2**32)
    random_proj: Literal["normal", "uniform"] = "normal"

    def generations(self, method: Method, n_layers: int) -> int:
        """Generations that the budget pays for; in bbtv2 whole sweeps over the layers alone.

        Raises UsageError when it does not pay for one.
        """
        turn = self.popsize if method == "bbt" else self.popsize * n_layers
        if self.budget < turn:
            need = f"popsize {self.popsize}" + ("" if method == "bbt" else f" times {n_layers} layers")
            raise UsageError(f"budget {self.budget} is too small: {method} needs at least {turn} calls ({need})")
        return self.budget // turn * (turn // self.popsize)


def resolve(*layers: Mapping[str, object]) -> Settings:
    """Settings from mappings of which a later one overrides an earlier; a value None means not given.

    Raises UsageError, in one line, for an unknown name or a value that cannot be.
    """
    given = {key: value for layer in layers for key, value in layer.items() if value is not None}
    for key in given:
        if key not in Settings.model_fields:
            close = get_close_matches(key, Settings.model_fields, 1)
            hint = f"did you mean {close[0]}?" if close else f"they are {', '.join(Settings.model_fields)}"
            raise UsageError(f"there is no setting {key!r}; {hint}")
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        raise UsageError(f"settings: {first_problem(error)}; got {error.errors()[0]['input']!r}") from None

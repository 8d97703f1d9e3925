"""What BBT and BBTv2 have in common, as the loop sees them."""

from __future__ import annotations

from typing import Protocol

from bbt_accel.batch import Float32
from bbt_accel.objective import Float64
from bbt_accel.tuning.space import Space


class Strategy(Protocol):
    """A search, one generation at a time: ask, evaluate in `space`, tell."""

    space: Space

    @property
    def layer(self) -> int:
        """The layer whose prompt the next generation searches; 0 in BBT."""

    @property
    def step_size(self) -> float:
        """Step size with which the next generation is drawn."""

    def ask(self) -> Float64:
        """Candidates, float64 (P, d)."""

    def tell(self, candidates: Float64, losses: Float64) -> None:
        """Losses of the candidates, (P,)."""

    def prompt(self) -> Float32:
        """The prompt that the generation told last stands for: float32 (n, H), or (L, n, H) for BBTv2."""

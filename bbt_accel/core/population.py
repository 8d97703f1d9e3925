"""The prompts of a population, as a search evaluates them and as engines take them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from bbt_accel.core.batch import Float32, shape_fits
from bbt_accel.core.bundle import BundleInfo
from bbt_accel.core.projection import Projection
from bbt_accel.errors import UsageError


class Latent:
    """Prompts before their projection, for engines that project on their device.

    Z: (P, d), cast to float32. Length, shape and slices are those of the prompts, (P, n, H).
    A slice still knows the whole population: `project` multiplies all of it, because the last bits
    of a matrix product depend on its size. So a candidate gets the same prompt in every slice; an
    engine that projects `z` on its device gets that but for the last bits.
    Raises UsageError when Z does not fit the projection.
    """

    def __init__(self, projection: Projection, Z: npt.ArrayLike, part: slice = slice(None)) -> None:
        self.projection, self._whole, self._part = projection, projection.check(Z), part

    @property
    def z(self) -> Float32:
        """float32 (P, d)"""
        return self._whole[self._part]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.z), *self.projection.prompt_shape

    def __len__(self) -> int:
        return len(self.z)

    def __getitem__(self, some: slice) -> Latent:
        chosen = range(len(self._whole))[self._part][some]
        return Latent(self.projection, self._whole, slice(chosen.start, chosen.stop, chosen.step))

    def project(self) -> Float32:
        """The prompts, float32 (P, n, H)."""
        return self.projection.prompts(self._whole)[self._part]


LayerPrompts = Float32 | Latent  # one layer's prompts, (P, n, H), projected or not


@dataclass(frozen=True, eq=False)
class Population:
    """P candidate prompts.

    candidates: float32 (P, n, H), or (P, L, n, H) for whole stacks of bbtv2; or `Latent`, never of
    whole stacks.
    layer, fixed: bbtv2, for candidates of one layer: its number, and the prompts of all layers,
        float32 (L, n, H); `fixed[layer]` is ignored.
    """

    candidates: LayerPrompts
    layer: int | None = None
    fixed: Float32 | None = None

    def __len__(self) -> int:
        return len(self.candidates)

    def __getitem__(self, some: slice) -> Population:
        return replace(self, candidates=self.candidates[some])

    def check(self, info: BundleInfo, projects: bool = False) -> Population:
        """The same in contiguous float32, projected unless the engine `projects`. Raises UsageError
        for bad shapes.
        """
        candidates, shape = self.candidates, info.prompt_shape
        if self.layer is not None:
            if info.method != "bbtv2" or not 0 <= self.layer < info.n_layers:
                raise UsageError(
                    f"layer must lie in 0..{info.n_layers - 1} of a bbtv2 bundle; got {self.layer}"
                )
            _check_shape("fixed", () if self.fixed is None else np.shape(self.fixed), shape)
            shape = shape[1:]
        found = candidates.shape if isinstance(candidates, Latent) else np.shape(candidates)
        _check_shape("prompts", found, ("P", *shape))
        if not found[0]:
            raise UsageError("a population needs at least one candidate")
        if isinstance(candidates, Latent):
            candidates = candidates if projects else candidates.project()
        else:
            candidates = np.ascontiguousarray(candidates, dtype=np.float32)
        fixed = None if self.fixed is None else np.ascontiguousarray(self.fixed, dtype=np.float32)
        return Population(candidates, self.layer, fixed)

    def of_layer(self, layer: int) -> LayerPrompts | None:
        """bbtv2: the candidates' prompts of a layer, (P, n, H); None where that layer's prompt is
        fixed.
        """
        if self.layer is not None:
            return self.candidates if layer == self.layer else None
        assert not isinstance(self.candidates, Latent)
        return self.candidates[:, layer]

    def whole(self) -> Population:
        """The same without a fixed part: every candidate of a layer within its stack, (P, L, n,
        H).
        """
        if self.layer is None or self.fixed is None:
            return self
        stacks = np.repeat(self.fixed[None], len(self), axis=0)
        stacks[:, self.layer] = (
            self.candidates.project() if isinstance(self.candidates, Latent) else self.candidates
        )
        return Population(stacks)

    def prompts(self) -> Float32:
        """Projected whole prompts: float32 (P, n, H) or (P, L, n, H)."""
        candidates = self.whole().candidates
        return candidates.project() if isinstance(candidates, Latent) else candidates


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[str | int, ...]) -> None:
    if not shape_fits(found, expected):
        raise UsageError(
            f"{name} must have the shape ({', '.join(map(str, expected))}), not {found}"
        )

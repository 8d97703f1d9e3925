"""The space that is searched: how a layer's z becomes a prompt, and what stands in the other layers meanwhile."""

from __future__ import annotations

import numpy as np
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from bbt_accel.batch import Float32
from bbt_accel.bundle import BundleInfo
from bbt_accel.engines.base import BoundBatch
from bbt_accel.objective import Float64
from bbt_accel.projection import Latent, Projection, Prompts, prompt_std
from bbt_accel.settings import Settings


class Space:
    """One projection a layer (BBT has one in all), each a function of the seed; BBTv2's prompts of all layers.

    Whoever has the same settings and, in BBTv2, the same standard deviations has the same space.

    layer_stds: float32 (L,), BBTv2 alone: the clipped standard deviation of the hidden states that enter each block
        without a prompt; the first is not used, the word embeddings' takes its place.
    """

    def __init__(self, info: BundleInfo, settings: Settings, layer_stds: Float32 | None = None) -> None:
        stds = [info.word_embedding_std, *([] if layer_stds is None else map(float, layer_stds[1:]))]
        self._projections = [make_projection(info, settings, layer, std) for layer, std in enumerate(stds)]
        self._deep = info.method == "bbtv2"
        self._blas = ThreadpoolController()
        self.stack: Float32 = np.zeros(info.prompt_shape if self._deep else 0, np.float32)
        """BBTv2: the prompts that stand in the layers, float32 (L, n, H)."""

    def prompts(self, layer: int, candidates: Float64 | Float32) -> Float32:
        """A z of one layer for a population: (P, d) to float32 (P, n, H)."""
        # One thread, for the last bits of the product depend on their number.
        with self._blas.limit(limits=1, user_api="blas"):
            return self._projections[layer].prompts(candidates)

    def tally(self, rows: BoundBatch, layer: int, candidates: Float64 | Float32, some: slice = slice(None)) -> Float64:
        """Tally of some of a population, float64 (P', 5); the stack stands in the other layers.

        The whole population is projected whatever `some` is: the last bits of the product depend on its size.
        An engine on a GPU projects some alone, and where it computes, so that z is all that is sent.
        """
        prompts: Prompts
        if rows.on_device:
            prompts = Latent(self._projections[layer], candidates[some])
        else:
            prompts = self.prompts(layer, candidates)[some]
        return rows.layer_tally(self.stack, layer, prompts) if self._deep else rows.tally(prompts)


def make_projection(info: BundleInfo, settings: Settings, layer: int, embedding_std: float) -> Projection:
    """The random projection of one layer; the seed decides it, and no two layers share one."""
    rng = np.random.default_rng([settings.seed, layer])
    d, n, H = settings.intrinsic_dim, info.n_prompt_tokens, info.hidden_size
    if settings.random_proj == "uniform":
        return Projection.uniform(rng, d, n, H)
    return Projection.normal(rng, d, n, H, prompt_std(settings.alpha, embedding_std, d, settings.sigma))

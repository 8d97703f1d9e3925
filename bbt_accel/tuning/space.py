"""The search space: how a layer's z becomes a prompt, and the fixed prompts of the other layers."""

from __future__ import annotations

import numpy as np

from bbt_accel.batch import Float32, Float64
from bbt_accel.bundle import BundleInfo
from bbt_accel.population import Latent, Population
from bbt_accel.projection import Projection, prompt_std
from bbt_accel.settings import Settings


class PromptSpace:
    """One projection per layer (BBT has a single one), each a function of the seed; and BBTv2's prompts of all layers.

    The same settings and, for BBTv2, the same standard deviations give the same space, in any process.

    layer_stds: float32 (L,), BBTv2 only: the clipped standard deviation of the hidden states that enter each block
        without a prompt. Layer 0 uses that of the word embeddings instead.
    """

    def __init__(self, info: BundleInfo, settings: Settings, layer_stds: Float32 | None = None) -> None:
        stds = [info.word_embedding_std, *([] if layer_stds is None else map(float, layer_stds[1:]))]
        self._projections = [make_projection(info, settings, layer, std) for layer, std in enumerate(stds)]
        self.stack: Float32 = np.zeros(info.prompt_shape if info.method == "bbtv2" else 0, np.float32)
        """BBTv2: the current prompt of every layer, float32 (L, n, H); empty for BBT."""

    def population(self, layer: int, Z: Float64 | Float32) -> Population:
        """Candidates Z (P, d) for a layer; the other layers' prompts are fixed."""
        latent = Latent(self._projections[layer], Z)
        return Population(latent, layer, self.stack) if self.stack.size else Population(latent)

    def prompt(self, layer: int, z: Float64) -> Float32:
        """A z for one layer: (d,) to float32 (n, H)."""
        prompt: Float32 = self._projections[layer].prompts(z[None])[0]
        return prompt


def make_projection(info: BundleInfo, settings: Settings, layer: int, embedding_std: float) -> Projection:
    """The random projection of one layer. It follows from the seed, and no two layers share one."""
    rng = np.random.default_rng([settings.seed, layer])
    d, n, H = settings.intrinsic_dim, info.n_prompt_tokens, info.hidden_size
    if settings.random_proj == "uniform":
        return Projection.uniform(rng, d, n, H)
    return Projection.normal(rng, d, n, H, prompt_std(settings.alpha, embedding_std, d, settings.sigma))

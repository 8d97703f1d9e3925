"""The interface between the search and whatever runs the backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any

import numpy as np

from bbt_accel.batch import Batch, Float32
from bbt_accel.bundle import Bundle
from bbt_accel.errors import UsageError
from bbt_accel.objective import Float64, tally
from bbt_accel.projection import Latent, Prompts


class BoundBatch(ABC):
    """Rows that an engine holds ready; candidates come and go."""

    on_device = False
    """Whether the engine projects, and tallies, where it computes: then its methods are given `Latent` as it is."""

    def __init__(self, bundle: Bundle, batch: Batch) -> None:
        self.bundle = bundle
        self.batch = batch

    def label_logits(self, prompts: Prompts) -> Float32:
        """Logits of the label words at the readout position of every row, for every candidate.

        prompts: float32 (P, n, H), or (P, L, n, H) for bbtv2; or, for bbt, what they are projected from.
        Returns float32 (P, N, C).
        """
        return self._label_logits(self._taken("prompts", prompts, ("P", *self.bundle.info.prompt_shape)))

    def layer_logits(self, stack: Float32, layer: int, candidates: Prompts) -> Float32:
        """bbtv2: logits for candidates of one layer's prompt while the other layers' prompts are fixed.

        stack: float32 (L, n, H), the prompts of all layers (that of `layer` is ignored).
        candidates: float32 (P, n, H), or what they are projected from. Returns float32 (P, N, C), the same numbers as
        `label_logits` on the whole stacks; an engine may reuse what it knows of the layers below `layer`.
        """
        return self._layer_logits(*self._taken_layer(stack, layer, candidates))

    def tally(self, prompts: Prompts) -> Float64:
        """`objective.tally` of the label logits: float64 (P, 5). Takes what `label_logits` takes.

        An engine on a GPU adds up there, in float32, and the label logits stay there.
        """
        return self._tally(self._taken("prompts", prompts, ("P", *self.bundle.info.prompt_shape)))

    def layer_tally(self, stack: Float32, layer: int, candidates: Prompts) -> Float64:
        """bbtv2: the tally of `layer_logits`, which takes the same."""
        return self._layer_tally(*self._taken_layer(stack, layer, candidates))

    def _layer_logits(self, stack: Float32, layer: int, candidates: Float32) -> Float32:
        return self._label_logits(stacks(stack, layer, candidates))

    def _tally(self, prompts: Float32) -> Float64:
        return tally(self._label_logits(prompts), self.batch.targets)

    def _layer_tally(self, stack: Float32, layer: int, candidates: Float32) -> Float64:
        return tally(self._layer_logits(stack, layer, candidates), self.batch.targets)

    def _taken_layer(self, stack: Float32, layer: int, candidates: Prompts) -> tuple[Float32, int, Any]:
        """What `layer_logits` is given, checked."""
        self.bundle.require("bbtv2")
        layers, *one = self.bundle.info.prompt_shape
        if not 0 <= layer < layers:
            raise UsageError(f"layer must lie in 0..{layers - 1}; got {layer}")
        stack = checked("stack", stack, (layers, *one))
        return stack, layer, self._taken("candidates", candidates, ("P", *one))

    def _taken(self, name: str, prompts: Prompts, shape: tuple[str | int, ...]) -> Any:
        """Prompts as the engine takes them. Raises UsageError where their shape is another."""
        if not isinstance(prompts, Latent):
            return checked(name, prompts, shape)
        check_shape(name, prompts.shape, shape)
        return prompts if self.on_device else prompts.compute()

    def layer_stds(self) -> Float32:
        """bbtv2: standard deviation of the hidden states that enter each block when all prompts are zero.

        float32 (L,), over the whole padded batch as in the original program, after five rounds of clipping to
        mean ± 3 standard deviations (BBTv2, section 4.2).
        """
        raise UsageError(f"{type(self).__name__} cannot measure hidden states, which bbtv2 needs")

    @abstractmethod
    def _label_logits(self, prompts: Float32) -> Float32: ...

    def close(self) -> None:  # noqa: B027 - nothing to free by default
        """Free what the engine holds for this batch."""

    def __enter__(self) -> BoundBatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def stacks(stack: Float32, layer: int, candidates: Float32) -> Float32:
    """Each candidate of a layer in its place in the stack: (L, n, H) and (P, n, H) to (P, L, n, H)."""
    whole = np.repeat(stack[None], len(candidates), axis=0)
    whole[:, layer] = candidates
    return whole


def checked(name: str, prompts: Float32, shape: tuple[str | int, ...]) -> Float32:
    """The array, contiguous and in float32. Raises UsageError where its shape is another; names stand for any size."""
    prompts = np.ascontiguousarray(prompts, dtype=np.float32)
    check_shape(name, prompts.shape, shape)
    return prompts


def check_shape(name: str, found: tuple[int, ...], shape: tuple[str | int, ...]) -> None:
    """Raises UsageError unless the shapes agree; names stand for any size."""
    fits = len(found) == len(shape) and all(isinstance(w, str) or n == w for n, w in zip(found, shape, strict=True))
    if not fits:
        raise UsageError(f"{name} must have the shape ({', '.join(map(str, shape))}), not {found}")


def check_tokens(bundle: Bundle, batch: Batch) -> None:
    """Raises UsageError for a token id that the backbone's vocabulary does not have."""
    limit = bundle.info.vocab_size
    for name in ("input_ids", "label_token_ids", "decoder_input_ids"):
        ids = getattr(batch, name)
        if ids is None:
            continue
        strange = ids[(ids < 0) | (ids >= limit)]
        if strange.size:
            raise UsageError(f"{name} holds {strange[0]} but the backbone's vocabulary has {limit} entries")


class Engine(ABC):
    """A backbone that is ready to run. Made by `load_engine`; used as a context manager."""

    name: str

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    @abstractmethod
    def bind(self, batch: Batch) -> BoundBatch:
        """Hold the rows of `batch` ready for many candidates. The result is a context manager."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that compute, and the device or provider in use."""

    def close(self) -> None:  # noqa: B027 - nothing to free by default
        """Free the model."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

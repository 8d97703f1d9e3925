"""The interface between the search and whatever runs the backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType

import numpy as np

from bbt_accel.batch import Batch, Float32
from bbt_accel.bundle import Bundle
from bbt_accel.errors import UsageError


class BoundBatch(ABC):
    """Rows that an engine holds ready; candidates come and go."""

    def __init__(self, bundle: Bundle, batch: Batch) -> None:
        self.bundle = bundle
        self.batch = batch

    def label_logits(self, prompts: Float32) -> Float32:
        """Logits of the label words at the readout position of every row, for every candidate.

        prompts: float32 (P, n, H), or (P, L, n, H) for bbtv2. Returns float32 (P, N, C).
        """
        prompts = np.ascontiguousarray(prompts, dtype=np.float32)
        shape = self.bundle.info.prompt_shape
        if prompts.shape[1:] != shape:
            raise UsageError(f"prompts must have the shape (P, {', '.join(map(str, shape))}), not {prompts.shape}")
        return self._label_logits(prompts)

    def layer_logits(self, stack: Float32, layer: int, candidates: Float32) -> Float32:
        """bbtv2: logits for candidates of one layer's prompt while the other layers' prompts are fixed.

        stack: float32 (L, n, H), the prompts of all layers (that of `layer` is ignored).
        candidates: float32 (P, n, H). Returns float32 (P, N, C), the same numbers as `label_logits` on the
        whole stacks; an engine may reuse what it knows of the layers below `layer`.
        """
        stacks = np.repeat(stack[None], len(candidates), axis=0)
        stacks[:, layer] = candidates
        return self.label_logits(stacks)

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

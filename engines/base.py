"""The interface between the search and whatever runs the backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from bbt_accel.core.batch import Batch, Float32, Float64
from bbt_accel.core.bundle import Bundle
from bbt_accel.core.objective import batch_statistics
from bbt_accel.core.population import LayerPrompts, Population
from bbt_accel.engines.bucketing import row_lengths
from bbt_accel.errors import DataError, EngineError, UsageError, first_line


class Closing:
    """A context manager that calls `close` when the block ends."""

    def close(self) -> None:
        """Free what is held; nothing by default."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class BoundBatch(Closing, ABC):
    """The rows of a batch, held by an engine, against which populations are evaluated. A context
    manager.
    """

    # whether the engine projects `Latent` prompts on its device; others get them projected
    projects = False

    def __init__(self, bundle: Bundle, batch: Batch) -> None:
        self.bundle, self.batch = bundle, batch

    def label_logits(self, prompts: LayerPrompts | Population) -> Float32:
        """Logits of the label words at the readout position of every row, for every candidate.

        prompts: float32 (P, n, H), for bbtv2 whole stacks (P, L, n, H); or a `Population`, which
            for bbtv2 may vary one layer alone, so that the layers below it are computed once.
        Returns float32 (P, N, M), in the order of `label_token_ids`; `class_logits` makes scores of
        classes of them. Raises UsageError for prompts of another shape, EngineError when the pass
        fails.
        """
        return self._label_logits(self._population(prompts))

    def statistics(self, prompts: LayerPrompts | Population) -> Float64:
        """The sums over the rows from which every loss and metric follows, `objective.COLUMNS`:
        float64 (P, 5).

        For tasks with one label word for each class: columns of the logits are compared with
        `targets`. An engine on a GPU sums there, in float32, and the label logits stay there. Takes
        and raises what `label_logits` does, and UsageError for a target that is not a class.
        """
        return self._statistics(self._population(prompts))

    def outputs(self, prompts: LayerPrompts | Population) -> dict[str, Float32]:
        """The label logits as `label_logits`, and from the same pass two hidden states of every
        row.

        `readout_state`, float32 (P, N, E): what the LM head's last matmul takes at the readout
            position; E is H, but for families whose head is narrower (ALBERT, ELECTRA).
        `mean_state`, float32 (P, N, H): what enters the last block (encoder-decoders: what the
        encoder returns), the mean over the row's tokens and the prompt's; of a decoder over the
        tokens behind the prompt. Raises what `label_logits` raises, and UsageError from an engine
        that returns label logits alone.
        """
        return self._outputs(self._population(prompts))

    def layer_stds(self) -> Float32:
        """bbtv2: standard deviation of the hidden states that enter each block when all prompts are
        zero.

        float32 (L,), over the whole padded batch as in the original program, after five rounds of
        clipping to mean ± 3 standard deviations (BBTv2, section 4.2). Raises BundleError for a
        bundle for bbt, DataError for rows that are too long with their padding, UsageError from an
        engine that cannot measure them.
        """
        name = type(self).__name__.removesuffix("BoundBatch")
        raise UsageError(
            f"{name} cannot measure hidden states, which bbtv2 needs; use another engine"
        )

    @abstractmethod
    def _label_logits(self, population: Population) -> Float32: ...

    def _outputs(self, population: Population) -> dict[str, Float32]:
        problem = f"{type(self).__name__.removesuffix('BoundBatch')} returns label logits alone"
        raise UsageError(
            f"{problem}; use another engine, or a readout of logits: --readout calibrated"
        )

    def _statistics(self, population: Population) -> Float64:
        return batch_statistics(self._label_logits(population), self.batch.targets)

    def _population(self, prompts: LayerPrompts | Population) -> Population:
        population = prompts if isinstance(prompts, Population) else Population(prompts)
        return population.check(self.bundle.info, self.projects)


class Engine(Closing, ABC):
    """A backbone that is ready to run. Made by `load_engine`, whose arguments these are; a context
    manager.

    Not thread-safe: an engine and its rows are for one thread at a time.
    without: names of optimizations that are switched off. Raises what `load` raises.
    """

    name = ""
    """The name that it was loaded by."""

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cpu",
        threads: int | None = None,
        without: frozenset[str] = frozenset(),
    ) -> None:
        self.bundle, self.device, self.threads, self.without = bundle, device, threads, without
        self.load()

    def load(self) -> None:
        """Load what runs the bundle. Raises EngineError for what cannot run; never falls back
        silently.
        """

    @abstractmethod
    def bind(self, batch: Batch) -> BoundBatch:
        """Hold the rows of `batch` for many candidates.

        Raises UsageError for a token that is not in the vocabulary, DataError for a row that is
        longer than the backbone takes and for a decoder's row that is read within the prompt,
        EngineError for rows that a TensorRT plan does not take.
        """

    capturing = False
    """Whether calls that come again become CUDA graphs. May be set to False, to compare."""

    def counts(self) -> dict[str, int]:
        """`calls` of the device so far, how many of them were `captured` as CUDA graphs and how
        many `launched`; empty for an engine without CUDA graphs.
        """
        return {}

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that compute, and the device or provider in use."""


def read(rows: BoundBatch, prompt: Float32, states: bool) -> dict[str, Float32]:
    """Outputs of one prompt, (n, H) or (L, n, H), by name, without the population axis; states only
    if asked.
    """
    found = (
        rows.outputs(prompt[None]) if states else {"label_logits": rows.label_logits(prompt[None])}
    )
    return {name: value[0] for name, value in found.items()}


@contextmanager
def failing(library: str, where: str, *errors: type[Exception]) -> Iterator[None]:
    """Turns these errors of a library into an EngineError; by default all, for those without a
    public base class.
    """
    caught = errors or (Exception,)
    try:
        yield
    except caught as error:
        raise EngineError(f"{library} failed {where} ({first_line(error).rstrip('.')})") from error


def check_tokens(bundle: Bundle, batch: Batch, without: frozenset[str] = frozenset()) -> None:
    """Raises UsageError for a token id outside the backbone's vocabulary, DataError for a row that
    is too long.

    Of such a row OpenVINO would return what the call before had left in its outputs.
    """
    longest, most = int(row_lengths(bundle.info, batch, without).max()), bundle.info.max_length
    longest += 0 if batch.context_ids is None else len(batch.context_ids)
    if batch.decoder_input_ids is not None:
        longest = max(longest, int(batch.readout.max()) + 1)
    if longest > most:
        raise DataError(f"a row has {longest} tokens, the backbone takes {most}; shorten it")
    limit = bundle.info.vocab_size
    for name, ids in batch.arrays().items():
        outside = ids[(ids < 0) | (ids >= limit)]
        if name.endswith("_ids") and outside.size:
            raise UsageError(
                f"{name} holds {outside[0]} but the backbone's vocabulary has {limit} entries"
            )

"""The search itself: ask, evaluate, tell, and now and then score on the dev set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from bbt_accel.batch import Float32
from bbt_accel.bundle import BundleInfo
from bbt_accel.errors import RunError
from bbt_accel.history import Generation, History, fingerprint
from bbt_accel.settings import Settings
from bbt_accel.tuning.bbt import Bbt
from bbt_accel.tuning.bbtv2 import BbtV2
from bbt_accel.tuning.evaluator import Evaluator
from bbt_accel.tuning.space import Space
from bbt_accel.tuning.strategy import Strategy


@dataclass(frozen=True)
class Kept:
    """The prompt with the best dev score so far (of equals, the lower dev loss; then the earlier)."""

    prompt: Float32
    generation: int
    dev_score: float
    dev_loss: float


@dataclass(frozen=True)
class Outcome:
    kept: Kept
    interrupted: bool


def search(
    evaluator: Evaluator,
    info: BundleInfo,
    settings: Settings,
    history: History,
    observe: Callable[[Generation], None] = lambda generation: None,
) -> Outcome:
    """Search a prompt for a bundle, by the method that it was exported for.

    history: empty, or that of the same search up to some generation, from which it then goes on. Every generation is
        appended to it, and given to `observe` (those that were in it already, too).
    Ctrl-C ends the search with the best prompt so far; KeyboardInterrupt rises before the first new line of history.
    Raises NonFiniteLoss, EngineError, UsageError for a budget below one generation, RunError for another's history.
    """
    total = settings.generations(info.method, info.n_layers)
    strategy = _strategy(evaluator, info, settings)
    kept = _replay(strategy, history, observe)
    try:
        for number in range(len(history), total):
            started = perf_counter()
            layer, step_size, candidates = strategy.layer, strategy.step_size, strategy.ask()
            losses, metrics = evaluator.train(strategy.space, layer, candidates)
            rate = len(losses) / (perf_counter() - started)
            strategy.tell(candidates, losses)
            best = int(np.argmin(losses))

            calls = (number + 1) * settings.popsize
            crossed = calls // settings.eval_every > (calls - settings.popsize) // settings.eval_every
            due = crossed or number == total - 1
            scored = _score(evaluator, strategy.prompt(), number) if due else None

            generation = Generation(
                generation=number,
                calls=calls,
                layer=layer,
                candidates=fingerprint(candidates),
                losses=losses.tolist(),
                best_loss=losses[best],
                mean_loss=losses.mean(),
                metric=metrics[best],
                step_size=step_size,
                dev_score=scored.dev_score if scored else None,
                dev_loss=scored.dev_loss if scored else None,
                seconds=perf_counter() - started,
                evaluations_per_second=rate,
            )
            history.append(generation)
            kept = _better(kept, scored)
            observe(generation)
    except KeyboardInterrupt:
        if not len(history):
            raise
        kept = kept or _score(evaluator, strategy.prompt(), len(history) - 1)
        return Outcome(kept, interrupted=True)
    assert kept is not None  # the last generation is always scored
    return Outcome(kept, interrupted=False)


def _strategy(evaluator: Evaluator, info: BundleInfo, settings: Settings) -> Strategy:
    if info.method == "bbt":
        return Bbt(Space(info, settings), settings)
    return BbtV2(Space(info, settings, evaluator.layer_stds()), settings)


def _replay(strategy: Strategy, history: History, observe: Callable[[Generation], None]) -> Kept | None:
    """Walk through what is known already: the same asks and tells, without the engine."""
    kept: Kept | None = None
    for known in history.generations:
        candidates = strategy.ask()
        if fingerprint(candidates) != known.candidates:
            raise RunError(
                f"the run cannot be resumed: generation {known.generation} asks for other candidates here than where "
                "it was made (another processor, or another cma or numpy); tune again with --overwrite"
            )
        strategy.tell(candidates, np.array(known.losses))
        if known.dev_score is not None and known.dev_loss is not None:
            kept = _better(kept, Kept(strategy.prompt(), known.generation, known.dev_score, known.dev_loss))
        observe(known)
    return kept


def _score(evaluator: Evaluator, prompt: Float32, generation: int) -> Kept:
    loss, score = evaluator.dev(prompt)
    return Kept(prompt, generation, score, loss)


def _better(kept: Kept | None, scored: Kept | None) -> Kept | None:
    if kept is None or scored is None:
        return kept or scored
    return scored if (scored.dev_score, -scored.dev_loss) > (kept.dev_score, -kept.dev_loss) else kept

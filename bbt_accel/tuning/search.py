"""The search loop: ask, evaluate, tell, and every few calls score the prompt on the dev set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from bbt_accel.batch import Float32
from bbt_accel.bundle import Bundle
from bbt_accel.errors import RunError
from bbt_accel.history import Generation, History, check_history, fingerprint
from bbt_accel.settings import Settings
from bbt_accel.tuning.evaluator import Evaluator
from bbt_accel.tuning.methods import Bbt, BbtV2, PromptSpace, SearchMethod

Observe = Callable[[Generation], None]


@dataclass(frozen=True)
class BestPrompt:
    """The prompt with the best dev score so far; ties go to the lower dev loss, then to the earlier generation."""

    prompt: Float32
    generation: int
    dev_score: float
    dev_loss: float

    def or_better(self, other: BestPrompt | None) -> BestPrompt:
        """The better of the two; this one if they are equal."""
        return max(self, other or self, key=lambda found: (found.dev_score, -found.dev_loss))


@dataclass(frozen=True)
class Outcome:
    best: BestPrompt
    interrupted: bool


def search(
    evaluator: Evaluator, bundle: Bundle, settings: Settings, history: History, observe: Observe = lambda _: None
) -> Outcome:
    """Search for a soft prompt for a bundle, by the method that it was exported for.

    history: empty, or the first generations of the same search, which then continues from there. Every new generation
        is appended. observe: called with every generation, those already in the history included.
    Ctrl-C ends the search with the best prompt so far; before the first generation of the history it is raised.
    Raises NonFiniteLoss, EngineError, UsageError for a budget below one generation, RunError for the history of
    another search.
    """
    total, deep = settings.generations(bundle.info.method, bundle.info.n_layers), bundle.info.method == "bbtv2"
    check_history(history.generations, settings.popsize, bundle.info.n_layers if deep else 1, total)
    space = PromptSpace(bundle, settings, evaluator.layer_stds() if deep else None)
    method = BbtV2(space, settings) if deep else Bbt(space, settings)
    best = _replay(method, history, observe)
    try:
        for number in range(len(history), total):
            generation, scored = _generation(evaluator, method, settings, number, last=number == total - 1)
            history.append(generation)
            best = best.or_better(scored) if best else scored
            observe(generation)
    except KeyboardInterrupt:
        if not len(history):
            raise
        return Outcome(best or _score(evaluator, method, len(history) - 1), interrupted=True)
    assert best is not None  # the last generation is always scored
    return Outcome(best, interrupted=False)


def _replay(method: SearchMethod, history: History, observe: Observe) -> BestPrompt | None:
    """Repeat the asks and tells of the history, without the engine."""
    best: BestPrompt | None = None
    for known in history.generations:
        candidates = method.ask()
        if fingerprint(candidates) != known.candidates:
            raise RunError(
                f"the run cannot be resumed: generation {known.generation} has other candidates than when it was made "
                "(another processor, or another version of cma or numpy); tune again with --overwrite"
            )
        method.tell(candidates, np.array(known.losses))
        if known.dev_score is not None and known.dev_loss is not None:
            scored = BestPrompt(method.prompt(), known.generation, known.dev_score, known.dev_loss)
            best = best.or_better(scored) if best else scored
        observe(known)
    return best


def _generation(
    evaluator: Evaluator, method: SearchMethod, settings: Settings, number: int, last: bool
) -> tuple[Generation, BestPrompt | None]:
    """One generation, and the dev score of its prompt where the calls pass a multiple of eval_every."""
    started = perf_counter()
    layer, step_size, candidates = method.layer, method.step_size, method.ask()
    losses, metrics = evaluator.train(method.space, layer, candidates)
    rate = len(losses) / (perf_counter() - started)
    method.tell(candidates, losses)
    calls = (number + 1) * settings.popsize
    due = calls // settings.eval_every > (calls - settings.popsize) // settings.eval_every
    scored = _score(evaluator, method, number) if due or last else None
    best = int(np.argmin(losses))
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
    return generation, scored


def _score(evaluator: Evaluator, method: SearchMethod, generation: int) -> BestPrompt:
    prompt = method.prompt()
    loss, score = evaluator.dev(prompt)
    return BestPrompt(prompt, generation, score, loss)

"""The search loop: ask, evaluate, tell, and every few calls score the prompt on the dev set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from bbt_accel.core.batch import Float32
from bbt_accel.core.bundle import Bundle
from bbt_accel.core.settings import Settings
from bbt_accel.errors import NonFiniteLoss, RunError
from bbt_accel.search.evaluator import Evaluator
from bbt_accel.search.history import Generation, History, check_history, fingerprint
from bbt_accel.search.methods import Bbt, BbtV2, PromptSpace, SearchMethod

Observe = Callable[[Generation], None]
Dev = Callable[[Float32], tuple[float, float]]
"""From a prompt to its loss and metric on the dev rows."""
PLATEAU = 5
"""Dev scores in a row without a lower loss, after which a search with the readout `auto` stops."""


@dataclass(frozen=True)
class BestPrompt:
    """A prompt, the best so far. generation: None for the one that the search starts from."""

    prompt: Float32
    generation: int | None
    dev_score: float
    dev_loss: float


def better(best: BestPrompt | None, other: BestPrompt, by_loss: bool) -> BestPrompt:
    """The prompt with the better dev score, of two equal ones that with the lower dev loss, then
    the earlier one.

    by_loss: the loss comes first; of few rows it says more than their accuracy.
    """

    def key(found: BestPrompt) -> tuple[float, float]:
        score, loss = found.dev_score, -found.dev_loss
        return (loss, score) if by_loss else (score, loss)

    return max(best or other, other, key=key)


@dataclass(frozen=True)
class SearchOutcome:
    """stopped: before the budget, on a plateau. error: what ended the search, an interrupted
    one.
    """

    best: BestPrompt
    interrupted: bool = False
    stopped: bool = False
    error: NonFiniteLoss | None = None


def search(
    evaluator: Evaluator,
    bundle: Bundle,
    settings: Settings,
    history: History,
    observe: Observe = lambda _: None,
    dev: Dev | None = None,
    start: BestPrompt | None = None,
) -> SearchOutcome:
    """Search for a soft prompt for a bundle, by the method that it was exported for.

    history: empty, or the first generations of the same search, which then continues from there.
        Every new generation is appended. observe: called with every generation, those already in
        the history included.
    dev: scores a prompt, with the verbalizer unless given. start: the prompt that the search has to
    surpass, if any. Ctrl-C ends the search with the best prompt so far, as does a loss that is not
    finite: resumed, the search would get it again. Before the first generation both are raised,
    unless there is a prompt to surpass. Raises NonFiniteLoss, EngineError, UsageError for a budget
    below one generation, RunError for the history of another search.
    """
    layers, deep = bundle.info.searched_layers, bundle.info.method == "bbtv2"
    total = settings.generations(layers)
    if not total and start is not None:
        return SearchOutcome(start)
    dev = dev or evaluator.dev
    check_history(history.generations, settings, layers, total)
    space = PromptSpace(bundle, settings, evaluator.layer_stds() if deep else None)
    kind = BbtV2 if deep else Bbt
    method = kind(space, settings)
    best, undue = _replay(method, history, observe, start, settings, total)
    stopped = False
    try:
        for number in range(len(history), total):
            if (
                start is not None
                and best is not None
                and settings.readout == "auto"
                and on_plateau(history, start)
            ):
                stopped = True
                break
            generation, scored = _generation(
                evaluator, method, settings, number, dev, last=number == total - 1
            )
            history.append(generation)
            best = better(best, scored, settings.fitted) if scored else best
            observe(generation)
    except (KeyboardInterrupt, NonFiniteLoss) as error:
        failure = error if isinstance(error, NonFiniteLoss) else None
        if not len(history) and start is None:
            raise
        if undue is not None:
            best = better(best, undue, settings.fitted)
        if best is None:  # an interrupted generation may have moved the distribution already
            space.stack[:] = 0
            method = kind(space, settings)
            _replay(method, history, lambda _: None, None, settings, total)
            best = _score(dev, method, len(history) - 1)
        return SearchOutcome(best, interrupted=True, error=failure)
    assert best is not None  # the last generation is always scored
    if (
        undue is not None and undue.generation is not None
    ):  # now that the search has gone on to its end
        history.replace(history.generations[undue.generation])
    return SearchOutcome(best, stopped=stopped)


def on_plateau(history: History, start: BestPrompt) -> bool:
    """Whether the last `PLATEAU` dev losses are all no lower than the best before them."""
    losses = [start.dev_loss, *(g.dev_loss for g in history.generations if g.dev_loss is not None)]
    return len(losses) > PLATEAU and min(losses[-PLATEAU:]) >= min(losses[:-PLATEAU])


def _replay(
    method: SearchMethod,
    history: History,
    observe: Observe,
    best: BestPrompt | None,
    settings: Settings,
    total: int,
) -> tuple[BestPrompt | None, BestPrompt | None]:
    """Repeat the asks and tells of the history, without the engine. best: the prompt to surpass.

    The last generation of a smaller budget was scored in any case. That score is left out where it
    is not due, as a search would not have it that was given the larger budget at first. Returns the
    best prompt, and the one whose score was left out, which stays in the file until the search has
    ended.
    """
    undue = None
    for known in list(history.generations):
        candidates = method.ask()
        if fingerprint(candidates) != known.candidates:
            raise RunError(
                f"the run cannot be resumed: generation {known.generation} has other candidates "
                "than when it was made "
                "(another processor, or another version of cma or numpy); tune again with "
                "--overwrite"
            )
        method.tell(candidates, np.array(known.losses))
        if known.dev_score is not None and known.dev_loss is not None:
            scored = BestPrompt(method.prompt(), known.generation, known.dev_score, known.dev_loss)
            if settings.scores_dev(known.generation) or known.generation == total - 1:
                best = better(best, scored, settings.fitted)
            else:
                undue, known = (
                    scored,
                    known.model_copy(update={"dev_score": None, "dev_loss": None}),
                )
                history.generations[known.generation] = known
        observe(known)
    return best, undue


def _generation(
    evaluator: Evaluator,
    method: SearchMethod,
    settings: Settings,
    number: int,
    dev: Dev,
    last: bool,
) -> tuple[Generation, BestPrompt | None]:
    """One generation, and the dev score of its prompt where the calls pass a multiple of
    eval_every.
    """
    started = perf_counter()
    layer, step_size, candidates = method.layer, method.step_size, method.ask()
    losses, metrics = evaluator.train(method.space, layer, candidates)
    rate = len(losses) / (perf_counter() - started)
    method.tell(candidates, losses)
    scored = _score(dev, method, number) if settings.scores_dev(number) or last else None
    best = int(np.argmin(losses))
    generation = Generation(
        generation=number,
        calls=settings.calls(number + 1),
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
        calls_per_second=rate,
    )
    return generation, scored


def _score(dev: Dev, method: SearchMethod, generation: int) -> BestPrompt:
    prompt = method.prompt()
    loss, score = dev(prompt)
    return BestPrompt(prompt, generation, score, loss)

"""The search loop, on an engine without weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from dummy_engine import DummyBoundBatch, DummyEngine
from search_parts import batch, job, search_bundle

from bbt_accel.core.bundle import Bundle
from bbt_accel.core.objective import Objective
from bbt_accel.core.population import Population
from bbt_accel.core.settings import Settings
from bbt_accel.errors import NonFiniteLoss, RunError
from bbt_accel.search.evaluator import LocalEvaluator
from bbt_accel.search.history import Generation, History
from bbt_accel.search.loop import SearchOutcome, search
from bbt_accel.search.methods import Cma, PromptSpace

SMALL = Settings(readout="verbalizer", intrinsic_dim=6, popsize=4, budget=96, eval_every=10, seed=3)
TRAIN, DEV = batch(8, seed=0), batch(8, seed=1)


@pytest.fixture(params=["bbt", "bbtv2"])
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    return search_bundle(tmp_path / "bundle", request.param)


def run(
    bundle: Bundle, file: Path, settings: Settings = SMALL, engine: DummyEngine | None = None
) -> tuple[SearchOutcome, list[Generation]]:
    with History(file) as history:
        evaluator = LocalEvaluator(engine or DummyEngine(bundle), job(bundle, settings, TRAIN, DEV))
        outcome = search(evaluator, bundle, settings, history)
        return outcome, history.generations


def test_the_loss_falls_within_the_budget(bundle: Bundle, tmp_path: Path) -> None:
    outcome, done = run(bundle, tmp_path / "h")
    assert done[-1].calls == 96
    assert [g.calls for g in done] == list(range(4, 100, 4))
    draws = PromptSpace(
        bundle, SMALL, np.ones(3, np.float32) if bundle.info.method == "bbtv2" else None
    )
    Z = np.random.default_rng(0).standard_normal((96, 6))
    by_chance, _ = Objective().score(
        DummyEngine(bundle).bind(TRAIN).label_logits(draws.population(0, Z)), TRAIN.targets
    )
    halfway = (by_chance.mean() + by_chance.min()) / 2
    assert np.mean([g.mean_loss for g in done[-6:]]) < halfway  # so CMA-ES has moved
    assert outcome.best.prompt.shape == bundle.info.prompt_shape
    assert not outcome.interrupted


def test_the_seed_determines_the_search(bundle: Bundle, tmp_path: Path) -> None:
    first, _ = run(bundle, tmp_path / "1")
    np.random.seed(0)  # numpy's global generator plays no part
    second, _ = run(bundle, tmp_path / "2")
    other, _ = run(bundle, tmp_path / "3", SMALL.model_copy(update={"seed": 4}))
    assert first.best.prompt.tobytes() == second.best.prompt.tobytes()
    assert first.best.prompt.tobytes() != other.best.prompt.tobytes()


def test_dev_is_scored_when_calls_pass_a_multiple_of_eval_every_and_at_the_end(
    bundle: Bundle, tmp_path: Path
) -> None:
    settings = SMALL.model_copy(update={"budget": 36})
    _, done = run(bundle, tmp_path / "h", settings)
    assert [g.calls for g in done if g.dev_score is not None] == [12, 20, 32, 36]


def test_the_best_prompt_is_the_best_on_dev(bundle: Bundle, tmp_path: Path) -> None:
    outcome, done = run(bundle, tmp_path / "h")
    scored = [
        (g.dev_score, -g.dev_loss)
        for g in done
        if g.dev_score is not None and g.dev_loss is not None
    ]
    assert (outcome.best.dev_score, -outcome.best.dev_loss) == max(scored)
    logits = DummyEngine(bundle).bind(DEV).label_logits(outcome.best.prompt[None])
    losses, metrics = Objective().score(logits, DEV.targets)
    assert (metrics[0], losses[0]) == (outcome.best.dev_score, outcome.best.dev_loss)
    assert done[outcome.best.generation].dev_loss == outcome.best.dev_loss


@pytest.mark.parametrize("stop", [0, 1, 5, 12, 23])
def test_a_search_continues_from_any_generation_to_the_same_end(
    bundle: Bundle, tmp_path: Path, stop: int
) -> None:
    whole, done = run(bundle, tmp_path / "whole")
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    (tmp_path / "part").write_bytes(
        b"".join(lines[:stop]) + lines[stop][:20]
    )  # the last line is incomplete
    engine = CountingEngine(bundle)
    resumed, again = run(bundle, tmp_path / "part", engine=engine)
    assert resumed.best.prompt.tobytes() == whole.best.prompt.tobytes()
    assert [(g.losses, g.candidates, g.dev_loss) for g in again] == [
        (g.losses, g.candidates, g.dev_loss) for g in done
    ]
    assert engine.populations == len(done) - stop  # known generations are not computed again


def test_a_history_of_another_search_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    run(bundle, tmp_path / "h")
    with pytest.raises(RunError, match="cannot be resumed"):
        run(bundle, tmp_path / "h", SMALL.model_copy(update={"seed": 9}))


def test_a_damaged_history_names_its_line(bundle: Bundle, tmp_path: Path) -> None:
    run(bundle, tmp_path / "h")
    lines = (tmp_path / "h").read_bytes().splitlines(keepends=True)
    (tmp_path / "h").write_bytes(lines[0] + b"{}\n" + lines[2])
    with pytest.raises(RunError, match="line 2"):
        History(tmp_path / "h")
    (tmp_path / "h").write_bytes(lines[0] + lines[2])
    with pytest.raises(RunError, match="line 2"):
        History(tmp_path / "h")


def test_a_full_disk_is_reported_once(bundle: Bundle, tmp_path: Path) -> None:
    run(bundle, tmp_path / "h")
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with History(tmp_path / "h") as history:
        history._stream.close()
        history._stream = Path("/dev/full").open("wb")  # noqa: SIM115 - closed with the history
        with pytest.raises(RunError, match=r"No space left.*free some space, then --resume"):
            history.append(history.generations[0])


DAMAGE: dict[str, dict[str, object]] = {
    "losses": {"losses": [1.0]},
    "calls": {"calls": 7},
    "layer": {"layer": 2},
    "dev_loss": {"dev_score": 0.5, "dev_loss": None},
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_history_that_no_search_makes_is_refused(
    bundle: Bundle, tmp_path: Path, name: str
) -> None:
    run(bundle, tmp_path / "h")
    lines = [json.loads(line) for line in (tmp_path / "h").read_text().splitlines()]
    lines[3] |= DAMAGE[name]
    (tmp_path / "h").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RunError, match=rf"cannot be resumed: generation 3 is damaged \({name}\)"):
        run(bundle, tmp_path / "h")


def test_a_history_beyond_its_budget_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    run(bundle, tmp_path / "h")
    lines = (tmp_path / "h").read_text().splitlines()
    more = json.loads(lines[-1])
    more["generation"], more["calls"] = len(lines), more["calls"] + more["calls"] // len(lines)
    (tmp_path / "h").write_text("\n".join([*lines, json.dumps(more)]) + "\n")
    with pytest.raises(
        RunError, match=f"has {len(lines) + 1} generations, its budget {len(lines)}"
    ):
        run(bundle, tmp_path / "h")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1" * 5000, "[" * 100_000])
def test_a_history_with_nonsense_for_a_score_names_its_line(
    bundle: Bundle, tmp_path: Path, value: str
) -> None:
    run(bundle, tmp_path / "h")
    first, *others = (tmp_path / "h").read_text().splitlines()
    nonsense = re.sub(r'"dev_score": [^,]*', f'"dev_score": {value}', first)
    (tmp_path / "h").write_text("\n".join([nonsense, *others]) + "\n")
    with pytest.raises(RunError, match="damaged in line 1"):
        History(tmp_path / "h")


def test_ctrl_c_returns_the_best_so_far_and_the_search_can_continue(
    bundle: Bundle, tmp_path: Path
) -> None:
    whole, _ = run(bundle, tmp_path / "whole")
    outcome, done = run(bundle, tmp_path / "h", engine=CountingEngine(bundle, interrupt_at=7))
    assert outcome.interrupted
    assert len(done) == 7
    scored = {g.generation: (g.dev_score, -g.dev_loss) for g in done if g.dev_loss is not None}
    assert set(scored) == {2, 4}
    assert outcome.best.generation == max(scored, key=lambda generation: scored[generation])
    resumed, _ = run(bundle, tmp_path / "h")
    assert resumed.best.prompt.tobytes() == whole.best.prompt.tobytes()


def test_ctrl_c_before_the_first_score_scores_the_current_prompt(
    bundle: Bundle, tmp_path: Path
) -> None:
    outcome, done = run(bundle, tmp_path / "h", engine=CountingEngine(bundle, interrupt_at=1))
    assert outcome.interrupted
    assert outcome.best.generation == 0
    assert 0 <= outcome.best.dev_score <= 1
    assert done[0].dev_score is None  # scoring at an interrupt is not part of the search


def test_ctrl_c_during_the_first_score_keeps_the_prompt_of_the_last_whole_generation(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SMALL.model_copy(update={"eval_every": 16})
    until, _ = run(bundle, tmp_path / "until", settings.model_copy(update={"budget": 12}))
    dev, calls = LocalEvaluator.dev, []

    def interrupted(self: LocalEvaluator, prompt: Any) -> tuple[float, float]:
        calls.append(prompt)
        if len(calls) == 1:  # of generation 3, whose losses CMA-ES knows already
            raise KeyboardInterrupt
        return dev(self, prompt)

    monkeypatch.setattr(LocalEvaluator, "dev", interrupted)
    outcome, done = run(bundle, tmp_path / "h", settings)
    assert (len(done), outcome.best.generation) == (3, 2)
    assert outcome.best.prompt.tobytes() == until.best.prompt.tobytes()


def test_after_ctrl_c_in_the_first_sweep_the_layers_that_were_not_searched_have_no_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = search_bundle(tmp_path / "bundle", "bbtv2")
    dev, calls = LocalEvaluator.dev, []

    def interrupted(self: LocalEvaluator, prompt: Any) -> tuple[float, float]:
        calls.append(prompt)
        if len(calls) == 1:  # of the third layer's generation, whose prompt the search has already
            raise KeyboardInterrupt
        return dev(self, prompt)

    monkeypatch.setattr(LocalEvaluator, "dev", interrupted)
    outcome, done = run(bundle, tmp_path / "h", SMALL.model_copy(update={"eval_every": 12}))
    assert (len(done), outcome.best.generation) == (2, 1)
    assert [bool(layer.any()) for layer in outcome.best.prompt] == [True, True, False]


def test_resuming_writes_the_history_again_only_where_a_score_is_dropped(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SMALL.model_copy(update={"budget": 48})
    run(bundle, tmp_path / "h", small)
    replaced, replace = [], History.replace

    def noted(self: History, generation: Generation) -> None:
        replaced.append(generation.generation)
        replace(self, generation)

    monkeypatch.setattr(History, "replace", noted)
    run(bundle, tmp_path / "h")
    assert replaced == [11]  # the last of the smaller budget


def test_ctrl_c_while_a_complete_search_is_extended_keeps_its_best_prompt(
    bundle: Bundle, tmp_path: Path
) -> None:
    rare = SMALL.model_copy(
        update={"eval_every": 1000}
    )  # so that the score at the end of 24 calls is not due later
    complete, _ = run(bundle, tmp_path / "h", rare.model_copy(update={"budget": 24}))
    for generations in (7, 8):  # twice
        outcome, done = run(bundle, tmp_path / "h", rare, CountingEngine(bundle, interrupt_at=1))
        assert (outcome.interrupted, len(done)) == (True, generations)
        assert outcome.best.prompt.tobytes() == complete.best.prompt.tobytes()
    whole, _ = run(bundle, tmp_path / "whole", rare)
    resumed, _ = run(bundle, tmp_path / "h", rare)
    assert resumed.best.prompt.tobytes() == whole.best.prompt.tobytes()
    scored = [
        [json.loads(line)["dev_loss"] for line in (tmp_path / file).read_text().splitlines()]
        for file in ("h", "whole")
    ]
    assert scored[0] == scored[1]


def test_ctrl_c_before_the_end_of_the_first_generation_is_raised(
    bundle: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(bundle, tmp_path / "h", engine=CountingEngine(bundle, interrupt_at=0))


def test_nan_stops_the_search_with_the_best_prompt_so_far_and_names_the_candidate(
    bundle: Bundle, tmp_path: Path
) -> None:
    outcome, done = run(bundle, tmp_path / "h", engine=CountingEngine(bundle, nan_at=2))
    assert (outcome.interrupted, len(done)) == (True, 2)
    with pytest.raises(NonFiniteLoss, match="candidate 1"):
        raise outcome.error or AssertionError
    interrupted, _ = run(bundle, tmp_path / "other", engine=CountingEngine(bundle, interrupt_at=2))
    assert outcome.best.prompt.tobytes() == interrupted.best.prompt.tobytes()


def test_nan_before_the_end_of_the_first_generation_is_raised(
    bundle: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(NonFiniteLoss, match="candidate 1"):
        run(bundle, tmp_path / "h", engine=CountingEngine(bundle, nan_at=0))


def test_bbtv2_fixes_the_other_layers_at_their_best(tmp_path: Path) -> None:
    bundle = search_bundle(tmp_path / "bundle", "bbtv2")
    engine = CountingEngine(bundle)
    _, done = run(bundle, tmp_path / "h", engine=engine)
    assert [g.layer for g in done] == [0, 1, 2] * 8
    best: dict[int, float] = {}
    prompts = {layer: np.zeros((4, 3), np.float32) for layer in range(3)}
    for g, (layer, fixed, candidates) in zip(done, engine.layers, strict=True):
        assert layer == g.layer
        for other in {0, 1, 2} - {layer}:
            np.testing.assert_allclose(fixed[other], prompts[other], atol=1e-6)
        if g.best_loss < best.get(layer, np.inf):
            best[layer], prompts[layer] = g.best_loss, candidates[int(np.argmin(g.losses))]


def test_bbtv2_scales_each_layer_by_its_hidden_states(tmp_path: Path) -> None:
    engine = CountingEngine(search_bundle(tmp_path / "bundle", "bbtv2"), stds=[99.0, 10.0, 0.1])
    run(engine.bundle, tmp_path / "h", SMALL.model_copy(update={"intrinsic_dim": 100}), engine)
    spread = [float(candidates.std()) for _, _, candidates in engine.layers[:3]]
    assert spread == pytest.approx([1.0, 10.0, 0.1], rel=0.5)  # layer 0 by the word embeddings


def test_alpha_is_the_scale_of_the_prompts(tmp_path: Path) -> None:
    bundle, z = search_bundle(tmp_path / "bundle"), np.random.default_rng(0).standard_normal(6)
    once, twice = (
        PromptSpace(bundle, SMALL.model_copy(update={"alpha": a})).prompt(0, z) for a in (1.0, 2.0)
    )
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-6)


def test_a_uniform_projection_has_entries_within_its_bounds(tmp_path: Path) -> None:
    bundle, units = search_bundle(tmp_path / "bundle"), np.eye(50)
    settings = SMALL.model_copy(update={"intrinsic_dim": 50, "random_proj": "uniform"})
    spaces = (
        PromptSpace(bundle, settings),
        PromptSpace(bundle, settings.model_copy(update={"random_proj": "normal"})),
    )
    uniform, normal = (
        np.abs(np.concatenate([space.prompt(0, z) for z in units])).max() for space in spaces
    )
    assert 0.9 / np.sqrt(50) < uniform <= 1 / np.sqrt(50) < normal


def test_the_layers_of_bbtv2_share_neither_projection_nor_candidates(tmp_path: Path) -> None:
    bundle, z = (
        search_bundle(tmp_path / "bundle", "bbtv2"),
        np.random.default_rng(0).standard_normal(6),
    )
    space = PromptSpace(bundle, SMALL, np.ones(3, np.float32))
    assert len({space.prompt(layer, z).tobytes() for layer in range(3)}) == 3
    _, done = run(bundle, tmp_path / "h", SMALL.model_copy(update={"budget": 12}))
    assert len({generation.candidates for generation in done}) == 3


def test_a_diagonal_covariance_is_another_search() -> None:
    kinds = (
        Cma(Settings(intrinsic_dim=12, popsize=6), 1),
        Cma(Settings(intrinsic_dim=12, popsize=6, covariance="diagonal"), 1),
    )
    for _ in range(3):
        (Z, other) = (cma.ask() for cma in kinds)
        for cma, own in zip(kinds, (Z, other), strict=True):
            cma.tell(own, (own**2 @ np.arange(12)))
    assert not np.allclose(Z, other)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_cma_is_determined_by_its_seed_and_losses(covariance: Literal["full", "diagonal"]) -> None:
    settings = Settings(intrinsic_dim=12, sigma=0.5, popsize=6, bound=0.8, covariance=covariance)
    first, second = (Cma(settings, [1, 2]) for _ in range(2))
    for _ in range(80):
        Z = first.ask()
        np.random.standard_normal(3)
        assert Z.tobytes() == second.ask().tobytes()
        assert Z.shape == (6, 12)
        assert np.abs(Z).max() <= 0.8
        for cma in (first, second):
            cma.tell(Z, ((Z - 0.3) ** 2).sum(1))
    assert ((Z - 0.3) ** 2).sum(1).min() < 0.2


def test_cma_never_stops_by_itself() -> None:
    cma = Cma(Settings(intrinsic_dim=5, popsize=4), 1)
    for _ in range(
        1500
    ):  # flat losses, a vanishing step size: pycma's stopping criteria are ignored
        Z = cma.ask()
        cma.tell(Z, np.zeros(4))
    assert np.isfinite(Z).all()


class CountingBound(DummyBoundBatch):
    engine: CountingEngine

    def layer_stds(self) -> np.ndarray:
        return np.array(self.engine.stds, np.float32)

    def _label_logits(self, population: Population) -> np.ndarray:
        logits = super()._label_logits(population)
        if len(population) > 1:  # not a score on the dev rows
            if self.engine.populations == self.engine.interrupt_at:
                raise KeyboardInterrupt
            if self.engine.populations == self.engine.nan_at:
                logits[1] = np.nan
            self.engine.populations += 1
            if population.layer is not None:
                self.engine.layers.append(
                    (population.layer, population.fixed.copy(), population.candidates.copy())
                )
        return logits


class CountingEngine(DummyEngine):
    """Counts populations, records those of one layer, and fails on request."""

    def __init__(
        self,
        bundle: Bundle,
        interrupt_at: int = -1,
        nan_at: int = -1,
        stds: tuple[float, ...] | list[float] = (1, 1, 1),
    ) -> None:
        super().__init__(bundle)
        self.populations, self.interrupt_at, self.nan_at, self.stds = 0, interrupt_at, nan_at, stds
        self.layers: list[tuple[int, np.ndarray, np.ndarray]] = []

    def bind(self, batch: object) -> CountingBound:
        bound = CountingBound(self.bundle, batch)  # type: ignore[arg-type]
        bound.engine = self
        return bound

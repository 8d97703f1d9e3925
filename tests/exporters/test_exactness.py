"""Every engine gives the numbers of the naive forward, whatever it optimizes and however it splits
the work.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import cma
from conftest import THREADS, Export, Load
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny_backbones import RELATIVES, VARIANTS, marks

from bbt_accel import Batch, Bundle, Objective, Projection, load_engine
from bbt_accel.core.comparison import ENGINE
from bbt_accel.core.optimizations import OPTIMIZATIONS, in_graph
from bbt_accel.core.population import Latent, Population
from bbt_accel.engines.staged import StagedEngine
from bbt_accel.exporters.trace.sessions import run_stages

ENGINES = ["torch", "ort", *(["openvino"] if find_spec("openvino") else [])]
few = settings(
    max_examples=12, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
seeds = st.integers(0, 2**32 - 1)
candidates = st.integers(1, 7)


def named(variants: list[tuple[str, str, str]]) -> Any:
    parameters = [
        pytest.param(*variant, id="-".join(variant), marks=marks(variant)) for variant in variants
    ]
    return pytest.mark.parametrize(("name", "method", "mode"), parameters)


LLAMA = [v for v in RELATIVES if v[0] == "llama"]
"""Besides those in VARIANTS: it has a begin token, rotary positions and grouped heads."""
all_variants, deep_variants = (
    named([v for v in VARIANTS + LLAMA if v[1] in methods])
    for methods in (("bbt", "bbtv2"), ("bbtv2",))
)
every_family = named(VARIANTS + RELATIVES)
each_engine = pytest.mark.parametrize("engine", ENGINES)


def untraced(variant: tuple[str, str, str], engine: str) -> list[Any]:
    """Without optimizations a graph is an export that no other test needs; PyTorch runs the same
    code untraced.
    """
    kinds = [("roberta", "bbt", "add"), ("gpt2", "bbt", "cat")]
    return marks(variant) or ([] if engine == "torch" or variant in kinds else [pytest.mark.slow])


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """What a batch may look like; `batch_of` makes one of it for a bundle."""
    return {
        "rows": draw(st.integers(1, 5)),
        "text": draw(st.integers(0, 12)),
        "labels": draw(st.integers(1, 5)),
        "padding": draw(st.sampled_from(["none", "right", "left", "holes", "short rows"])),
        "decoder": draw(st.sampled_from([None, None, 1, 2, 5])),
        "context": draw(st.sampled_from([0, 0, 1, 4])),
        "seed": draw(seeds),
    }


def batch_of(bundle: Bundle, shape: dict[str, Any]) -> Batch:
    """Rows of random tokens, the readout anywhere; a decoder input, or a context, where the
    backbone takes one.
    """
    info, rng, rows = bundle.info, np.random.default_rng(shape["seed"]), shape["rows"]
    add = info.prompt_mode == "add"
    width = shape["text"] + (info.shortest_row if add else 1 + info.prompt_start)
    ids = rng.integers(0, info.vocab_size, (rows, width))
    if add:  # most rows begin alike, as encoded ones do
        alike = rng.random(rows) < 0.6
        ids[alike, : info.n_prompt_tokens + 1] = ids[:1, : info.n_prompt_tokens + 1]
    column = np.arange(width)
    lengths = rng.integers(1, (2 if shape["padding"] == "short rows" else width) + 1, rows)[:, None]
    mask = {
        "none": np.ones_like(ids),
        "left": column >= width - lengths,
        "holes": rng.random(ids.shape) < 0.6,
    }.get(shape["padding"], column < lengths)
    mask = mask.astype(np.int64)
    mask[mask.sum(1) == 0, 0] = 1
    decoder = None
    if info.decodes and shape["decoder"]:
        decoder = rng.integers(0, info.vocab_size, (rows, shape["decoder"]))
    elif info.template_group == "span" and width == 1:
        decoder = np.tile([info.special.decoder_start, info.special.mask], (rows, 1))
    first, end = 0, width
    if info.decodes:
        end = (
            decoder.shape[1]
            if decoder is not None
            else width
            if info.template_group == "masked"
            else 2
        )
    elif info.causal:
        # A causal model reads behind the prompt, where it sees something.
        first = max(info.prefix_columns, int(mask.argmax(1).max()))
    readout = rng.integers(first, end, rows)
    if info.family == "modernbert":  # where a padded position may see nothing at all in its window
        readout = np.array([rng.choice(np.flatnonzero(row)) for row in mask])
    labels = rng.integers(0, info.vocab_size, shape["labels"])
    context = (
        rng.integers(0, info.vocab_size, size)
        if info.causal and (size := shape.get("context"))
        else None
    )
    targets = np.zeros(rows, np.int64)
    return Batch(ids, mask, readout, targets, labels, decoder, context)


def random_prompts(bundle: Bundle, count: int, seed: int) -> np.ndarray:
    shape = (count, *bundle.info.prompt_shape)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def assert_same(logits: np.ndarray, wanted: np.ndarray, what: object = None) -> None:
    assert logits.dtype == np.float32, what
    assert logits.shape == wanted.shape, what
    assert np.abs(logits - wanted).max() < ENGINE * max(1.0, np.abs(wanted).max()), what


def losses(statistics: np.ndarray, rows: Batch) -> np.ndarray:
    """Cross entropy and hinge loss of each candidate, (P, 2)."""
    found: np.ndarray = (statistics[:, :2] / len(rows)).astype(np.float32)
    return found


@every_family
def test_the_checks_of_an_export_compute_what_an_engine_does(
    tiny: Export, loaded: Load, name: str, method: str, mode: str
) -> None:
    """Rows that differ under the prompt included."""
    bundle = tiny(name, method, mode)
    rows = {
        "rows": 20,
        "text": 6,
        "labels": 3,
        "padding": "right",
        "decoder": None,
        "context": 0,
        "seed": 1,
    }
    batch, prompts = batch_of(bundle, rows), random_prompts(bundle, 2, 0)
    with loaded(bundle, "eager").bind(batch) as bound:
        assert_same(run_stages(bundle, batch, prompts), bound.label_logits(prompts))


@every_family
def test_a_prompt_changes_the_logits(
    tiny: Export, loaded: Load, name: str, method: str, mode: str
) -> None:
    """Otherwise the rest of this file would prove little."""
    bundle = tiny(name, method, mode)
    rows = {
        "rows": 4,
        "text": 8,
        "labels": 3,
        "padding": "right",
        "decoder": None,
        "context": 3,
        "seed": 0,
    }
    with loaded(bundle, "eager").bind(batch_of(bundle, rows)) as bound:
        one, other = bound.label_logits(random_prompts(bundle, 2, 0))
    assert np.abs(one - other).max() > 0.01


@every_family
def test_logits_and_states_are_those_of_the_naive_forward(
    tiny: Export, loaded: Load, name: str, method: str, mode: str
) -> None:
    bundle = tiny(name, method, mode)

    @settings(few, max_examples=12 if (name, method, mode) in VARIANTS + LLAMA else 3)
    @given(shape=shapes(), count=candidates, seed=seeds)
    def check(shape: dict[str, Any], count: int, seed: int) -> None:
        rows, prompts = batch_of(bundle, shape), random_prompts(bundle, count, seed)
        with loaded(bundle, "eager").bind(rows) as bound:
            wanted = bound.outputs(prompts)
        for engine in ENGINES:
            with loaded(bundle, engine).bind(rows) as bound:
                found = bound.outputs(prompts)
                logits = bound.label_logits(prompts)
            assert_same(logits, wanted["label_logits"], engine)
            for name, value in wanted.items():
                assert_same(found[name], value, (engine, name))

    check()


@each_engine
@named(LLAMA)
def test_label_logits_are_the_same_without_the_states(
    tiny: Export, loaded: Load, name: str, method: str, mode: str, engine: str
) -> None:
    bundle = tiny(name, method, mode)
    shape = {
        "rows": 4,
        "text": 8,
        "labels": 3,
        "padding": "right",
        "decoder": None,
        "context": 3,
        "seed": 0,
    }
    prompts = random_prompts(bundle, 3, 0)
    with loaded(bundle, engine).bind(batch_of(bundle, shape)) as bound:
        np.testing.assert_array_equal(
            bound.label_logits(prompts), bound.outputs(prompts)["label_logits"]
        )


@all_variants
def test_logits_do_not_depend_on_how_the_work_is_split(
    tiny: Export, name: str, method: str, mode: str
) -> None:
    """Which is decided once for all engines; here ONNX Runtime."""
    bundle = tiny(name, method, mode)
    shape = {
        "rows": 7,
        "text": 12,
        "labels": 2,
        "padding": "right",
        "decoder": None,
        "context": 3,
        "seed": 5,
    }
    rows, prompts = batch_of(bundle, shape), random_prompts(bundle, 5, 1)
    with load_engine(bundle, "ort", threads=THREADS) as one:
        assert isinstance(one, StagedEngine)
        with one.bind(rows) as bound:
            wanted = bound.label_logits(prompts)
        for tokens, step in ((1, 1), (40, 1), (200, 4), (10**6, 64)):
            one.tokens_per_call, one.bucket_step = tokens, step
            with one.bind(rows) as bound:
                assert_same(bound.label_logits(prompts), wanted)


@pytest.mark.parametrize(
    ("name", "method", "mode", "engine"),
    [
        pytest.param(
            *variant, engine, id="-".join((*variant, engine)), marks=untraced(variant, engine)
        )
        for variant in VARIANTS + LLAMA
        for engine in ENGINES
    ],
)
def test_each_optimization_gives_the_same_numbers_as_the_naive_computation(
    tiny: Export, loaded: Load, name: str, method: str, mode: str, engine: str
) -> None:
    """Alone and all together; those in the graphs are the same code as in `torch`, and are traced
    all together.
    """
    bundle = tiny(name, method, mode)
    prompts = random_prompts(bundle, 3, 2)
    populations = [Population(prompts)]
    if method == "bbtv2":
        populations += [
            Population(prompts[:, i], i, prompts[0]) for i in range(bundle.info.n_layers)
        ]
    names = [
        name for name, optimization in OPTIMIZATIONS.items() if optimization.applies(bundle.info)
    ]
    alone = [name for name in names if engine == "torch" or not OPTIMIZATIONS[name].in_graph]
    for off in [*([name] for name in alone), names]:
        source = bundle if engine == "torch" else tiny(name, method, mode, tuple(in_graph(off)))
        with load_engine(source, engine, threads=THREADS, without=off) as naive:
            for padding in ("right", "left", "short rows"):
                shape = {
                    "rows": 5,
                    "text": 9,
                    "labels": 3,
                    "padding": padding,
                    "decoder": None,
                    "seed": 3,
                    "context": 3,
                }
                rows = batch_of(bundle, shape)
                with loaded(bundle, engine).bind(rows) as optimized, naive.bind(rows) as whole:
                    for population in populations:
                        assert_same(
                            whole.label_logits(population), optimized.label_logits(population), off
                        )


@each_engine
@deep_variants
def test_searching_one_layer_gives_the_numbers_of_whole_stacks_in_any_order(
    tiny: Export, loaded: Load, name: str, method: str, mode: str, engine: str
) -> None:
    """The cache of the lower layers never outlives the prompts that it was computed with."""
    bundle = tiny(name, method, mode)
    layers = st.integers(0, bundle.info.n_layers - 1)
    turns = st.lists(st.tuples(layers, st.sets(layers), candidates), min_size=2, max_size=5)

    @few
    @given(shape=shapes(), turns=turns, seed=seeds)
    def check(shape: dict[str, Any], turns: list[tuple[int, set[int], int]], seed: int) -> None:
        rows, stack = batch_of(bundle, shape), random_prompts(bundle, 1, seed)[0]
        with (
            loaded(bundle, "eager").bind(rows) as naive,
            loaded(bundle, engine).bind(rows) as bound,
        ):
            for turn, (layer, changed, count) in enumerate(turns):
                fresh = random_prompts(bundle, count + 1, turn)
                for other in changed:
                    stack[other] = fresh[-1, other]  # in place, as a search does
                stacks = np.repeat(stack[None], count, axis=0)
                stacks[:, layer] = fresh[:count, layer]
                wanted = naive.label_logits(stacks)
                assert_same(
                    bound.label_logits(Population(fresh[:count, layer], layer, stack)), wanted
                )
                assert_same(bound.label_logits(stacks), wanted)

    check()


@deep_variants
def test_the_layers_below_the_searched_one_are_computed_once(
    tiny: Export, name: str, method: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny(name, method, mode)
    last = bundle.info.n_layers - 1
    shape = {
        "rows": 3,
        "text": 6,
        "labels": 2,
        "padding": "none",
        "decoder": None,
        "context": 3,
        "seed": 0,
    }
    stack, fresh = random_prompts(bundle, 1, 0)[0], random_prompts(bundle, 4, 1)[:, last]
    with load_engine(bundle, "ort", threads=THREADS) as one:
        assert isinstance(one, StagedEngine)
        ran, run = [], one.run
        monkeypatch.setattr(
            one, "run", lambda stage, *given: ran.append(stage) or run(stage, *given)
        )
        with one.bind(batch_of(bundle, shape)) as bound:
            bound.label_logits(Population(fresh, last, stack))
            once = len(ran)
            ran.clear()
            bound.label_logits(Population(fresh, last, stack))
    assert set(ran) == {"last"}
    assert once >= len(bundle.info.stages)


@all_variants
def test_prompts_and_statistics_may_be_computed_on_the_device(
    tiny: Export, loaded: Load, monkeypatch: pytest.MonkeyPatch, name: str, method: str, mode: str
) -> None:
    """As engines on a GPU do; here PyTorch on the CPU."""
    bundle = tiny(name, method, mode)
    engine, naive = loaded(bundle, "torch"), loaded(bundle, "eager")
    monkeypatch.setattr(engine, "on_device", True)

    @few
    @given(shape=shapes(), count=candidates, seed=seeds)
    def check(shape: dict[str, Any], count: int, seed: int) -> None:
        rows, rng = batch_of(bundle, shape), np.random.default_rng(seed)
        *deep, n, hidden = bundle.info.prompt_shape
        projection = Projection.normal(rng, 9, n, hidden, 0.3, p0=rng.standard_normal(n * hidden))
        stack = random_prompts(bundle, 1, seed)[0]
        with engine.bind(rows) as bound, naive.bind(rows) as other:
            assert bound.projects
            for turn in range(3 if deep else 1):
                z, layer = (
                    Latent(projection, rng.standard_normal((count, 9))),
                    turn % (deep or [1])[0],
                )
                population = Population(z, layer, stack) if deep else Population(z)
                assert_same(
                    bound.label_logits(population), other.label_logits(population), (shape, layer)
                )
                found, wanted = bound.statistics(population), other.statistics(population)
                assert_same(losses(found, rows), losses(wanted, rows), (shape, layer))
                if deep:
                    stack[layer] += np.float32(0.1)

    check()


@each_engine
@deep_variants
def test_the_standard_deviations_of_the_layers_are_those_of_the_naive_forward(
    tiny: Export, loaded: Load, name: str, method: str, mode: str, engine: str
) -> None:
    bundle = tiny(name, method, mode)

    @few
    @given(shape=shapes())
    def check(shape: dict[str, Any]) -> None:
        rows = batch_of(bundle, shape)
        with (
            loaded(bundle, "eager").bind(rows) as naive,
            loaded(bundle, engine).bind(rows) as bound,
        ):
            wanted = naive.layer_stds()
            assume(np.isfinite(wanted).all())
            # In a decoder, padding on the left sees nothing, and transformers' states of it differ:
            # they are of no use.
            assume(not bundle.info.causal or rows.attention_mask[:, 0].all())
            np.testing.assert_allclose(bound.layer_stds(), wanted, rtol=1e-5)
        assert wanted.shape == (bundle.info.n_layers,)

    check()


@each_engine
def test_a_bbtv2_search_follows_the_same_trajectory_with_and_without_the_cache(
    tiny: Export, tmp_path: Path, engine: str
) -> None:
    """The step size and the best prompts of every turn, over several rounds through the layers."""
    bundle = tiny("roberta", "bbtv2", "add")
    shape = {
        "rows": 6,
        "text": 8,
        "labels": 3,
        "padding": "right",
        "decoder": None,
        "context": 3,
        "seed": 11,
    }
    rows = batch_of(bundle, shape)
    targets = np.arange(len(rows)) % 3
    trajectories = []
    for without in ([], ["layer-cache"]):
        losses: list[np.ndarray] = []
        with (
            load_engine(bundle, engine, threads=THREADS, without=without) as one,
            one.bind(rows) as bound,
        ):
            bests = [(np.inf, prompt) for prompt in np.zeros(bundle.info.prompt_shape, np.float32)]
            searches = [
                cma.CMAEvolutionStrategy(np.zeros(20), 1.0, {"seed": 5 + i, "verbose": -9})
                for i in range(2)
            ]
            projections = [
                np.random.default_rng(i).standard_normal((20, bests[0][1].size)) for i in range(2)
            ]
            for turn in range(8):
                layer = turn % 2
                z = np.array(searches[layer].ask(6))
                prompts = (
                    (0.3 * z @ projections[layer]).reshape(6, *bests[0][1].shape).astype(np.float32)
                )
                stack = np.stack([prompt for _, prompt in bests])
                found = Objective("ce").score(
                    bound.label_logits(Population(prompts, layer, stack)), targets
                )[0]
                searches[layer].tell(list(z), [float(round(loss, 5)) for loss in found])
                winner = int(found.argmin())
                bests[layer] = min(
                    bests[layer], (found[winner], prompts[winner]), key=lambda pair: pair[0]
                )
                losses.append(found)
        trajectories.append(np.stack(losses))
    np.testing.assert_allclose(trajectories[1], trajectories[0], atol=1e-5)
    assert trajectories[0][6:].min() < trajectories[0][:2].min()  # it did search

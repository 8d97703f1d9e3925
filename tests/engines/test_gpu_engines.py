"""The engines of NVIDIA GPUs: their own work on a GPU of the tests' own, and the real thing where
there is one.

`-m gpu` runs what needs a GPU; everything else runs anywhere.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import fake_gpu
import onnxruntime
import torch
from conftest import Export, one_line
from onnx.reference import ReferenceEvaluator
from tiny_backbones import VARIANTS
from torch.nn import functional

from bbt_accel import Batch, Bundle, Projection, load_engine, tune
from bbt_accel.benchmarks.steps import generation
from bbt_accel.core.bundle import write_info
from bbt_accel.core.comparison import relative_rmse
from bbt_accel.core.engine_specs import engine_spec
from bbt_accel.core.objective import batch_statistics
from bbt_accel.core.population import Latent, Population
from bbt_accel.engines import captured, cuda, ort_cuda, pytorch, trt
from bbt_accel.engines.baselines import EagerEngine, EagerTf32Engine
from bbt_accel.engines.bucketing import bucket_rows, trim
from bbt_accel.engines.captured import CapturedCalls
from bbt_accel.engines.ort_cuda import Call, OrtCudaEngine
from bbt_accel.engines.pytorch import TorchEngine
from bbt_accel.engines.staged import StagedBoundBatch
from bbt_accel.engines.trt import TrtEngine
from bbt_accel.engines.trt_api import Api
from bbt_accel.errors import DataError, EngineError, PlanError, UsageError
from bbt_accel.exporters.convert import tensorrt
from bbt_accel.exporters.convert.optimize import optimize_bundle
from bbt_accel.exporters.trace.validate import sample_rows

DIFFERENT = [("roberta", "bbt", "add"), ("roberta", "bbtv2", "add"), ("bart", "bbtv2", "add"),
("t5", "bbt", "add"),
             ("gpt2", "bbt", "cat"), ("gpt2", "bbtv2", "add")]  # fmt: skip
"""Every way in which stages hand on arrays."""
each = pytest.mark.parametrize("variant", DIFFERENT, ids="-".join)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> fake_gpu.FakeRuntime:
    """One GPU, and a TensorRT for it."""
    runtime = fake_gpu.FakeRuntime()
    api = Api("tensorrt", fake_gpu.fake_tensorrt(runtime))
    monkeypatch.setattr(cuda, "load_runtime", lambda: runtime)
    for module in (tensorrt, trt):
        monkeypatch.setattr(module, "find_api", lambda ahead=False: api)
    monkeypatch.setattr(cuda.Cuda, "driver", lambda self: "580.1")
    return runtime


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles with plans, each made once. A plan holds no path of its bundle."""
    return tmp_path_factory.mktemp("planned")


@pytest.fixture
def made(tiny: Export, gpu: Any, planned: Path, tmp_path: Path) -> Callable[..., Bundle]:
    """`made(name, method, mode)`: a bundle with plans, of which a test has a copy of its own."""

    def call(*variant: str) -> Bundle:
        place = planned / "-".join(variant)
        if not place.exists():
            optimize_bundle(tiny(*variant).path, place, target="trt")
        return Bundle.read(shutil.copytree(place, tmp_path / "made"), verify=False)

    return call


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine for CUDA with the CPU as its device, in a version that has graphs."""
    monkeypatch.setattr(OrtCudaEngine, "provider", "CPUExecutionProvider")
    monkeypatch.setattr(OrtCudaEngine, "memory", "cpu")
    monkeypatch.setattr(ort_cuda, "find_cuda", lambda: None)
    monkeypatch.setattr(onnxruntime, "__version__", ort_cuda.ORT_GRAPHS_SINCE)
    monkeypatch.setattr(OrtCudaEngine, "providers", lambda self, more: ["CPUExecutionProvider"])


def candidates(bundle: Bundle, count: int = 5) -> Any:
    return np.random.default_rng(0).standard_normal(
        (count, *bundle.info.prompt_shape), dtype=np.float32
    )


def latent(bundle: Bundle, count: int = 5, dim: int = 16) -> Latent:
    n, hidden = bundle.info.prompt_shape[-2:]
    rng = np.random.default_rng(0)
    projection = Projection.normal(rng, dim, n, hidden, 0.3, p0=rng.standard_normal(n * hidden))
    return Latent(projection, rng.standard_normal((count, dim)))


def moved(prompts: Latent, step: int) -> Latent:
    """Another population under the same projection."""
    return Latent(prompts.projection, prompts.z + step)


def assert_alike(
    name: str, bundle: Bundle, source: Bundle, atol: float = 1e-5, **options: Any
) -> dict[str, int]:
    """The same numbers as ONNX Runtime on the CPU, call after call, whatever the engine caches.

    Returns the engine's counts.
    """
    rows, prompts, info = sample_rows(bundle, 12), candidates(bundle), bundle.info
    there = latent(bundle)
    with (
        load_engine(bundle, name, device="cuda", threads=1, **options) as engine,
        load_engine(source, "ort", threads=1) as other,
        engine.bind(rows) as found,
        other.bind(rows) as wanted,
    ):
        for times in range(1, 5):
            np.testing.assert_allclose(
                found.label_logits(prompts * times),
                wanted.label_logits(prompts * times),
                rtol=0,
                atol=atol,
            )
        assert found.projects
        assert not wanted.projects
        if info.method == "bbt":
            for turn in range(4):
                z = moved(there, turn)
                np.testing.assert_allclose(
                    found.label_logits(z), wanted.label_logits(z), rtol=0, atol=atol
                )
                assert_statistics(found.statistics(z), found.label_logits(z), rows)
        else:
            stack = prompts[0].copy()
            for turn in range(4 * info.n_layers):
                layer = turn % info.n_layers
                some = prompts[:, layer] + turn
                z = moved(there, turn)
                np.testing.assert_allclose(
                    found.label_logits(Population(z, layer, stack)),
                    wanted.label_logits(Population(z, layer, stack)),
                    rtol=0,
                    atol=atol,
                )
                assert_statistics(
                    found.statistics(Population(z, layer, stack)),
                    found.label_logits(Population(z, layer, stack)),
                    rows,
                )
                np.testing.assert_allclose(
                    found.label_logits(Population(some, layer, stack)),
                    wanted.label_logits(Population(some, layer, stack)),
                    rtol=0,
                    atol=atol,
                )
                np.testing.assert_allclose(
                    found.label_logits(stack[None]),
                    wanted.label_logits(stack[None]),
                    rtol=0,
                    atol=atol,
                )
                assert_statistics(
                    found.statistics(stack[None]), found.label_logits(stack[None]), rows
                )
                stack[layer] = some[turn % 5]
            np.testing.assert_allclose(
                found.layer_stds(), wanted.layer_stds(), rtol=max(atol, 1e-4)
            )
        return engine.counts()


def assert_statistics(found: Any, logits: Any, rows: Batch) -> None:
    """The sums from the device are those of the same engine's logits."""
    np.testing.assert_allclose(found, batch_statistics(logits, rows.targets), rtol=1e-4, atol=1e-4)


# TensorRT on the tests' own GPU


@each
def test_trt_gives_the_numbers_of_the_graphs(
    tiny: Export,
    made: Callable[..., Bundle],
    gpu: fake_gpu.FakeRuntime,
    variant: tuple[str, str, str],
) -> None:
    counts = assert_alike("trt", made(*variant), tiny(*variant))
    assert counts["launched"] > counts["captured"] > 0
    assert gpu.launches == counts["launched"]
    assert gpu.blocks == {}, "memory was not freed"


def test_where_nothing_can_be_captured_calls_are_enqueued(
    tiny: Export,
    made: Callable[..., Bundle],
    gpu: fake_gpu.FakeRuntime,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpu.captures = False
    assert_alike("trt", made("roberta", "bbtv2", "add"), tiny("roberta", "bbtv2", "add"))
    assert gpu.launches == 0
    assert "not every call becomes a CUDA graph" in capsys.readouterr().err


def test_where_no_memory_is_left_for_graphs_it_says_so_once(
    made: Callable[..., Bundle], gpu: fake_gpu.FakeRuntime, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = made("roberta", "bbt", "add")
    gpu.memory = captured.RESERVE
    with load_engine(bundle, "trt") as engine, engine.bind(sample_rows(bundle, 12)) as bound:
        bound.label_logits(candidates(bundle))
        assert engine.versions()["cuda graphs"] == "on", "no call could have been one so far"
        for _ in range(3):
            bound.label_logits(candidates(bundle))
        assert engine.versions()["cuda graphs"] == "off"
        assert engine.counts()["captured"] == gpu.launches == 0
    assert capsys.readouterr().err.count("less than 512 MiB of the GPU's memory is free") == 1


def test_where_there_is_no_memory_for_another_context_the_search_goes_on(
    made: Callable[..., Bundle], gpu: fake_gpu.FakeRuntime, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bundle = made("roberta", "bbt", "add")
    with load_engine(bundle, "trt") as engine, engine.bind(sample_rows(bundle, 12)) as bound:
        wanted = bound.label_logits(candidates(bundle))
        monkeypatch.setattr(
            fake_gpu.Engine, "create_execution_context", lambda self, strategy: None
        )
        for _ in range(3):
            np.testing.assert_array_equal(bound.label_logits(candidates(bundle)), wanted)
        assert engine.versions()["cuda graphs"] == "off"
    assert gpu.launches == 0
    assert "cannot make an execution context" in capsys.readouterr().err


@each
def test_from_the_third_generation_on_every_call_is_a_graph(
    made: Callable[..., Bundle], gpu: fake_gpu.FakeRuntime, variant: tuple[str, str, str]
) -> None:
    bundle = made(*variant)
    with load_engine(bundle, "trt") as engine, engine.bind(sample_rows(bundle, 12)) as bound:
        evaluate = generation(bound, 5)
        for number in range(1, 6):
            before = engine.counts()
            evaluate()
            done = {name: value - before[name] for name, value in engine.counts().items()}
            if number == 2:
                assert done["captured"] > 0
            elif number > 2:
                assert done["launched"] == done["calls"] > 0


def test_a_generation_of_bbt_moves_z_and_losses_alone(
    made: Callable[..., Bundle], gpu: fake_gpu.FakeRuntime
) -> None:
    bundle = made("roberta", "bbt", "add")
    with load_engine(bundle, "trt") as engine, engine.bind(sample_rows(bundle, 12)) as bound:
        prompts = latent(bundle)
        bound.statistics(prompts)
        gpu.uploaded = gpu.downloaded = 0
        for generation in range(1, 4):
            bound.statistics(moved(prompts, generation))
        assert gpu.uploaded == 3 * prompts.z.nbytes
        assert gpu.downloaded == 3 * len(bound.buckets) * len(prompts) * 5 * 4  # type: ignore[attr-defined]


def test_the_host_waits_for_the_device_once_a_generation(
    made: Callable[..., Bundle], gpu: fake_gpu.FakeRuntime
) -> None:
    bundle = made("roberta", "bbt", "add")
    with load_engine(bundle, "trt") as engine, engine.bind(sample_rows(bundle, 12)) as bound:
        assert len(bound.buckets) > 1  # type: ignore[attr-defined]
        bound.statistics(latent(bundle))
        gpu.course.clear()
        bound.statistics(latent(bundle))
        first = gpu.course.index("download")
        assert "run" in gpu.course[:first]
        assert "run" not in gpu.course[first:]


def test_a_generation_of_bbtv2_sends_z_and_the_prompt_that_has_changed(
    made: Callable[..., Bundle], gpu: fake_gpu.FakeRuntime
) -> None:
    bundle = made("roberta", "bbtv2", "add")
    layers, *one = bundle.info.prompt_shape
    stack = candidates(bundle, 1)[0]
    with load_engine(bundle, "trt") as engine, engine.bind(sample_rows(bundle, 12)) as bound:
        assert isinstance(engine, TrtEngine)
        spaces = [latent(bundle) for _ in range(layers)]

        def generation(number: int, change: bool = True) -> int:
            layer, before = number % layers, gpu.uploaded
            bound.statistics(Population(moved(spaces[layer], number), layer, stack))
            stack[layer] += float(change)
            return gpu.uploaded - before

        for number in range(4 * layers):
            generation(number)
            bound.statistics(stack[None])  # as when the dev rows are scored
        graphs, gpu.launches = len(engine.calls.graphs), 0
        z, prompt = spaces[0].z.nbytes, 4 * int(np.prod(one))
        for number in range(4 * layers):
            # The layer before is fixed below now, once; and above the next sweep's lowest layers,
            # once per candidate.
            sent = generation(number) - z
            assert sent in (prompt, len(spaces[0]) * prompt), (number, sent)
            bound.statistics(stack[None])
        assert len(engine.calls.graphs) == graphs, "arrays have moved"
        assert gpu.launches > 0
        sent_unchanged = [generation(number, change=False) for number in range(2 * layers)][layers:]
        assert sent_unchanged == [z] * layers


def test_a_projection_is_kept_as_long_as_its_search(
    made: Callable[..., Bundle], gpu: fake_gpu.FakeRuntime
) -> None:
    bundle = made("roberta", "bbt", "add")
    with load_engine(bundle, "trt") as engine, engine.bind(sample_rows(bundle, 12)) as bound:
        assert isinstance(engine, TrtEngine)
        prompts = latent(bundle)
        bound.label_logits(prompts)
        assert list(engine.projections) == [prompts.projection]
        del prompts
        assert not engine.projections


def test_a_space_that_the_plan_does_not_take_says_what_to_lower(
    made: Callable[..., Bundle],
) -> None:
    bundle = made("roberta", "bbt", "add")
    with load_engine(bundle, "trt") as engine, engine.bind(sample_rows(bundle, 3)) as bound:
        large = latent(bundle, dim=1025)
        assert "--intrinsic-dim" in one_line(lambda: bound.label_logits(large), EngineError)


@pytest.mark.parametrize("graph", ["project", "statistics"])
def test_a_bundle_without_the_graphs_of_a_device_has_to_be_made_again(
    made: Callable[..., Bundle], graph: str
) -> None:
    bundle = made("roberta", "bbt", "add")
    (bundle.path / f"{graph}.onnx").unlink()
    old = write_info(bundle.path, bundle.info)
    assert f"lacks {graph}.onnx" in one_line(
        lambda: load_engine(Bundle(bundle.path, old), "trt"), PlanError
    )


@pytest.mark.parametrize("method", ["bbt", "bbtv2"])
def test_a_search_follows_the_path_of_the_cpu(
    tiny: Export, made: Callable[..., Bundle], tmp_path: Path, method: str
) -> None:
    settings = {"k_shot": 2, "intrinsic_dim": 5, "popsize": 4, "budget": 48, "eval_every": 16}

    def losses(bundle: Bundle, engine: str) -> list[list[float]]:
        run = tune(
            bundle,
            "demo",
            engine=engine,
            output=tmp_path / engine,
            settings=settings,
            progress=False,
        )
        return [generation.losses for generation in run.history]

    on_gpu, wanted = (
        losses(made("roberta", method, "add"), "trt"),
        losses(tiny("roberta", method, "add"), "ort"),
    )
    np.testing.assert_allclose(on_gpu, wanted, rtol=0, atol=1e-4)


def test_optimizations_can_be_switched_off(tiny: Export, made: Callable[..., Bundle]) -> None:
    bundle = made("roberta", "bbtv2", "add")
    assert_alike(
        "trt",
        bundle,
        tiny("roberta", "bbtv2", "add"),
        without=["buckets", "population", "layer-cache"],
    )


def test_a_population_larger_than_the_profile_is_split(
    tiny: Export, made: Callable[..., Bundle], gpu: fake_gpu.FakeRuntime
) -> None:
    bundle, rows = made("roberta", "bbt", "add"), sample_rows(tiny("roberta", "bbt", "add"), 50)
    with (
        load_engine(bundle, "trt") as engine,
        load_engine(tiny("roberta", "bbt", "add"), "ort", threads=1) as other,
        engine.bind(rows) as found,
        other.bind(rows) as wanted,
    ):
        for prompts in (candidates(bundle, 45), latent(bundle, 45)):
            np.testing.assert_allclose(
                found.label_logits(prompts), wanted.label_logits(prompts), rtol=0, atol=1e-5
            )


def test_a_new_driver_has_the_plans_built_again_and_says_so(
    made: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = made("roberta", "bbt", "add")
    load_engine(bundle, "trt").close()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(cuda.Cuda, "driver", lambda self: "590.2")
    load_engine(bundle, "trt").close()
    assert "the driver was 580.1 and is 590.2" in capsys.readouterr().err
    load_engine(Bundle.read(bundle.path), "trt").close()
    assert capsys.readouterr().err == ""


def test_a_plan_that_tensorrt_refuses_is_an_error(
    made: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = made("roberta", "bbt", "add")
    monkeypatch.setattr(trt, "each_plan", lambda *_, **__: [("model", b"of another version")])
    message = one_line(lambda: load_engine(bundle, "trt"), PlanError)
    assert "cannot load the plan of model (Serialization assertion magicTag failed)" in message


def test_no_memory_for_a_plan_says_what_to_do(
    made: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = made("roberta", "bbt", "add")
    shutil.rmtree(bundle.path / "plans")
    monkeypatch.setattr(fake_gpu.Builder, "out_of_memory", True)
    assert "out of memory" in one_line(lambda: load_engine(bundle, "trt"), PlanError)


def test_no_memory_on_the_gpu_says_what_to_do(
    made: Callable[..., Bundle], gpu: fake_gpu.FakeRuntime
) -> None:
    bundle = made("roberta", "bbt", "add")
    gpu.memory = 1000
    assert "--popsize" in one_line(lambda: load_engine(bundle, "trt"), EngineError)


def test_graphs_are_made_again_when_memory_was_short(
    tiny: Export,
    made: Callable[..., Bundle],
    gpu: fake_gpu.FakeRuntime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle, prompts = made("roberta", "bbt", "add"), candidates(tiny("roberta", "bbt", "add"))
    with load_engine(bundle, "trt") as engine, engine.bind(sample_rows(bundle, 12)) as bound:
        assert isinstance(engine, TrtEngine)
        monkeypatch.setattr(captured, "RESERVE", 0)
        wanted = bound.label_logits(prompts)
        for _ in range(2):
            bound.label_logits(prompts)
        assert engine.calls.graphs
        gpu.memory = 20_000
        large = engine.cuda.empty((20_500,), np.uint8)
        assert not engine.calls.graphs
        del large
        for _ in range(3):
            np.testing.assert_array_equal(bound.label_logits(prompts), wanted)
        assert engine.calls.graphs


def test_a_capture_that_fails_within_a_call_leaves_nothing_behind_and_is_tried_again(
    made: Callable[..., Bundle], gpu: fake_gpu.FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = made("roberta", "bbt", "add")
    with load_engine(bundle, "trt") as engine, engine.bind(sample_rows(bundle, 12)) as bound:
        wanted = bound.label_logits(candidates(bundle))
        monkeypatch.setattr(fake_gpu.Engine, "fails_in_capture", True)
        np.testing.assert_array_equal(bound.label_logits(candidates(bundle)), wanted)
        assert engine.counts()["captured"] == 0
        assert (gpu.capturing, gpu.partial, gpu.error) == (None, 0, fake_gpu.Status.cudaSuccess)
        monkeypatch.setattr(fake_gpu.Engine, "fails_in_capture", False)
        for _ in range(2):
            np.testing.assert_array_equal(bound.label_logits(candidates(bundle)), wanted)
        assert engine.counts()["launched"] == len(bound.buckets)  # type: ignore[attr-defined]
        assert gpu.partial == 0


def test_a_graph_that_cannot_be_made_is_no_error_of_the_next_call(
    made: Callable[..., Bundle], gpu: fake_gpu.FakeRuntime
) -> None:
    bundle = made("roberta", "bbt", "add")
    with load_engine(bundle, "trt") as engine, engine.bind(sample_rows(bundle, 12)) as bound:
        gpu.instantiates = False
        for _ in range(4):
            bound.label_logits(candidates(bundle))
        assert (gpu.launches, gpu.partial, gpu.error) == (0, 0, fake_gpu.Status.cudaSuccess)


def test_memory_that_was_short_is_no_error_of_the_next_call(
    made: Callable[..., Bundle], gpu: fake_gpu.FakeRuntime
) -> None:
    bundle = made("roberta", "bbt", "add")
    with load_engine(bundle, "trt") as engine, engine.bind(sample_rows(bundle, 12)) as bound:
        assert isinstance(engine, TrtEngine)
        wanted = bound.label_logits(candidates(bundle))
        gpu.memory = 0
        one_line(
            lambda: engine.cuda.empty((2**20,), np.uint8), EngineError
        )  # after the idle buffers were freed
        gpu.memory = 2**30
        np.testing.assert_array_equal(bound.label_logits(candidates(bundle)), wanted)


def test_after_a_kernel_has_failed_its_error_is_raised_and_everything_is_closed(
    made: Callable[..., Bundle], gpu: fake_gpu.FakeRuntime
) -> None:
    bundle, kept = made("roberta", "bbt", "add"), list[TrtEngine]()

    def fail() -> None:
        with load_engine(bundle, "trt") as engine, engine.bind(sample_rows(bundle, 12)) as bound:
            assert isinstance(engine, TrtEngine)
            kept.append(engine)
            for _ in range(3):
                bound.label_logits(candidates(bundle))
            gpu.broken = True
            raise UsageError("what went wrong")

    assert one_line(fail, UsageError) == "what went wrong"
    assert (kept[0].plans, len(kept[0].calls.graphs), kept[0].cuda.stream) == ({}, 0, None)


class Gpu:
    """As far as `CapturedCalls` asks: memory, of which each graph takes one byte."""

    def __init__(self, room: int) -> None:
        self.room = room

    def free_memory(self) -> int:
        return self.room

    def destroy(self, graph: object) -> None:
        self.room += 1

    def launch(self, graph: object) -> None: ...

    def synchronize(self) -> None: ...


def replay(calls: CapturedCalls, names: str) -> str:
    """Calls by one letter each → L for those that were launched, C for captured, E for enqueued."""
    done = ""
    for name in names:
        if calls.launch(name):
            done += "L"
        elif calls.worth_capturing(name):
            calls.add(name, name, None)
            calls.cuda.room -= 1  # type: ignore[attr-defined]
            done += "C"
        else:
            done += "E"
    return done


def test_where_memory_is_short_repeated_calls_keep_their_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(captured, "RESERVE", 1)
    calls: Any = CapturedCalls(Gpu(2))  # type: ignore[arg-type]
    assert replay(calls, "abcabc") == "EEECCE"
    assert replay(calls, "abcabc") == "LLELLE", "they would only take turns"


def test_a_graph_that_is_idle_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "RESERVE", 1)
    calls: Any = CapturedCalls(Gpu(2))  # type: ignore[arg-type]
    assert replay(calls, "abab" + "b" + "cdcd") == "EECC" + "L" + "EECC"
    assert list(calls.graphs) == ["c", "d"], "the least recently launched first"


def test_a_call_that_cannot_be_captured_is_tried_twice() -> None:
    calls: Any = CapturedCalls(Gpu(2**30))  # type: ignore[arg-type]
    tried = []
    for _ in range(5):
        assert not calls.launch("a")
        tried.append(calls.worth_capturing("a"))
        calls.failures["a"] += tried[-1]
    assert tried == [False, True, True, False, False]


def test_a_device_is_chosen_by_its_number(
    made: Callable[..., Bundle], gpu: fake_gpu.FakeRuntime
) -> None:
    bundle = made("roberta", "bbt", "add")
    gpu.devices = 2
    with load_engine(bundle, "trt", device="cuda:1"):
        assert gpu.device == 1
    assert "cuda:2" in one_line(lambda: load_engine(bundle, "trt", device="cuda:2"), EngineError)
    assert "cuda:N" in one_line(lambda: load_engine(bundle, "trt", device="gpu"), UsageError)


def test_engines_on_different_gpus_run_in_one_thread_that_loaded_none_of_them(
    made: Callable[..., Bundle], gpu: fake_gpu.FakeRuntime
) -> None:
    bundle, gpu.devices = made("roberta", "bbt", "add"), 2
    with load_engine(bundle, "trt") as first, load_engine(bundle, "trt", device="cuda:1") as second:

        def serve() -> list[Any]:
            batch = sample_rows(bundle, 4)
            with second.bind(batch) as there, first.bind(batch) as here:
                return [
                    bound.label_logits(candidates(bundle))
                    for _ in range(4)
                    for bound in (there, here)
                ]

        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(serve).result()
    for logits in found:
        np.testing.assert_array_equal(logits, found[0])
    assert gpu.launches > 0


def test_a_plan_shows_nothing_to_profilers_while_it_runs(made: Callable[..., Bundle]) -> None:
    bundle = made("roberta", "bbt", "add")
    with load_engine(bundle, "trt") as engine:
        assert isinstance(engine, TrtEngine)
        assert (
            engine.plans["model"].context.nvtx_verbosity
            == engine.api.module.ProfilingVerbosity.NONE
        )


@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize(
    ("family", "mode"), [("roberta", "add"), ("roberta", "cat"), ("gpt2", "add"), ("llama", "cat")]
)
def test_attention_on_a_device_sees_a_multiple_of_8(
    tiny: Export, family: str, mode: str, context: bool
) -> None:
    info = tiny(family, "bbt", mode).info
    batch = sample_rows(tiny(family, "bbt", mode), 12)
    batch = batch if context else replace(batch, context_ids=None)
    for rows in bucket_rows(info, batch, frozenset(), 8, 2**20, 2**20):
        part = trim(info, batch, rows, frozenset(), 8, info.max_length)
        inputs = part.graph_inputs(info)
        keys = inputs["input_ids"].shape[1] + (info.n_prompt_tokens if mode == "cat" else 0)
        keys += len(inputs.get("context_ids", []))
        assert keys % 8 == 0 or part.input_ids.shape[1] + 8 > info.max_length


SST2 = [65, 66, 67, 70, 71, 71, 73, 74, 75, 75, 76, 76, 77, 77, 78, 79,
        81, 82, 83, 86, 87, 91, 94, 96, 99, 99, 101, 104, 105, 108, 117, 125]  # fmt: skip
"""Tokens of 32 rows of SST-2 with 50 prompt tokens and the shipped tokenizer: those of
docs/explanation/gpu.md.
"""


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("engine", "device", "buckets"),
    [("ort", "cuda", {80: 16, 88: 5, 104: 7, 128: 4}), ("torch", "cpu", {80: 16, 104: 12, 128: 4})],
)
def test_rows_of_sst2_are_computed_in_few_calls(
    tiny: Export, monkeypatch: pytest.MonkeyPatch, engine: str, device: str, buckets: dict[int, int]
) -> None:
    monkeypatch.setattr(pytorch, "kind_of", lambda device: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    mask = (np.arange(max(SST2)) < np.array(SST2)[:, None]).astype(np.int64)
    last = np.array(SST2) - 1
    batch = Batch(np.ones_like(mask), mask, last, last * 0, np.arange(2))
    source = tiny("roberta", "bbt", "add")
    bundle = Bundle(source.path, source.info.model_copy(update={"max_length": 512}))
    with (
        load_engine(bundle, engine, device=device, threads=1) as loaded,
        loaded.bind(batch) as bound,
    ):
        assert isinstance(bound, StagedBoundBatch)
        assert {bucket.length: len(bucket.rows) for bucket in bound.buckets} == buckets
        assert all(len([*bound.chunks(20, bucket)]) == 1 for bucket in bound.buckets)


@pytest.mark.parametrize("context", [0, 5])
def test_rows_are_not_padded_beyond_the_positions_that_a_context_leaves(
    tiny: Export, monkeypatch: pytest.MonkeyPatch, context: int
) -> None:
    source = tiny("gpt2", "bbt", "add")
    limit = 30
    bundle = Bundle(source.path, source.info.model_copy(update={"max_length": limit}))
    ids = np.ones((2, limit - context), np.int64)
    last = np.full(2, limit - context - 1)
    batch = Batch(
        ids, ids, last, last * 0, np.arange(2), context_ids=np.arange(context) if context else None
    )
    monkeypatch.setattr(pytorch, "kind_of", lambda device: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        load_engine(bundle, "torch", device="cpu", threads=1) as loaded,
        loaded.bind(batch) as bound,
    ):
        assert [bucket.length for bucket in bound.buckets] == [limit - context]  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["add", "cat"])
def test_rows_on_a_device_are_as_long_as_fused_attention_asks(
    made: Callable[..., Bundle], mode: str
) -> None:
    bundle = made("roberta", "bbt", mode)
    prompt = bundle.info.n_prompt_tokens if mode == "cat" else 0
    with load_engine(bundle, "trt") as engine, engine.bind(sample_rows(bundle, 12)) as bound:
        found = [bucket.length for bucket in bound.buckets]  # type: ignore[attr-defined]
        assert all((length + prompt) % 8 == 0 for length in found if length + 8 <= engine.longest)  # type: ignore[attr-defined]
        assert max(found) <= bundle.info.max_length


def test_a_call_that_fails_names_the_stage(
    made: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = made("roberta", "bbt", "add")
    with load_engine(bundle, "trt") as engine, engine.bind(sample_rows(bundle, 3)) as bound:
        monkeypatch.setattr(fake_gpu.Engine, "fails", True)
        assert "failed in model" in one_line(
            lambda: bound.label_logits(candidates(bundle)), EngineError
        )


def test_rows_that_are_longer_than_the_profile_are_refused(made: Callable[..., Bundle]) -> None:
    source = made("roberta", "bbt", "add")
    bundle = Bundle(
        source.path, source.info.model_copy(update={"max_length": 2 * source.info.max_length})
    )
    with load_engine(bundle, "trt") as engine:
        rows = sample_rows(source, 2)
        assert engine.longest < bundle.info.max_length  # type: ignore[attr-defined]
        for length, error in ((engine.longest, EngineError), (bundle.info.max_length, DataError)):  # type: ignore[attr-defined]
            long = rows.padded(length + 1, bundle.info.special.pad)
            whole = replace(long, attention_mask=np.ones_like(long.input_ids))
            message = one_line(lambda whole=whole: engine.bind(whole), error)  # type: ignore[misc]
            assert ("--calibrate" in message) == (error is EngineError)


def test_a_bundle_that_was_not_made_for_tensorrt_names_the_command(tiny: Export, gpu: Any) -> None:
    bundle = tiny("roberta", "bbt", "add")
    assert "--target trt" in one_line(lambda: load_engine(bundle, "trt"), EngineError)
    assert "--target trt" in one_line(lambda: TrtEngine(bundle), PlanError)
    assert "--engine trt" in one_line(
        lambda: load_engine(
            Bundle(bundle.path, bundle.info.model_copy(update={"target": "trt"})), "ort"
        ),
        EngineError,
    )


class Rounding:
    """A session that rounds every value as its type says; ONNX Runtime computes halves in fp32 on a
    CPU.
    """

    def __init__(self, file: str) -> None:
        whole = onnxruntime.InferenceSession(file)
        self.get_inputs, self.get_outputs = whole.get_inputs, whole.get_outputs
        self.run = ReferenceEvaluator(file).run


@pytest.mark.skipif(
    np.__version__ < "2", reason="onnx's reference evaluator needs NumPy 2 for long rows"
)
@pytest.mark.usefixtures("gpu")
@pytest.mark.filterwarnings("ignore:overflow")
def test_norms_are_right_for_activations_that_calibration_did_not_reach(
    tiny: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("llama", "bbt", "cat")
    made = optimize_bundle(source.path, tmp_path / "made", precision="fp16", target="trt")
    rows, prompts = sample_rows(source, 4), 1000 * candidates(source, 2)
    monkeypatch.setattr(fake_gpu, "session", Rounding)
    with (
        load_engine(made, "trt") as engine,
        load_engine(source, "ort", threads=1) as other,
        engine.bind(rows) as found,
        other.bind(rows) as wanted,
    ):
        assert relative_rmse(found.label_logits(prompts), wanted.label_logits(prompts)) < 0.01


# ONNX Runtime, its device being the CPU


@each
@pytest.mark.usefixtures("on_cpu")
def test_ort_with_bound_arrays_gives_the_same_numbers(
    tiny: Export, variant: tuple[str, str, str]
) -> None:
    assert_alike("ort", tiny(*variant), tiny(*variant))


@pytest.mark.usefixtures("on_cpu")
def test_calls_of_bbt_that_come_again_have_fixed_arrays(tiny: Export) -> None:
    bundle = tiny("roberta", "bbt", "add")
    with (
        load_engine(bundle, "ort", device="cuda", threads=1) as engine,
        engine.bind(sample_rows(bundle, 12)) as bound,
    ):
        assert isinstance(engine, OrtCudaEngine)
        bound.label_logits(candidates(bundle))
        assert engine.live() == 0
        for _ in range(3):
            bound.label_logits(candidates(bundle))
        assert engine.live() == engine.counts()["captured"] == len(bound.buckets)  # type: ignore[attr-defined]
        calls = [
            call
            for calls in engine.seen.values()
            for call in calls.values()
            if isinstance(call, Call)
        ]
        numbers = [call.options.get_run_config_entry("gpu_graph_id") for call in calls]
        assert len(set(numbers)) == len(numbers)


@pytest.mark.usefixtures("on_cpu")
def test_rows_that_are_bound_for_one_call_become_no_graph(tiny: Export) -> None:
    """As in `predict`: later rows often get the addresses of those before them."""
    bundle = tiny("roberta", "bbt", "add")
    with load_engine(bundle, "ort", device="cuda", threads=1) as engine:
        assert isinstance(engine, OrtCudaEngine)
        for _ in range(8):
            with engine.bind(sample_rows(bundle, 12)) as bound:
                bound.label_logits(candidates(bundle))
        assert engine.captured == 0


@pytest.mark.usefixtures("on_cpu")
def test_graphs_of_rows_that_were_closed_make_room_for_others(
    tiny: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a server, which binds and closes rows for as long as it runs."""
    monkeypatch.setattr(ort_cuda, "MAX_GRAPHS", 8)
    bundle = tiny("roberta", "bbt", "add")
    prompts = candidates(bundle)
    with load_engine(bundle, "ort", device="cuda", threads=1) as engine:
        assert isinstance(engine, OrtCudaEngine)
        for turn in range(12):
            with engine.bind(sample_rows(bundle, 12)) as bound:
                found = [bound.label_logits(prompts) for _ in range(4)]
                launched = engine.launched
                bound.label_logits(prompts)
                assert engine.launched > launched, turn
                np.testing.assert_array_equal(found[0], found[3])
            assert engine.held <= 8


@pytest.mark.usefixtures("on_cpu")
def test_a_version_whose_graphs_read_freed_memory_runs_without(
    tiny: Export, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.30.2")
    bundle = tiny("roberta", "bbt", "add")
    assert assert_alike("ort", bundle, bundle)["captured"] == 0
    assert "no CUDA graphs: onnxruntime-gpu before 1.31" in capsys.readouterr().err


@pytest.mark.usefixtures("on_cpu")
def test_a_graph_that_cannot_be_captured_runs_without(
    tiny: Export, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = onnxruntime.InferenceSession

    def session(file: str, options: Any, providers: Any, **more: Any) -> Any:
        if "enable_cuda_graph" in providers:
            raise RuntimeError("This session cannot use the graph capture feature")
        return real(file, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(OrtCudaEngine, "providers", lambda self, more: list(more))
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    bundle = tiny("roberta", "bbt", "add")
    assert_alike("ort", bundle, bundle)
    assert "no CUDA graphs" in capsys.readouterr().err


@pytest.mark.usefixtures("on_cpu")
def test_a_call_that_fails_as_a_graph_has_its_session_opened_again(
    tiny: Export, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = OrtCudaEngine.replay

    def replay(self: Any, session: Any, given: Any, names: Any) -> Any:
        if self.live():
            raise RuntimeError("CUDA error 906: capture was invalidated")
        return real(self, session, given, names)

    bundle = tiny("roberta", "bbt", "add")
    with (
        load_engine(bundle, "ort", device="cuda", threads=1) as engine,
        engine.bind(sample_rows(bundle, 12)) as bound,
    ):
        assert isinstance(engine, OrtCudaEngine)
        wanted, session = (
            bound.label_logits(candidates(bundle)),
            weakref.ref(engine.sessions["model"]),
        )
        opened, alive = engine.open, list[bool]()
        monkeypatch.setattr(
            engine, "open", lambda stage: (alive.append(session() is not None), opened(stage))[1]
        )
        monkeypatch.setattr(OrtCudaEngine, "replay", replay)
        for _ in range(3):
            np.testing.assert_array_equal(bound.label_logits(candidates(bundle)), wanted)
        assert alive == [False], "the old session's memory must be free when the new one is opened"
        assert engine.versions()["cuda graphs"] == "off"
    assert "capture was invalidated" in capsys.readouterr().err


@pytest.mark.usefixtures("on_cpu")
def test_a_session_that_cannot_be_opened_again_is_one_line(
    tiny: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any) -> Any:
        raise EngineError("out of memory")

    bundle = tiny("roberta", "bbt", "add")
    with (
        load_engine(bundle, "ort", device="cuda", threads=1) as engine,
        engine.bind(sample_rows(bundle, 4)) as bound,
    ):
        monkeypatch.setattr(OrtCudaEngine, "replay", no_memory)
        monkeypatch.setattr(OrtCudaEngine, "open", no_memory)
        assert "out of memory" in one_line(
            lambda: bound.label_logits(candidates(bundle)), EngineError
        )
        assert "load the engine again" in one_line(
            lambda: bound.label_logits(candidates(bundle)), EngineError
        )


@pytest.mark.usefixtures("on_cpu")
def test_no_memory_for_prompts_is_one_line(tiny: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any) -> Any:
        raise RuntimeError("Failed to allocate memory\nmore")

    bundle = tiny("roberta", "bbt", "add")
    with (
        load_engine(bundle, "ort", device="cuda", threads=1) as engine,
        engine.bind(sample_rows(bundle, 4)) as bound,
    ):
        monkeypatch.setattr(OrtCudaEngine, "new_array", no_memory)
        for prompts in (candidates(bundle), latent(bundle)):
            assert "allocate memory" in one_line(
                lambda p=prompts: bound.label_logits(p), EngineError
            )  # type: ignore[misc]


@pytest.mark.usefixtures("on_cpu")
def test_ort_projects_once_a_generation(tiny: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, real, stages = tiny("roberta", "bbt", "add"), OrtCudaEngine.once, list[str]()

    def once(self: Any, session: Any, *rest: Any, **more: Any) -> Any:
        stages.extend(name for name, known in self.sessions.items() if known is session)
        return real(self, session, *rest, **more)

    monkeypatch.setattr(OrtCudaEngine, "once", once)
    with (
        load_engine(bundle, "ort", device="cuda", threads=1) as engine,
        engine.bind(sample_rows(bundle, 12)) as bound,
    ):
        engine.tokens_per_call = 200  # type: ignore[attr-defined] # the population in parts, which keep apart
        whole = bound.label_logits(latent(bundle))
        for _ in range(3):
            stages.clear()
            np.testing.assert_array_equal(bound.label_logits(latent(bundle)), whole)
        parts = {(some.start, some.stop) for b in bound.buckets for some in bound.chunks(5, b)}  # type: ignore[attr-defined]
        assert stages == ["project"] * len(parts)
        counts = engine.counts()
        assert counts["launched"] == 2 * counts["captured"]


# PyTorch


@pytest.mark.parametrize("method", ["bbt", "bbtv2"])
def test_eager_on_a_device_projects_there(tiny: Export, method: str) -> None:
    bundle = tiny("roberta", method, "add")
    population = Population(latent(bundle))
    if method == "bbtv2":
        population = Population(latent(bundle), 1, candidates(bundle, 1)[0])
    with (
        load_engine(bundle, "eager", threads=1) as engine,
        engine.bind(sample_rows(bundle, 4)) as bound,
    ):
        wanted = bound.label_logits(population)
        bound.projects = True  # as on a GPU
        np.testing.assert_allclose(bound.label_logits(population), wanted, rtol=0, atol=1e-5)


def test_fp32_is_fp32_beside_an_engine_with_tf32_and_whatever_the_process_has_set(
    tiny: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, seen = tiny("roberta", "bbt", "add"), dict[str, str]()
    classes = {"torch": TorchEngine, "eager-tf32": EagerTf32Engine, "eager": EagerEngine}

    def recorded(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, **named: (
            seen.update({name: torch.get_float32_matmul_precision()}),
            run(*given, **named),
        )[1]

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with ExitStack() as live:
            engines: dict[str, Any] = {
                name: live.enter_context(engine(bundle, threads=1))
                for name, engine in classes.items()
            }
            for name, engine in engines.items():
                computes = engine.backbone if name == "torch" else engine.reference
                monkeypatch.setattr(computes, "run", recorded(name, computes.run))
                live.enter_context(engine.bind(sample_rows(bundle, 2))).label_logits(
                    candidates(bundle, 1)
                )
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {"torch": "highest", "eager-tf32": "high", "eager": "highest"}


@pytest.mark.parametrize("method", ["bbt", "bbtv2"])
def test_wherever_eager_runs_out_of_memory_is_one_line(
    tiny: Export, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    bundle = tiny("roberta", method, "add")
    projected = Population(
        latent(bundle), *([1, candidates(bundle, 1)[0]] if method == "bbtv2" else [])
    )
    with (
        load_engine(bundle, "eager", threads=1) as engine,
        engine.bind(sample_rows(bundle, 2)) as bound,
    ):
        bound.projects = True  # as on a GPU
        for function in ("linear", "embedding"):  # of the projection, and of the forward
            with monkeypatch.context() as patch:
                patch.setattr(functional, function, fail)
                assert "--popsize" in one_line(lambda: bound.label_logits(projected), EngineError)
                if method == "bbtv2":
                    assert "--popsize" in one_line(bound.layer_stds, EngineError)
        monkeypatch.setattr(torch, "from_numpy", fail)
        assert "--popsize" in one_line(lambda: bound.label_logits(candidates(bundle)), EngineError)
        assert "--popsize" in one_line(lambda: engine.bind(sample_rows(bundle, 2)), EngineError)


def test_an_engine_takes_a_gpu_by_its_number_and_needs_none_without_a_cpu() -> None:
    assert engine_spec("trt").device("cpu") == "cuda"
    assert engine_spec("torch").device("cuda:3") == "cuda:3"
    assert "not on cuda:1" in one_line(
        lambda: engine_spec("openvino").device("cuda:1"), EngineError
    )


# ONNX Runtime's options


def test_fp32_stays_fp32_and_the_cpu_is_no_fallback(
    tiny: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, seen = tiny("roberta", "bbt", "add"), list[Any]()

    def session(file: str, options: Any, providers: Any, **more: Any) -> Any:
        seen.extend(providers)
        raise RuntimeError("no device")

    monkeypatch.setattr(ort_cuda, "find_cuda", lambda: None)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    one_line(lambda: load_engine(bundle, "ort", device="cuda"), EngineError)
    assert {name for name, _ in seen} == {"CUDAExecutionProvider"}
    assert all(options["use_tf32"] == "0" for _, options in seen)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("method", ["bbt", "bbtv2"])
def test_ort_without_a_driver_is_one_line_that_names_the_cpu(
    tiny: Export, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    bundle = tiny("roberta", method, "add")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort_cuda, "DRIVER", "libno.so.1")
    message = one_line(lambda: load_engine(bundle, "ort", device="cuda"), EngineError)
    assert "no NVIDIA GPU" in message
    assert "--device cpu" in message


# On a GPU

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no NVIDIA GPU: run pytest -m gpu where there is one"
)
all_variants = pytest.mark.parametrize("variant", VARIANTS, ids="-".join)


@pytest.mark.gpu
@needs_gpu
@all_variants
def test_torch_on_a_gpu(tiny: Export, variant: tuple[str, str, str]) -> None:
    assert_alike("torch", tiny(*variant), tiny(*variant), atol=1e-4)


def test_cuda_is_the_first_gpu_whatever_the_thread_has_used_before() -> None:
    assert [str(pytorch.torch_device(name)) for name in ("cpu", "cuda", "cuda:1")] == [
        "cpu",
        "cuda:0",
        "cuda:1",
    ]


@pytest.mark.gpu
@needs_gpu
@all_variants
def test_ort_on_a_gpu(tiny: Export, variant: tuple[str, str, str]) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider: [gpu]")
    counts = assert_alike("ort", tiny(*variant), tiny(*variant), atol=1e-4)
    if variant == ("roberta", "bbt", "add"):
        assert counts["launched"] > counts["captured"] > 0


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(
    not (find_spec("tensorrt") or find_spec("tensorrt_rtx")),
    reason="TensorRT is not installed: [trt]",
)
@pytest.mark.parametrize(("precision", "atol"), [("fp32", 1e-4), ("fp16", 0.05)])
@all_variants
def test_trt_on_a_gpu(
    tiny: Export, tmp_path: Path, variant: tuple[str, str, str], precision: Any, atol: float
) -> None:
    try:
        made = optimize_bundle(
            tiny(*variant).path, tmp_path / "made", precision=precision, target="trt"
        )
    except PlanError as error:
        if "pip install tensorrt" in str(error):
            pytest.skip(str(error))
        raise
    counts = assert_alike("trt", made, tiny(*variant), atol=atol)
    assert counts["launched"] > counts["captured"] > 0

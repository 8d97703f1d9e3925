"""TensorRT without a GPU: API detection, what plans depend on, and building them ahead of time."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")

import onnx
from conftest import Export, one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_backbones import VARIANTS
from tiny_bundles import tiny_bundle

from bbt_accel import Batch
from bbt_accel.benchmarks.make_backbone import make_backbone
from bbt_accel.core.bundle import Bundle
from bbt_accel.core.settings import Settings
from bbt_accel.engines import cuda, plan_building, plans, trt_api
from bbt_accel.engines.plan_building import each_plan
from bbt_accel.engines.plan_layers import Layers, read_layers
from bbt_accel.engines.plans import Key, Record, ShapeProfile
from bbt_accel.engines.trt_api import Api, find_api
from bbt_accel.errors import BbtError, EngineError, MissingDependency, PlanError, UsageError
from bbt_accel.exporters.convert import tensorrt
from bbt_accel.exporters.convert.calibration import Calibration
from bbt_accel.exporters.convert.optimize import optimize_bundle
from bbt_accel.exporters.convert.tensorrt import check_capabilities, shape_profile
from bbt_accel.exporters.families.registry import families
from bbt_accel.io.manifests import PLANS
from bbt_accel.io.progress import silent
from bbt_accel.search.calibration import task_calibration

SURFACES = json.loads((Path(__file__).parents[1] / "fixtures" / "trt_api.json").read_text())
"""What real modules have: class → names, of tensorrt 10.12 and 11.4 and of tensorrt_rtx 1.7."""
PROFILE = ShapeProfile(candidates=(1, 20, 20), rows=(1, 8, 32), tokens=(5, 16, 64))
KEY = Key(
    graph="a",
    runtime="tensorrt 11.4",
    gpu="GPU",
    capability=("9.0",),
    driver="580.1",
    profile=PROFILE,
)


# Which TensorRT


def recorded(name: str) -> ModuleType:
    """A module with the classes and attributes of a real one, that do nothing."""
    surface = next(s for title, s in SURFACES.items() if title.startswith(name))
    title = next(title for title in SURFACES if title.startswith(name))
    module = ModuleType(title.split()[0])
    module.__version__ = title.split()[1]  # type: ignore[attr-defined]
    for cls, names in surface.items():
        setattr(module, cls, type(cls, (), dict.fromkeys(names)))
    return module


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`install(tensorrt="tensorrt 11")`: only these are there."""

    def only(**modules: str | ModuleType) -> None:
        for name in trt_api.MODULES:
            found = modules.get(name)
            monkeypatch.setitem(
                sys.modules, name, recorded(found) if isinstance(found, str) else found
            )  # type: ignore[arg-type]

    return only


@pytest.mark.parametrize("name", SURFACES)
def test_each_recorded_api_has_what_is_used_of_it(install: Any, name: str) -> None:
    module = name.split()[0]
    install(**{module: name})
    api = find_api()
    assert api.version == name
    assert api.builds_ahead == (module == "tensorrt_rtx")
    assert api.caches_kernels == (module == "tensorrt_rtx")


def test_tensorrt_comes_before_tensorrt_for_rtx_but_for_building_ahead(install: Any) -> None:
    install(tensorrt="tensorrt 11", tensorrt_rtx="tensorrt_rtx")
    assert find_api().name == "tensorrt"
    assert find_api(ahead=True).name == "tensorrt_rtx"


def test_no_tensorrt_names_the_extra(install: Any) -> None:
    install()
    assert '"bbt-accel[trt]"' in one_line(find_api, MissingDependency)


def test_tensorrt_alone_cannot_build_ahead(install: Any) -> None:
    install(tensorrt="tensorrt 10.12")
    assert "--compute-capability" in one_line(lambda: find_api(ahead=True), MissingDependency)


@pytest.mark.parametrize(
    ("cls", "name"), [(cls, n) for cls, names in trt_api.NEEDED.items() for n in names]
)
def test_an_outdated_api_is_an_error_that_names_what_is_missing(
    install: Any, cls: str, name: str
) -> None:
    module = recorded("tensorrt 10.12")
    delattr(getattr(module, cls), name)
    install(tensorrt=module)
    assert f"{cls}.{name}" in one_line(find_api, PlanError)


def test_bindings_without_their_libraries_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> ModuleType:
        raise ImportError("libnvinfer.so.11: cannot open shared object file\nmore")

    monkeypatch.setattr(trt_api, "import_module", load)
    assert "libnvinfer.so.11" in one_line(find_api, PlanError)


def test_compute_capabilities_are_those_that_the_api_knows(install: Any) -> None:
    install(tensorrt_rtx="tensorrt_rtx")
    api = find_api(ahead=True)
    assert api.capabilities() == ["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"]
    assert "7.5, 8.0" in one_line(lambda: api.capability("9.0"), UsageError)
    assert "--compute-capability banana" in one_line(lambda: api.capability("banana"), UsageError)


# What a plan depends on

ranges = st.tuples(st.integers(1, 4), st.integers(5, 9), st.integers(10, 99))
words = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)
keys = st.builds(
    Key, graph=words, runtime=words, gpu=words, capability=st.tuples(words), driver=words,
    profile=st.builds(
        ShapeProfile, candidates=ranges, rows=ranges, tokens=ranges, labels=ranges,
        decoder_tokens=ranges
    ),
    options=st.dictionaries(words, words, max_size=2),
)  # fmt: skip
PARTS = {"graph": "graph", "runtime": "runtime", "gpu": "GPU", "capability": "capability",
"driver": "driver",
         "profile": "profile", "options": "options"}  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(one=keys, other=keys, part=st.sampled_from(list(PARTS)))
def test_any_part_that_changes_makes_another_key_and_is_named(
    one: Key, other: Key, part: str
) -> None:
    changed = one.model_copy(update={part: getattr(other, part)})
    same = getattr(one, part) == getattr(other, part)
    changes = one.differences(changed)
    assert [PARTS[part] in line for line in changes] == ([] if same else [True])


def test_a_plan_that_was_built_ahead_serves_every_gpu_of_its_capability_and_every_driver() -> None:
    ahead = KEY.model_copy(update={"gpu": None, "driver": None, "capability": ("8.6", "9.0")})
    assert ahead.differences(KEY) == []
    [why] = ahead.differences(KEY.model_copy(update={"capability": ("12.0",)}))
    assert why == "the compute capability was 8.6, 9.0 and is 12.0"
    assert ahead.differences(KEY.model_copy(update={"runtime": "tensorrt 12"})) == [
        "the runtime was tensorrt 11.4 and is tensorrt 12"
    ]


def test_reasons_say_what_it_was_and_what_it_is() -> None:
    longer = PROFILE.model_copy(update={"tokens": (5, 16, 128)})
    changes = {"driver": "590.2", "profile": longer, "options": {**plans.OPTIONS, "tf32": "yes"}}
    assert KEY.differences(KEY.model_copy(update=changes)) == [
        "the driver was 580.1 and is 590.2",
        "the profile has changed: tokens (5, 16, 64) → (5, 16, 128)",
        "build options have changed: tf32 no → yes",
    ]


def test_folders_are_named_after_what_a_plan_is_for() -> None:
    assert KEY.model_copy(update={"gpu": "NVIDIA H100 80GB HBM3"}).folder == "nvidia-h100-80gb-hbm3"
    assert (
        KEY.model_copy(update={"gpu": None, "capability": ("8.9", "12.0")}).folder == "sm89-sm120"
    )


def test_a_plan_uses_the_memory_of_its_caller_alone_where_tensorrt_can_demand_that(
    install: Any,
) -> None:
    for name in SURFACES:
        module = name.split()[0]
        install(**{module: name})
        demands = "user_allocation" in plans.build_options(find_api())
        assert demands == (module == "tensorrt_rtx")


# Progress


class Phases:
    """`IProgressMonitor`, as far as it is extended."""


def test_the_share_of_a_build_that_is_done_counts_nested_phases() -> None:
    shares: list[float] = []
    monitor = plan_building.new_monitor(
        Api("tensorrt", SimpleNamespace(IProgressMonitor=Phases)), shares.append
    )
    monitor.phase_start("Building engine", None, 2)
    monitor.phase_start("Timing", "Building engine", 4)
    for step in range(4):
        monitor.step_complete("Timing", step)
    monitor.phase_finish("Timing")
    monitor.step_complete("Building engine", 0)
    monitor.step_complete("Building engine", 1)
    assert shares == [0.125, 0.25, 0.375, 0.5, 0.5, 1.0]
    assert plan_building.new_monitor(Api("tensorrt", SimpleNamespace()), shares.append) is None


def test_the_time_left_is_that_of_the_plans_that_the_cache_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, told, cached = [0.0], list[tuple[str, int, int]](), {"block_00", "block_02"}

    def build(api: Api, bundle: Bundle, stage: str, key: Key, monitor: Any) -> tuple[bytes, None]:
        clock[0] += 60
        return b"plan", None

    monkeypatch.setattr(plan_building, "monotonic", lambda: clock[0])
    monkeypatch.setattr(
        plan_building, "find_plan", lambda _, stage, key: (b"plan" if stage in cached else None, "")
    )
    monkeypatch.setattr(plan_building, "build", build)
    monkeypatch.setattr(plan_building, "keep_plan", lambda *_: None)
    wanted = dict.fromkeys(["embed", "block_00", "block_01", "block_02", "last"], KEY)
    bundle: Any = SimpleNamespace(path=Path())
    api = Api("tensorrt", SimpleNamespace())
    made = each_plan(bundle, wanted, api, lambda line: None, lambda *step: told.append(step))
    assert [stage for stage, _ in made] == list(wanted)
    assert told == [
        ("plan of embed, 1 of 5", 0, 500),
        ("plan of block_01, 3 of 5, about 0:02:00 left", 200, 500),
        ("plan of last, 5 of 5, about 0:01:00 left", 400, 500),
    ]


# What TensorRT made of a graph

LOG = """Layers:
Name: node_q+node_k+node_v_myl0_4, LayerType: gemm, Inputs: [ { Name: x }], Outputs: [], \
TacticName: t, StreamId: 0, Metadata: [ONNX Layer: node_q][ONNX Layer: node_k]\
[ONNX Layer: node_v]
Name: _gemm_mha_v2_myl0_11, LayerType: kgen, Inputs: [], Outputs: [], \
TacticName: _gemm_mha_v2_0xaa, StreamId: 0, \
Metadata: [ONNX Layer: node_context][ONNX Layer: node_softmax]\
[ONNX Layer: node_mask][ONNX Layer: node_scores]
Name: __myl_AddSoft_myl0_12, LayerType: kgen, Inputs: [], Outputs: [], TacticName: , \
StreamId: 0, Metadata: [ONNX Layer: node_softmax_2][ONNX Layer: node_mask]
Name: node_o_myl0_13, LayerType: gemm, Inputs: [], Outputs: [], TacticName: , \
Metadata: [ONNX Layer: node_o]
"""


def test_layers_are_read_from_the_builders_log() -> None:
    matmuls = dict.fromkeys(
        ("node_q", "node_k", "node_v", "node_o", "node_scores", "node_context"), "MATRIX_MULTIPLY"
    )
    operators = {
        **matmuls,
        "node_softmax": "SOFTMAX",
        "node_softmax_2": "SOFTMAX",
        "node_mask": "ELEMENTWISE",
    }
    assert read_layers(["Reading weights", LOG.replace("\\\n", "")], operators) == Layers(
        layers=4,
        fused_attention=1,
        other_attention=["node_softmax_2"],
        merged_matmuls=[["node_q", "node_k", "node_v"]],
    )
    assert read_layers(["Reading weights"], operators) is None


# Plans that are kept


def keep(folder: Path, key: Key, plan: bytes = b"plan", stage: str = "model") -> Path:
    place = folder / PLANS / key.folder
    place.mkdir(parents=True, exist_ok=True)
    record = Record(
        key=key,
        sha256=plans.hashlib.sha256(b"plan").hexdigest(),
        bytes=4,
        layers=1,
        inputs=[],
        outputs=[],
    )
    (place / f"{stage}.json").write_text(record.model_dump_json())
    (place / f"{stage}.plan").write_bytes(plan)
    return place


def test_a_plan_of_the_same_key_is_found(tmp_path: Path) -> None:
    assert plans.find_plan(tmp_path, "model", KEY) == (None, "there is none yet")
    keep(tmp_path, KEY)
    assert plans.find_plan(tmp_path, "model", KEY) == (b"plan", "")


def test_a_damaged_plan_is_not_used(tmp_path: Path) -> None:
    place = keep(tmp_path, KEY, b"damaged")
    plan, why = plans.find_plan(tmp_path, "model", KEY)
    assert plan is None
    assert "damaged" in why
    (place / "model.json").write_text("{")
    assert "cannot be read" in plans.find_plan(tmp_path, "model", KEY)[1]


def test_the_reason_is_that_of_the_nearest_plan(tmp_path: Path) -> None:
    keep(tmp_path, KEY.model_copy(update={"gpu": "Another", "graph": "b", "driver": "1"}))
    keep(tmp_path, KEY.model_copy(update={"driver": "579"}))
    assert plans.find_plan(tmp_path, "model", KEY)[1] == "the driver was 579 and is 580.1"


# Profiles


def rows_of(lengths: list[int], width: int) -> Batch:
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    one = np.ones(len(lengths), np.int64)
    return Batch(np.ones_like(mask), mask, one, one * 0, np.arange(2))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.lists(st.integers(13, 60), min_size=1, max_size=40),
    more=st.integers(0, 4),
    popsize=st.integers(4, 80),
)
def test_a_profile_is_in_order_and_takes_the_rows_that_it_was_made_from(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], more: int, popsize: int
) -> None:
    info = tiny_bundle(tmp_path_factory.mktemp("bundle"), "gpt2").info
    batch = rows_of(lengths, 60)
    found = shape_profile(info, batch, max(lengths) + more, Settings(popsize=popsize))
    for name in ShapeProfile.model_fields:
        low, best, high = getattr(found, name)
        assert 1 <= low <= best <= high, name
    assert max(lengths) + more <= found.tokens[2] <= info.max_length
    assert found.tokens[0] == info.n_prompt_tokens + 2
    assert found.candidates[2] == popsize
    shapes = found.shapes("hidden", (-1, -1, -1, 8), info)
    assert [s[2] for s in shapes] == [t - info.n_prompt_tokens for t in found.tokens]
    assert [s[0] for s in shapes] == [1, popsize, popsize]


@pytest.mark.parametrize(
    ("family", "mode"), [("roberta", "add"), ("roberta", "cat"), ("llama", "cat")]
)
def test_the_longest_row_of_a_profile_is_aligned_with_the_other_keys(
    tmp_path: Path, family: str, mode: str
) -> None:
    info, batch = tiny_bundle(tmp_path, family, mode, max_length=512).info, rows_of([40, 81], 81)
    tokens = shape_profile(info, batch, 81, Settings()).tokens
    for length in tokens[1:]:
        assert batch.aligned(info, np.array(length), 8) == length
    assert 81 <= tokens[2] < 81 + 8


def test_a_profile_bounds_the_tokens_of_a_call(tmp_path: Path) -> None:
    info = tiny_bundle(tmp_path, "roberta", max_length=512).info
    found = shape_profile(info, rows_of([500] * 224, 512), 512, Settings())
    assert (found.candidates[2], found.rows[2]) == (20, 2**17 // (20 * 512))
    long = tiny_bundle(tmp_path / "long", "roberta", max_length=2**15).info
    found = shape_profile(long, rows_of([500] * 224, 512), 2**15, Settings())
    assert (found.candidates[2], found.rows[2]) == (4, 1)


def test_without_a_task_a_profile_takes_rows_of_which_a_whole_population_fits_a_call(
    tmp_path: Path,
) -> None:
    long = tiny_bundle(tmp_path, "roberta", max_length=2**15)
    assert Calibration.shipped(long).longest == 2**17 // 20


def test_without_its_prefix_cache_a_decoders_states_have_the_prompt_in_every_row(
    tmp_path: Path,
) -> None:
    info = tiny_bundle(tmp_path, "llama", "add").info
    found = shape_profile(info, rows_of([20, 30], 40), 40, Settings())
    uncached = info.model_copy(update={"without": ["prefix-cache"]})
    cached, whole = (
        [s[2] for s in found.shapes("hidden", (-1, -1, -1, 8), one)] for one in (info, uncached)
    )
    masks = [s[1] for s in found.shapes("attention_mask", (-1, -1), info)]
    assert whole == masks == [size + info.n_prompt_tokens for size in cached]


def test_a_task_sets_lengths_population_and_labels(exported: Export) -> None:
    bundle = exported(Path("demo"), n=20)
    profiles = []
    for task in ("demo", None):
        rows = task_calibration(bundle, task) if task else Calibration.shipped(bundle)
        profiles.append(shape_profile(bundle.info, rows.train, rows.longest, rows.settings))
    found, other = profiles
    assert found.labels == (1, 4, 1024)
    assert found.tokens[2] < other.tokens[2] == bundle.info.max_length
    assert found.rows[2] == 64


# Errors of CUDA


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    from fake_gpu import FakeRuntime

    def use(**options: int) -> FakeRuntime:
        runtime = FakeRuntime(**options)
        monkeypatch.setattr(cuda, "load_runtime", lambda: runtime)
        return runtime

    return use


@pytest.mark.parametrize("devices", [-1, 0])
def test_no_driver_or_no_gpu_is_one_clear_line(fake: Any, devices: int) -> None:
    fake(devices=devices)
    assert "no NVIDIA GPU" in one_line(cuda.Cuda, EngineError)


def test_a_gpu_is_described(fake: Any) -> None:
    fake()
    gpu = cuda.Cuda().gpu
    assert (gpu.name, gpu.capability) == ("NVIDIA Fake 1000", "8.9")


def test_no_memory_left_says_what_to_do(fake: Any) -> None:
    fake(memory=10_000)
    device = cuda.Cuda()
    assert "--popsize" in one_line(lambda: device.empty((5000,), np.float32), EngineError)


def test_idle_memory_is_released_before_there_is_none(fake: Any) -> None:
    fake(memory=10_000)
    device, forgotten = cuda.Cuda(), []
    device.forget = lambda: forgotten.append(True)
    kept = device.empty((1000,), np.uint8)
    idle = device.empty((5000,), np.uint8)
    del idle
    large = device.empty((8000,), np.uint8)
    assert forgotten == [True]
    assert {kept.address, large.address} == device.buffers
    again = device.empty((10,), np.uint8)
    assert again.address not in (kept.address, large.address)


def test_memory_is_used_again_at_the_same_address(fake: Any) -> None:
    runtime = fake()
    device = cuda.Cuda()
    device.open()
    first = device.upload(np.arange(10.0))
    second = device.upload(np.arange(9.0))
    addresses = [first.address, second.address]
    np.testing.assert_array_equal(device.download(first), np.arange(10.0))
    del first, second
    again = [device.upload(np.arange(10.0)), device.upload(np.arange(8.0))]
    assert sorted(a.address for a in again) == sorted(addresses)
    assert len(runtime.blocks) == 2
    device.close()
    assert runtime.blocks == {}


class Both:
    """The fake CUDA runtime, every call of which is made in the installed cuda-python too; that has
    no driver.
    """

    def __init__(self, fake: Any, real: Any) -> None:
        self.fake, self.real, self.called = fake, real, set[str]()

    def __getattr__(self, name: str) -> Any:
        if not callable(getattr(self.fake, name)) or name == "cudaGetErrorString":
            return getattr(self.real, name)

        def call(*arguments: Any) -> Any:
            self.called.add(name)
            graph = (
                self.real.cudaGraphExec_t
                if name in ("cudaGraphLaunch", "cudaGraphExecDestroy")
                else None
            )
            handles = {int: self.real.cudaStream_t, list: graph or self.real.cudaGraph_t}
            is_handle = [type(a) is list or a == 7 for a in arguments]
            getattr(self.real, name)(
                *(
                    handles[type(a)](0) if h else a
                    for a, h in zip(arguments, is_handle, strict=True)
                )
            )
            return getattr(self.fake, name)(*arguments)

        return call


@pytest.mark.skipif(importlib.util.find_spec("cuda") is None, reason="cuda-python is not installed")
def test_every_call_is_one_that_the_installed_cuda_python_takes(
    fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cuda.load_runtime()
    if not int(real.cudaGetDeviceCount()[0]):
        pytest.skip("this machine has a GPU")
    both = Both(fake(), real)
    monkeypatch.setattr(cuda, "load_runtime", lambda: both)
    device = cuda.Cuda()
    device.open()
    array = device.upload(np.arange(10.0))
    graph = device.capture(lambda: None)
    device.launch(graph)
    device.destroy(graph)
    assert device.free_memory() > 0
    with pytest.raises(EngineError, match="within"):
        device.capture(failing)
    np.testing.assert_array_equal(device.download(array), np.arange(10.0))
    device.call("cudaDriverGetVersion")
    device.close()
    text = Path(str(cuda.__file__)).read_text(encoding="utf-8")
    assert both.called == set(re.findall(r"call\(\s*\"(\w+)\"", text))


def failing() -> None:
    raise EngineError("it failed within")


@pytest.mark.parametrize("present", cuda.LAYOUTS)
def test_cuda_python_is_found_in_each_of_its_layouts(
    monkeypatch: pytest.MonkeyPatch, present: str
) -> None:
    def load(name: str) -> str:
        if name != present:
            raise ModuleNotFoundError(name=name)
        return name

    monkeypatch.setattr(cuda, "import_module", load)
    assert cuda.load_runtime() == present


def test_no_cuda_python_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> ModuleType:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(cuda, "import_module", load)
    assert '"bbt-accel[trt]"' in one_line(cuda.load_runtime, MissingDependency)


# Building ahead of time, with the real TensorRT for RTX


@pytest.fixture(scope="module")
def rtx() -> Api:
    module = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: [trt]")
    return Api("tensorrt_rtx", module)


@pytest.fixture
def no_gpu() -> None:
    with contextlib.suppress(EngineError):
        cuda.Cuda()
        pytest.skip("this machine has a GPU")


def records(bundle: Bundle) -> dict[str, Record]:
    files = (bundle.path / PLANS).glob("*/*.json")
    return {file.stem: Record.model_validate_json(file.read_text()) for file in files}


RECENT = [
    ("llama", "bbtv2", "add"), ("gemma3", "bbt", "cat"), ("modernbert", "bbt", "cat"), ("eurobert",
    "bbtv2", "add"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*VARIANTS[::4], *VARIANTS[11::6], *RECENT], ids="-".join)
def test_plans_are_built_ahead_of_time_for_every_method_and_mode(
    tiny: Export, rtx: Api, tmp_path: Path, variant: tuple[str, str, str]
) -> None:
    source = tiny(*variant)
    made = optimize_bundle(
        source.path, tmp_path / "made", precision="fp16", target="trt", compute_capability="8.9"
    )
    report, info = made.info.optimization or {}, made.info
    assert (info.precision, info.target) == ("fp16", "trt")
    assert report["plans"] == len(info.stages) + 2
    assert report["agreement"] >= 0.95
    assert report["logit_error"] < 0.05
    inspect_all(made, records(made))


def inspect_all(bundle: Bundle, found: dict[str, Record]) -> None:
    assert set(found) == {*bundle.info.stages, "project", "statistics"}
    for stage, record in found.items():
        inspect(bundle, stage, record)


def inspect(bundle: Bundle, stage: str, record: Record) -> None:
    """Inputs, outputs, types and profiles are those of the graph; a driver is needed for more."""
    assert record.key.capability == ("8.9",)
    assert record.key.gpu is None
    graph = onnx.load(bundle.path / f"{stage}.onnx", load_external_data=False).graph
    assert {t.name for t in record.inputs} == {i.name for i in graph.input}
    assert [t.name for t in record.outputs] == [o.name for o in graph.output]
    assert {t.dtype for t in record.outputs} == {"float"}
    for tensor in record.inputs:
        floats = (
            "prompts",
            "context",
            "hidden",
            "prefix",
            "z",
            "matrix",
            "p0",
            "label_logits",
            "targets",
            "classes",
        )
        assert tensor.dtype == ("float" if tensor.name in floats else "int64")
        assert tensor.profile is not None
        low, best, high = tensor.profile
        for size, *bounds in zip(tensor.shape, low, best, high, strict=True):
            assert bounds == sorted(bounds)
            assert size < 0 or bounds == [size] * 3
    plan = bundle.path / PLANS / "sm89" / f"{stage}.plan"
    assert plan.stat().st_size == record.bytes > 1000


SEPARATE = ("olmo2",)
"""Families whose queries and keys are normalized over all heads, right behind their matmuls, which
stay apart then.
"""


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name == "roberta" else pytest.mark.slow)
        for name in families()
    ],
)
def test_every_family_is_built_with_fused_attention(
    exported: Export, rtx: Api, tmp_path: Path, family: str
) -> None:
    make_backbone(
        f"tiny-{family}", tmp_path / family
    )  # with heads of 16, the smallest that TensorRT fuses
    source, output = exported(tmp_path / family, "bbt", "add", 5), tmp_path / "made"
    made = optimize_bundle(
        source.path, output, precision="fp16", target="trt", compute_capability="8.9"
    )
    report, found = made.info.optimization or {}, records(made)
    inspect_all(made, found)
    fused = 0
    for stage in made.info.stages:
        kernels, graph = (
            found[stage].kernels,
            onnx.load(made.path / f"{stage}.onnx", load_external_data=False).graph,
        )
        assert kernels is not None
        assert kernels.other_attention == []
        assert kernels.fused_attention == sum(node.op_type == "Softmax" for node in graph.node)
        fused += kernels.fused_attention
        side_by_side = [
            names for names in matmuls_of_one_input(graph) if len(names) >= 3
        ]  # queries, keys and values
        if family not in SEPARATE:
            assert all(
                any(names <= set(merged) for merged in kernels.merged_matmuls)
                for names in side_by_side
            )
    assert (report["attention_fused"], report["attention_not_fused"]) == (fused, 0)
    assert fused >= made.info.n_layers


def matmuls_of_one_input(graph: onnx.GraphProto) -> list[set[str]]:
    """Names of the matmuls with weights that read the same tensor."""
    weights, found = {t.name for t in graph.initializer}, defaultdict[str, set[str]](set)
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            found[node.input[0]].add(node.name)
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", [("t5", "bbt", "add"), ("gpt2", "bbtv2", "add")], ids="-".join)
def test_the_other_precisions_are_built_too(
    tiny: Export, rtx: Api, tmp_path: Path, variant: tuple[str, str, str], precision: str
) -> None:
    made = optimize_bundle(
        tiny(*variant).path,
        tmp_path / "made",
        precision=precision,
        target="trt",
        compute_capability="8.6,8.9",
    )
    report = made.info.optimization or {}
    assert report["logit_error"] < (0.06 if precision == "bf16" else 1e-5)
    assert {record.key.capability for record in records(made).values()} == {("8.6", "8.9")}
    types = {
        t.data_type for t in onnx.load(made.path / f"{made.info.stages[-1]}.onnx").graph.initializer
    }
    assert (onnx.TensorProto.BFLOAT16 in types) == (precision == "bf16")


@pytest.fixture(scope="module")
def ahead(tiny: Export, rtx: Api, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("ahead") / "made"
    return optimize_bundle(
        tiny("bert", "bbt", "add").path, output, target="trt", compute_capability="8.9"
    )


@pytest.fixture
def copy(ahead: Bundle, tmp_path: Path) -> Bundle:
    shutil.copytree(ahead.path, tmp_path / "copy")
    return Bundle.read(tmp_path / "copy")


def ahead_key(bundle: Bundle, api: Api) -> Key:
    return plans.keys(bundle, api, None, ("8.9",), None)["model"]


def get_plan(bundle: Bundle, api: Api, messages: list[str]) -> bytes:
    [(_, plan)] = each_plan(bundle, {"model": ahead_key(bundle, api)}, api, messages.append, silent)
    return plan


def test_a_plan_that_fits_is_not_built_again(
    copy: Bundle, rtx: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_building, "build", lambda *_: pytest.fail("it was built"))
    messages: list[str] = []
    assert get_plan(copy, rtx, messages)
    assert messages == []


def test_a_plan_that_is_damaged_is_rebuilt_with_a_reason(copy: Bundle, rtx: Api) -> None:
    file = copy.path / PLANS / "sm89" / "model.plan"
    file.write_bytes(file.read_bytes()[:-1])
    messages: list[str] = []
    plan = get_plan(copy, rtx, messages)
    assert "damaged" in messages[0]
    assert "this takes minutes" in messages[0]
    assert file.read_bytes() == plan
    assert not [p.name for p in file.parent.iterdir() if p.name.startswith(".")], (
        "a temporary file was left"
    )
    Bundle.read(copy.path)  # plans are no part of its sha256


def test_a_node_that_the_parser_refuses_is_named(copy: Bundle, rtx: Api) -> None:
    model = onnx.load(copy.path / "model.onnx", load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "MatMul")
    node.op_type, node.name = "Hardmax2", "strange"
    (copy.path / "model.onnx").write_bytes(model.SerializeToString())
    message = one_line(lambda: plans.build(rtx, copy, "model", ahead_key(copy, rtx)), PlanError)
    assert "Hardmax2 strange" in message


@pytest.mark.usefixtures("no_gpu")
def test_a_plan_cannot_be_loaded_without_a_driver_and_says_so(copy: Bundle, rtx: Api) -> None:
    logger = trt_api.new_logger(rtx)
    plan = (copy.path / PLANS / "sm89" / "model.plan").read_bytes()
    assert rtx.module.Runtime(logger).deserialize_cuda_engine(plan) is None
    assert "no NVIDIA GPU" in trt_api.reason(logger.errors)


def local_key(bundle: Bundle, api: Api, gpu: str, capability: str) -> Key:
    return plans.keys(bundle, api, gpu, (capability,), "580.65")["model"]


def test_a_plan_for_the_gpu_of_this_machine_is_built_for_its_compute_capability(
    copy: Bundle, rtx: Api
) -> None:
    """TensorRT for RTX builds for other capabilities than Turing's unless it is told."""
    builder = trt_api.start(rtx, "Builder", trt_api.new_logger(rtx))
    config = plans.configure(rtx, builder, local_key(copy, rtx, "NVIDIA GeForce RTX 2080", "7.5"))
    assert config.num_compute_capabilities == 1
    assert config.get_compute_capability(0) == rtx.module.ComputeCapability.SM75


def test_a_gpu_that_tensorrt_for_rtx_does_not_support_names_the_other_tensorrt(
    copy: Bundle, rtx: Api
) -> None:
    builder = trt_api.start(rtx, "Builder", trt_api.new_logger(rtx))
    key = local_key(copy, rtx, "NVIDIA H100 80GB HBM3", "9.0")
    message = one_line(lambda: plans.configure(rtx, builder, key), PlanError)
    assert "compute capability 9.0" in message
    assert message.endswith("pip install tensorrt")


def test_a_gpu_that_is_not_supported_is_refused_before_anything_is_converted(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tensorrt, "local_gpu", lambda: ("NVIDIA H100 80GB HBM3", ("9.0",), "580.65")
    )
    install(tensorrt_rtx="tensorrt_rtx")
    assert "compute capability 9.0" in one_line(lambda: check_capabilities(None), PlanError)
    install(tensorrt="tensorrt 11", tensorrt_rtx="tensorrt_rtx")
    assert check_capabilities(None) == ()


def test_out_of_memory_says_what_to_do() -> None:
    message = trt_api.reason(["Error Code 2: OutOfMemory (Requested size was 17179869184 bytes.)"])
    assert message.startswith("out of memory")
    assert "--calibrate" in message


@pytest.mark.skipif(importlib.util.find_spec("cuda") is None, reason="cuda-python is not installed")
@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_optimize_names_the_way_ahead(tiny: Export, rtx: Api, tmp_path: Path) -> None:
    source = tiny("bert", "bbt", "add").path
    assert "--compute-capability" in one_line(
        lambda: optimize_bundle(source, tmp_path / "made", target="trt"), EngineError
    )
    assert list(tmp_path.iterdir()) == []


def test_compute_capability_belongs_to_tensorrt(tiny: Export, rtx: Api, tmp_path: Path) -> None:
    source = tiny("bert", "bbt", "add").path
    for options in ({"target": "ort"}, {"target": "trt", "compute_capability": "9.9"}):
        with pytest.raises(BbtError, match="--compute-capability"):
            optimize_bundle(source, tmp_path / "made", **{"compute_capability": "8.9", **options})
    assert list(tmp_path.iterdir()) == []


def test_a_builder_that_cannot_start_is_an_error(
    copy: Bundle, rtx: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(api: Api) -> Any:
        return SimpleNamespace(errors=["no memory"])

    def builder(logger: Any) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    module = SimpleNamespace(Builder=builder)
    monkeypatch.setattr(plans, "new_logger", none)
    message = one_line(lambda: plans.build(Api("tensorrt", module), copy, "model", KEY), PlanError)
    assert "cannot start" in message

"""How engines are chosen, what they refuse, and that the core needs none of the heavy libraries."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import onnxruntime
import torch
from conftest import THREADS, Export, Load, one_line
from tiny_backbones import POSITIONS, VARIANTS, VOCABULARY

from bbt_accel import Batch, Bundle, Population, load_engine, load_task
from bbt_accel.errors import (
    BbtError,
    BundleError,
    DataError,
    EngineError,
    MissingDependency,
    UsageError,
)
from bbt_accel.exporters.trace.validate import sample_rows

ROOT = Path(__file__).parents[2]
REAL = ["torch", "eager", "ort"]
REAL_STAGED = ["torch", "ort", *(["openvino"] if importlib.util.find_spec("openvino") else [])]


@pytest.fixture(scope="module")
def bundle(tiny: Export) -> Bundle:
    return tiny("roberta", "bbt", "add")


@pytest.fixture(scope="module")
def deep(tiny: Export) -> Bundle:
    return tiny("roberta", "bbtv2", "add")


def rows(count: int = 3, tokens: int = 9) -> Batch:
    ids = np.random.default_rng(0).integers(5, VOCABULARY, (count, tokens))
    return Batch(ids, np.ones_like(ids), np.full(count, 6), np.zeros(count), np.array([7, 8]))  # type: ignore[arg-type]


def like(bundle: Bundle, **changes: object) -> Bundle:
    return Bundle(bundle.path, bundle.info.model_copy(update=changes))


def test_rows_that_are_too_long_are_refused_and_padding_is_not(bundle: Bundle) -> None:
    """OpenVINO returned what the call before had left in its outputs."""
    batch, limit, prompts = (
        rows(),
        bundle.info.max_length,
        np.zeros((2, *bundle.info.prompt_shape), np.float32),
    )
    for name in REAL_STAGED:
        with load_engine(bundle, name, threads=THREADS) as engine:
            with engine.bind(batch) as bound:
                found = bound.label_logits(prompts)
            with engine.bind(batch.padded(limit + 9, bundle.info.special.pad)) as bound:
                np.testing.assert_allclose(bound.label_logits(prompts), found, atol=1e-5)
            far = batch.padded(limit + 9, bundle.info.special.pad)
            for wrong in (
                rows(tokens=limit + 1),
                dataclasses.replace(far, readout=np.full(3, limit)),
            ):
                with pytest.raises(
                    DataError, match=f"a row has {limit + 1} tokens, the backbone takes {limit}"
                ):
                    engine.bind(wrong)
        whole = load_engine(bundle, name, threads=THREADS, without=["buckets"])
        with whole as engine, pytest.raises(DataError, match=f"a row has {limit + 9} tokens"):
            engine.bind(far)


def test_hidden_states_are_measured_with_their_padding(deep: Bundle) -> None:
    limit = deep.info.max_length
    far = rows().padded(limit + 9, deep.info.special.pad)
    for name in REAL_STAGED:
        with load_engine(deep, name, threads=THREADS) as engine, engine.bind(far) as bound:
            assert f"a row has {limit + 9} tokens" in one_line(bound.layer_stds, DataError)


def test_hidden_states_are_measured_for_bbtv2_alone(bundle: Bundle) -> None:
    for name in [*REAL_STAGED, "eager"]:
        with load_engine(bundle, name, threads=THREADS) as engine, engine.bind(rows()) as bound:
            assert "export one with --method bbtv2" in one_line(bound.layer_stds, BundleError)


def test_a_checkpoint_is_loaded_from_several_threads(bundle: Bundle) -> None:
    """transformers loses weights, and standard error stayed redirected."""
    where = sys.stderr
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: load_engine(bundle, "torch", threads=1).close(), range(8)))
    assert sys.stderr is where


@pytest.mark.parametrize("name", ["input_ids", "readout", "targets", "label_token_ids"])
def test_a_batch_holds_integers(name: str) -> None:
    given = rows().arrays()
    for wrong in (given[name] + 0.5, np.full(given[name].shape, np.nan)):
        with pytest.raises(DataError, match=f"{name} of a batch must hold integers"):
            Batch(**{**given, name: wrong})


# Which engine


@pytest.mark.parametrize(
    ("typed", "meant"), [("trch", "torch"), ("onrt", "ort"), ("OpenVINO", "openvino")]
)
def test_an_engine_that_is_misspelled(bundle: Bundle, typed: str, meant: str) -> None:
    assert f"did you mean {meant}?" in one_line(lambda: load_engine(bundle, typed), UsageError)


def test_an_engine_that_does_not_exist_gets_the_list(bundle: Bundle) -> None:
    assert "torch, ort, openvino, trt" in one_line(
        lambda: load_engine(bundle, "quantum"), UsageError
    )


@pytest.mark.parametrize("name", REAL)
def test_a_device_that_does_not_exist(bundle: Bundle, name: str) -> None:
    assert "cpu, cuda or cuda:N" in one_line(
        lambda: load_engine(bundle, name, device="tpu"), UsageError
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", REAL)
def test_a_gpu_that_is_not_there_is_an_error_and_never_the_cpu(bundle: Bundle, name: str) -> None:
    message = one_line(lambda: load_engine(bundle, name, device="cuda"), EngineError)
    assert "--device cuda" in message
    assert "doctor" in message


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_provider_that_is_listed_but_cannot_start_is_an_error(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr("bbt_accel.engines.ort_cuda.find_cuda", lambda: None)
    message = one_line(lambda: load_engine(bundle, "ort", device="cuda"), EngineError)
    assert "CUDAExecutionProvider could not start; see bbt-accel doctor" in message


def test_a_provider_that_this_onnxruntime_lacks_is_named(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", list)
    assert "CPUExecutionProvider" in one_line(lambda: load_engine(bundle, "ort"), EngineError)


def test_two_onnxruntimes_that_broke_each_other_are_told(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(onnxruntime, "InferenceSession")
    assert "uninstall both" in one_line(lambda: load_engine(bundle, "ort"), EngineError)


@pytest.mark.parametrize(
    ("name", "module", "library", "extra"),
    [
        ("ort", "ort", "onnxruntime", "cpu"),
        ("torch", "pytorch", "torch", "export"),
        ("eager", "baselines", "torch", "export"),
        ("openvino", "openvino", "openvino", "openvino"),
        ("remote", "client", "gevent", "remote"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    module: str,
    library: str,
    extra: str,
) -> None:
    for loaded in (module, name):
        monkeypatch.delitem(sys.modules, f"bbt_accel.engines.{loaded}", raising=False)
    monkeypatch.setitem(sys.modules, library, None)  # type: ignore[arg-type]
    options = {"url": "http://127.0.0.1:8000"} if name == "remote" else {}
    message = one_line(lambda: load_engine(bundle, name, **options), MissingDependency)  # type: ignore[arg-type]
    assert library in message
    assert f'"bbt-accel[{extra}]"' in message


@pytest.mark.parametrize("name", ["torch", "eager", "ort"])
def test_a_bundle_for_another_engine_is_refused_and_names_it(bundle: Bundle, name: str) -> None:
    for target in ("openvino", "trt"):
        message = one_line(lambda t=target: load_engine(like(bundle, target=t), name), EngineError)
        assert f"--engine {target}" in message


def test_an_engine_that_runs_optimized_bundles_alone_says_how_to_make_one(bundle: Bundle) -> None:
    assert "optimize --target trt" in one_line(lambda: load_engine(bundle, "trt"), EngineError)


def test_a_graph_that_cannot_be_loaded_is_named(bundle: Bundle) -> None:
    assert "nothing.onnx" in one_line(
        lambda: load_engine(like(bundle, stages=["nothing"]), "ort"), EngineError
    )


def test_an_optimization_that_is_misspelled(bundle: Bundle) -> None:
    assert "did you mean buckets?" in one_line(
        lambda: load_engine(bundle, "ort", without=["bucket"]), UsageError
    )


def test_an_optimization_that_is_part_of_the_graphs(bundle: Bundle) -> None:
    message = one_line(lambda: load_engine(bundle, "ort", without=["last-block"]), UsageError)
    assert "without=['last-block']" in message


@pytest.mark.parametrize("name", REAL)
def test_an_engine_loads_a_path_as_well_as_a_bundle(bundle: Bundle, name: str) -> None:
    with load_engine(bundle.path, name, threads=THREADS) as engine:
        assert engine.name == name
        assert engine.bundle.info == bundle.info
        assert engine.versions()


# Precision and baselines


@pytest.mark.parametrize("name", ["torch", "eager", "eager-readout"])
@pytest.mark.parametrize("variant", VARIANTS, ids=["-".join(variant) for variant in VARIANTS])
def test_pytorch_computes_in_the_precision_of_the_bundle(
    tiny: Export, loaded: Load, variant: tuple[str, str, str], name: str
) -> None:
    exact, half = tiny(*variant), like(tiny(*variant), precision="bf16", target="torch")
    batch = sample_rows(exact)
    prompts = 0.3 * np.random.default_rng(0).standard_normal(
        (2, *exact.info.prompt_shape), dtype=np.float32
    )
    with loaded(exact, "eager").bind(batch) as bound:
        wanted = bound.label_logits(prompts)
    with load_engine(half, name, threads=THREADS) as engine, engine.bind(batch) as bound:
        error = np.abs(bound.label_logits(prompts) - wanted).max() / np.abs(wanted).max()
    assert 1e-5 < error < 0.1


@pytest.mark.parametrize("variant", VARIANTS, ids=["-".join(variant) for variant in VARIANTS])
def test_the_lm_head_at_the_readout_alone_gives_the_numbers_of_the_whole(
    tiny: Export, loaded: Load, variant: tuple[str, str, str]
) -> None:
    bundle = tiny(*variant)
    batch, rng = sample_rows(bundle), np.random.default_rng(0)
    prompts = rng.standard_normal((2, *bundle.info.prompt_shape), dtype=np.float32)
    with (
        loaded(bundle, "eager").bind(batch) as whole,
        loaded(bundle, "eager-readout").bind(batch) as readout,
    ):
        np.testing.assert_allclose(
            readout.label_logits(prompts), whole.label_logits(prompts), rtol=0, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_the_compiled_baseline_gives_the_numbers_of_eager(bundle: Bundle, loaded: Load) -> None:
    prompts = np.random.default_rng(0).standard_normal(
        (3, *bundle.info.prompt_shape), dtype=np.float32
    )
    with loaded(bundle, "eager").bind(rows()) as bound:
        wanted = bound.label_logits(prompts)
    with load_engine(bundle, "compiled", threads=THREADS) as engine, engine.bind(rows()) as bound:
        np.testing.assert_allclose(bound.label_logits(prompts), wanted, rtol=0, atol=1e-5)


# Threads


@pytest.fixture
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads_as_before")
@pytest.mark.parametrize("name", ["torch", "eager"])
@pytest.mark.parametrize("threads", [1, 2])
def test_pytorch_takes_the_threads_that_it_is_given(
    bundle: Bundle, name: str, threads: int
) -> None:
    before = torch.get_num_threads()
    with load_engine(bundle, name, threads=threads) as engine:
        assert torch.get_num_threads() == threads
        assert f"{threads} threads" in engine.versions()["device"]
    assert torch.get_num_threads() == before


CORES_OF_THREADS = """
import contextlib, os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from bbt_accel import Batch, load_engine
path, name = sys.argv[1:]
own = os.sched_getaffinity(0)
def cores():
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended
            yield os.sched_getaffinity(int(task.name))
ids = np.full((2, 9), 7)
batch = Batch(ids, np.ones_like(ids), np.full(2, 6), np.zeros(2, np.int64), np.array([7, 8]))
with (
    load_engine(path, name, threads=1) as engine,
    engine.bind(batch) as bound,
    ThreadPoolExecutor(1) as pool,
):
    prompt, free = engine.bundle.start_prompt()[None], True
    computing = pool.submit(lambda: [bound.label_logits(prompt) for _ in range(100)])
    while not computing.done():
        free = free and all(found == own for found in cores())
    print(free)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="shown by Linux only")
@pytest.mark.parametrize("name", ["torch", "ort", "openvino"])
def test_a_thread_may_use_any_core_so_that_processes_do_not_share_one(
    bundle: Bundle, name: str
) -> None:
    if name == "openvino":
        pytest.importorskip("openvino")
    command = [sys.executable, "-c", CORES_OF_THREADS, str(bundle.path), name]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout == "True\n"


@pytest.mark.usefixtures("_threads_as_before")
def test_engines_that_are_closed_in_any_order_leave_pytorchs_threads_as_they_were(
    bundle: Bundle,
) -> None:
    before = torch.get_num_threads()
    first, second = (load_engine(bundle, "torch", threads=before + more) for more in (1, 2))
    first.close()
    assert torch.get_num_threads() == before + 2
    second.close()
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("_threads_as_before")
@pytest.mark.parametrize("name", ["torch", "eager"])
def test_a_load_that_fails_leaves_pytorchs_threads_as_they_were(
    tiny: Export, tmp_path: Path, name: str
) -> None:
    bundle = Bundle(tmp_path, tiny("roberta").info)  # without a checkpoint
    before = torch.get_num_threads()
    with pytest.raises(BbtError):
        load_engine(bundle, name, threads=before + 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("threads", "wanted"), [(1, 1), (2, 2), (None, 0)])
def test_onnxruntime_takes_the_threads_that_it_is_given(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, threads: int | None, wanted: int
) -> None:
    """0 is ONNX Runtime's word for all cores."""
    seen, session = [], onnxruntime.InferenceSession

    def watched(path: str, options: Any, *more: Any, **named: Any) -> Any:
        seen.append(options.intra_op_num_threads)
        return session(path, options, *more, **named)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    load_engine(bundle, "ort", threads=threads).close()
    assert set(seen) == {wanted}


def test_no_threads_at_all_is_wrong_usage(bundle: Bundle) -> None:
    assert "threads must be" in one_line(lambda: load_engine(bundle, "ort", threads=0), UsageError)


# What an engine is given


@pytest.mark.parametrize("name", [*REAL, "dummy"])
@pytest.mark.parametrize("shape", [(3, 16), (2, 4, 16), (2, 3, 15), (2, 2, 3, 16), (0,)])
def test_prompts_of_another_shape_are_wrong_usage(
    bundle: Bundle, loaded: Load, name: str, shape: tuple[int, ...]
) -> None:
    with loaded(bundle, name).bind(rows()) as bound:
        message = one_line(lambda: bound.label_logits(np.zeros(shape, np.float32)), UsageError)
    assert "(P, 3, 16)" in message
    assert str(shape) in message


@pytest.mark.parametrize("name", [*REAL, "dummy"])
def test_a_population_without_candidates_is_wrong_usage(
    bundle: Bundle, loaded: Load, name: str
) -> None:
    with loaded(bundle, name).bind(rows()) as bound:
        message = one_line(lambda: bound.label_logits(np.zeros((0, 3, 16), np.float32)), UsageError)
    assert "at least one candidate" in message


@pytest.mark.parametrize("name", [*REAL, "dummy"])
@pytest.mark.parametrize(
    ("fixed", "layer", "candidates", "says"),
    [
        ((2, 3, 16), 2, (4, 3, 16), "0..1"),
        ((2, 3, 16), -1, (4, 3, 16), "0..1"),
        ((3, 3, 16), 0, (4, 3, 16), "fixed"),
        ((2, 3, 16), 0, (3, 16), "prompts"),
        ((2, 3, 16), 0, (4, 2, 16), "prompts"),
    ],
)
def test_layers_that_are_not_there_and_stacks_of_another_shape_are_wrong_usage(
    deep: Bundle, loaded: Load, name: str, fixed: Any, layer: int, candidates: Any, says: str
) -> None:
    with loaded(deep, name).bind(rows()) as bound:
        population = Population(np.zeros(candidates), layer, np.zeros(fixed))
        message = one_line(lambda: bound.label_logits(population), UsageError)
    assert says in message


@pytest.mark.parametrize("name", REAL)
def test_a_bbt_bundle_has_no_layers_to_search(bundle: Bundle, loaded: Load, name: str) -> None:
    with loaded(bundle, name).bind(rows()) as bound:
        none = np.zeros((2, 3, 16), np.float32)
        assert "bbtv2" in one_line(
            lambda: bound.label_logits(Population(none, 0, none)), UsageError
        )


@pytest.mark.parametrize("name", REAL)
def test_prompts_may_come_in_double_precision_and_any_layout(
    bundle: Bundle, deep: Bundle, name: str
) -> None:
    rng = np.random.default_rng(0)
    with load_engine(bundle, name, threads=THREADS) as engine, engine.bind(rows()) as bound:
        prompts = rng.standard_normal((16, 3, 2)).T
        wanted = bound.label_logits(np.ascontiguousarray(prompts, np.float32))
        np.testing.assert_array_equal(bound.label_logits(prompts), wanted)  # type: ignore[arg-type]
    with load_engine(deep, name, threads=THREADS) as engine, engine.bind(rows()) as bound:
        stack, some = rng.standard_normal((2, 3, 16)), rng.standard_normal((4, 3, 16))
        wanted = bound.label_logits(
            Population(some.astype(np.float32), 1, stack.astype(np.float32))
        )
        np.testing.assert_array_equal(bound.label_logits(Population(some, 1, stack)), wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("field", ["input_ids", "label_token_ids"])
@pytest.mark.parametrize("token", [VOCABULARY, -1])
def test_tokens_outside_the_vocabulary_are_named(
    bundle: Bundle, loaded: Load, name: str, field: str, token: int
) -> None:
    batch = rows()
    ids = getattr(batch, field).copy()
    ids.flat[-1] = token
    strange = dataclasses.replace(batch, **{field: ids})
    assert f"{field} holds {token}" in one_line(
        lambda: loaded(bundle, name).bind(strange), UsageError
    )


@pytest.mark.parametrize("name", ["torch", "ort"])
def test_a_forward_pass_that_fails_is_one_clear_line(bundle: Bundle, name: str) -> None:
    boastful = like(bundle, max_length=2 * POSITIONS)
    with (
        load_engine(boastful, name, threads=THREADS) as engine,
        engine.bind(rows(tokens=POSITIONS + 5)) as bound,
    ):
        message = one_line(
            lambda: bound.label_logits(np.zeros((1, 3, 16), np.float32)), EngineError
        )
    assert "failed in model" in message


# What is freed


@pytest.mark.parametrize("name", REAL)
def test_leaving_an_engine_frees_its_model(bundle: Bundle, name: str) -> None:
    with load_engine(bundle, name, threads=THREADS) as engine:
        held = {"torch": "backbone", "eager": "reference", "ort": "sessions"}[name]
        model = getattr(engine, held)
        watch = weakref.ref(model["model"] if name == "ort" else model)
        with engine.bind(rows()) as bound:
            bound.label_logits(np.zeros((2, 3, 16), np.float32))
        del model
    gc.collect()
    assert watch() is None
    engine.close()  # once more does no harm


@pytest.mark.parametrize("name", ["torch", "ort"])
def test_rows_that_were_closed_give_an_error_and_no_numbers(
    bundle: Bundle, loaded: Load, name: str
) -> None:
    with loaded(bundle, name).bind(rows()) as bound:
        pass
    assert "closed" in one_line(
        lambda: bound.label_logits(np.zeros((1, 3, 16), np.float32)), EngineError
    )


@pytest.mark.parametrize("name", ["torch", "ort", "openvino"])
def test_an_engine_that_was_closed_gives_an_error_and_no_numbers(bundle: Bundle, name: str) -> None:
    pytest.importorskip({"ort": "onnxruntime"}.get(name, name))
    with load_engine(bundle, name, threads=THREADS) as engine:
        bound = engine.bind(rows())
    message = one_line(lambda: bound.label_logits(np.zeros((1, 3, 16), np.float32)), EngineError)
    assert "load it again" in message


def test_a_call_that_fails_leaves_no_layer_in_the_cache(
    tiny: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the states of one stack would be taken for those of another."""
    deep, rng = tiny("electra", "bbtv2", "add"), np.random.default_rng(0)
    one, other = rng.standard_normal((2, *deep.info.prompt_shape)).astype(np.float32)
    some = rng.standard_normal((2, *deep.info.prompt_shape[1:])).astype(np.float32)
    with load_engine(deep, "ort", threads=THREADS) as engine, engine.bind(rows()) as bound:
        wanted, run = bound.label_logits(Population(some, 1, one)), engine.run  # type: ignore[attr-defined]

        def failing(stage: str, *given: Any) -> Any:
            if stage == "block_01":
                raise EngineError("out of memory")
            return run(stage, *given)

        monkeypatch.setattr(engine, "run", failing)
        one_line(lambda: bound.label_logits(Population(some, 2, other)), EngineError)
        monkeypatch.setattr(engine, "run", run)
        np.testing.assert_array_equal(bound.label_logits(Population(some, 1, one)), wanted)


# What needs nothing

BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "onnx", "onnxscript", "onnx_ir"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def python(code: str, *arguments: str, folder: Path) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_bbt_accel_loads_no_runtime(tmp_path: Path) -> None:
    heavy = (
        "{'torch', 'transformers', 'onnx', 'onnxruntime', 'openvino', 'numpy', 'datasets', "
        "'matplotlib', 'cma'}"
    )
    assert (
        python(f"import sys, bbt_accel; print({heavy} & set(sys.modules))", folder=tmp_path)
        == "set()"
    )


def test_what_is_public_is_listed_and_loads() -> None:
    import bbt_accel

    assert dir(bbt_accel) == bbt_accel.__all__
    assert all(getattr(bbt_accel, name) is not None for name in bbt_accel.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bbt_accel.nothing


def modules() -> list[str]:
    """Every module of the package, from the folders it is installed from."""
    names = []
    for folder, prefix in (
        ("bbt_accel", ""),
        *((f, "bbt_accel.") for f in ("engines", "exporters", "benchmarks")),
    ):
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            names.append(prefix + ".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def test_every_module_but_those_of_pytorch_imports_without_it(tmp_path: Path) -> None:
    code = f"""{BLOCK}
import importlib
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name, error.name)
"""
    optional = {"openvino", "tensorrt", "tensorrt_rtx", "cuda"}
    optional |= {"starlette", "uvicorn", "tritonclient", "gevent", "geventhttpclient"}
    absent = {name for name in optional if importlib.util.find_spec(name) is None}
    failed = [line.split() for line in python(code, *modules(), folder=tmp_path).splitlines()]
    strange = [
        (name, library)
        for name, library in failed
        if not name.startswith(("bbt_accel.exporters.", "bbt_accel.package."))
        and name.removeprefix("bbt_accel.")
        not in (
            "engines.pytorch",
            "engines.baselines",
            "engines.torch_statistics",
            "benchmarks.make_backbone",
            "benchmarks.references",
        )
        and library.split(".")[0] not in absent
    ]
    assert strange == []


def test_tuning_and_predicting_need_onnxruntime_alone(tiny: Export, tmp_path: Path) -> None:
    code = f"""{BLOCK}
import os
from bbt_accel import tune
from bbt_accel.predict.inference import evaluate, predict_texts
settings = dict(k_shot=2, intrinsic_dim=5, popsize=4, budget=16, eval_every=8)
for bundle in sys.argv[1:]:
    output = os.path.basename(bundle)
    options = dict(engine="ort", threads=1, output=output, settings=settings, progress=False)
    run = tune(bundle, "demo", **options)
    (answer,) = predict_texts(output, [dict(text="The match ended in a draw.")], threads=1)
    assert abs(sum(answer["probabilities"].values()) - 1) < 1e-6
    print(run.info.bundle.method, run.info.status, answer["word"])
"""
    bundles = [tiny("roberta", method).path for method in ("bbt", "bbtv2")]
    told = [line.split() for line in python(code, *map(str, bundles), folder=tmp_path).splitlines()]
    assert [words[:2] for words in told] == [["bbt", "done"], ["bbtv2", "done"]]
    assert {word for *_, word in told} <= set(load_task("demo").words("masked"))
    assert all((tmp_path / bundle.name / "prompt.safetensors").is_file() for bundle in bundles)

"""A Triton model repository: config.pbtxt matches the graphs, and the model files run from the
repository alone.
"""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip(
    "tritonclient.grpc", reason="tritonclient and grpcio are not installed", exc_type=ImportError
)
pytest.importorskip("grpc")
pytest.importorskip("google.protobuf")

import onnx
import onnxruntime
from conftest import Export
from google.protobuf import text_format
from serving_parts import prompts, rows
from tiny_backbones import EACH, RELATIVES, marks
from tiny_bundles import linked
from tritonclient.grpc import model_config_pb2 as model_config

from bbt_accel import load_engine
from bbt_accel.cli.commands import main
from bbt_accel.core.bundle import Bundle
from bbt_accel.engines.staged import StagedEngine
from bbt_accel.errors import BbtError, BundleError, UsageError
from bbt_accel.exporters.convert.triton import write_repository

KINDS = [
    ("roberta", "bbt", "add"),
    ("bart", "bbt", "cat"),
    ("gpt2", "bbtv2", "add"),
    ("t5", "bbtv2", "add"),
]
KINDS += [
    pytest.param(kind, marks=pytest.mark.slow)
    for kind in (("llama", "bbt", "cat"), ("llama", "bbtv2", "add"))
]
OTHERS = [
    pytest.param(variant, marks=marks(variant)) for variant in RELATIVES if variant[1:] == EACH[0]
]


def read_config(folder: Path) -> Any:
    """Triton's own reader: it refuses fields and values that ModelConfig does not have."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config.ModelConfig())


@pytest.mark.parametrize("kind", KINDS + OTHERS, ids="-".join)
def test_config_matches_the_graph(tiny: Export, tmp_path: Path, kind: tuple[str, str, str]) -> None:
    bundle = tiny(*kind)
    models = write_repository(bundle, tmp_path, "model")
    assert models == [
        "model" if stage == "model" else f"model_{stage}" for stage in bundle.info.stages
    ]
    assert sorted(folder.name for folder in tmp_path.iterdir()) == sorted(models)
    for stage, name in zip(bundle.info.stages, models, strict=True):
        found = read_config(tmp_path / name)
        assert (found.name, found.backend, found.platform) == (
            name,
            "onnxruntime",
            "onnxruntime_onnx",
        )
        assert found.max_batch_size == 0  # rows and candidates are axes of their own
        assert found.parameters["bundle"].string_value == bundle.digest
        assert (
            found.parameters["backbone"].string_value == kind[0]
        )  # and not its path on this machine
        graph = onnx.load(bundle.path / f"{stage}.onnx", load_external_data=False).graph
        for listed, values in ((found.input, graph.input), (found.output, graph.output)):
            assert [tensor_of(t) for t in listed] == [value_of(v) for v in values]


def tensor_of(tensor: Any) -> tuple[str, str, list[int]]:
    return tensor.name, model_config.DataType.Name(tensor.data_type), list(tensor.dims)


def value_of(value: Any) -> tuple[str, str, list[int]]:
    datatype = {onnx.TensorProto.FLOAT: "TYPE_FP32", onnx.TensorProto.INT64: "TYPE_INT64"}
    tensor = value.type.tensor_type
    return value.name, datatype[tensor.elem_type], [d.dim_value or -1 for d in tensor.shape.dim]


class RepositoryEngine(StagedEngine):
    """Runs the models of a repository, each from its own folder, as Triton's onnxruntime backend
    does.
    """

    name = "repository"

    def __init__(self, bundle: Bundle, repository: Path, models: list[str]) -> None:
        super().__init__(bundle, "cpu", 1, frozenset())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.sessions = {
            stage: onnxruntime.InferenceSession(
                repository / name / "1" / "model.onnx" / "model.onnx",
                options,
                providers=["CPUExecutionProvider"],
            )
            for stage, name in zip(bundle.info.stages, models, strict=True)
        }

    def run(self, stage: str, inputs: dict[str, Any], skip: Collection[str] = ()) -> dict[str, Any]:
        session = self.sessions[stage]
        found = session.run(None, {i.name: inputs[i.name] for i in session.get_inputs()})
        return dict(zip([o.name for o in session.get_outputs()], found, strict=True))

    def to_device(self, array: Any) -> Any:
        return np.ascontiguousarray(array)

    def to_host(self, array: Any) -> Any:
        return array

    def versions(self) -> dict[str, str]:
        return {}


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_models_run_from_the_repository_alone(
    tiny: Export, tmp_path: Path, kind: tuple[str, str, str]
) -> None:
    bundle = Bundle.read(shutil.copytree(tiny(*kind).path, tmp_path / "bundle"))
    population, batch = prompts(bundle), rows(readout=4 if bundle.info.causal else 1)
    with load_engine(bundle, "ort", threads=1) as engine, engine.bind(batch) as bound:
        wanted = bound.label_logits(population)
    models = write_repository(bundle, tmp_path / "repository")
    for file in bundle.path.glob("*.safetensors"):  # nothing in the repository may point here
        file.unlink()
    (bundle.path / "weights.data").unlink(missing_ok=True)
    shutil.move(tmp_path / "repository", tmp_path / "elsewhere")
    with RepositoryEngine(bundle, tmp_path / "elsewhere", models).bind(batch) as bound:
        np.testing.assert_allclose(bound.label_logits(population), wanted, atol=1e-5)


def test_the_models_of_an_int8_bundle_run_from_the_repository_alone(
    optimized: Export, tmp_path: Path
) -> None:
    bundle = optimized(("roberta", "bbt", "add"), "int8")
    models = write_repository(bundle, tmp_path / "repository", "bundle")
    assert (
        read_config(tmp_path / "repository" / "bundle").parameters["precision"].string_value
        == "int8"
    )
    population = prompts(bundle)
    with load_engine(bundle, "ort", threads=1) as engine, engine.bind(rows()) as bound:
        wanted = bound.label_logits(population)
    with RepositoryEngine(bundle, tmp_path / "repository", models).bind(rows()) as bound:
        np.testing.assert_allclose(bound.label_logits(population), wanted, atol=1e-5)


def test_a_bundle_of_links_as_in_the_cache_of_the_hub(tiny: Export, tmp_path: Path) -> None:
    bundle = tiny("gpt2", "bbtv2")
    for name, source in (("bundle", bundle), ("links", linked(bundle, tmp_path))):
        write_repository(source, tmp_path / name, "model")
    wanted, found = (
        {
            file.relative_to(folder): file.read_bytes()
            for file in folder.rglob("*")
            if file.is_file()
        }
        for folder in (tmp_path / "bundle", tmp_path / "links")
    )
    assert found == wanted


def test_each_model_holds_only_the_weights_that_it_needs(tiny: Export, tmp_path: Path) -> None:
    bundle = tiny("gpt2", "bbtv2")
    for name in write_repository(bundle, tmp_path):
        files = tmp_path / name / "1" / "model.onnx"
        graph = onnx.load(files / "model.onnx").graph
        needed = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in graph.initializer)
        written = sum(file.stat().st_size for file in files.iterdir())
        assert written < needed + 200_000  # the graph itself, and padding to pages


def test_files_are_readable_for_a_server_that_runs_as_another_user(
    tiny: Export, tmp_path: Path
) -> None:
    write_repository(tiny("roberta"), tmp_path)
    for path in (p for p in tmp_path.rglob("*")):
        wanted = stat.S_IROTH | stat.S_IXOTH if path.is_dir() else stat.S_IROTH
        assert path.stat().st_mode & wanted == wanted, path


def add_plan(bundle: Path, gpu: str, runtime: str, capability: str) -> None:
    """As optimize --target trt caches plans."""
    folder = bundle / "plans" / gpu
    folder.mkdir(parents=True)
    (folder / "model.plan").write_text(f"plan of {gpu}")
    (folder / "model.json").write_text(
        json.dumps({"key": {"runtime": runtime, "capability": [capability]}})
    )


def test_the_plans_of_several_gpus_are_one_model(tiny: Export, tmp_path: Path) -> None:
    source = shutil.copytree(tiny("roberta").path, tmp_path / "bundle")
    bundle = Bundle(source, tiny("roberta").info.model_copy(update={"target": "trt"}))
    add_plan(source, "rtx", "tensorrt_rtx 1.2.0", "12.0")
    with pytest.raises(BundleError, match="no plan of model"):
        write_repository(bundle, tmp_path / "repository")
    add_plan(source, "l4", "tensorrt 10.13.0", "8.9")
    add_plan(source, "h100", "tensorrt 10.13.0", "9.0")
    assert write_repository(bundle, tmp_path / "repository") == ["bundle"]
    found = read_config(tmp_path / "repository" / "bundle")
    assert (found.backend, found.platform) == ("tensorrt", "tensorrt_plan")
    version = tmp_path / "repository" / "bundle" / "1"
    assert {cc: (version / name).read_text() for cc, name in found.cc_model_filenames.items()} == {
        "8.9": "plan of l4",
        "9.0": "plan of h100",
    }
    assert "prompts" in [tensor.name for tensor in found.input]


def test_what_is_refused(tiny: Export, tmp_path: Path) -> None:
    bundle = tiny("roberta")
    write_repository(bundle, tmp_path, "model")
    with pytest.raises(BbtError, match="exists already; remove it, or give another --name"):
        write_repository(bundle, tmp_path, "model")
    write_repository(bundle, tmp_path, "other")  # a repository may hold many models
    with pytest.raises(UsageError, match="not a valid Triton model name"):
        write_repository(bundle, tmp_path, "a model")
    with pytest.raises(BundleError, match="openvino"):
        write_repository(
            Bundle(bundle.path, bundle.info.model_copy(update={"target": "openvino"})),
            tmp_path,
            "third",
        )
    with pytest.raises(UsageError, match="inside the bundle itself"):
        write_repository(bundle, bundle.path / "repository")
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["model", "other"]


def test_a_call_that_was_killed_between_two_models_is_continued(
    tiny: Export, tmp_path: Path
) -> None:
    bundle, other = tiny("roberta", "bbtv2"), tiny("bert", "bbtv2")
    names = write_repository(bundle, tmp_path, "model")
    assert len(names) > 2
    for name in names[1:]:
        shutil.rmtree(tmp_path / name)
    with pytest.raises(BbtError, match="exists already"):
        write_repository(other, tmp_path, "model")  # another bundle's
    assert write_repository(bundle, tmp_path, "model") == names
    assert sorted(folder.name for folder in tmp_path.iterdir()) == sorted(names)


def test_the_command_names_the_model_after_its_bundle_and_refuses_what_is_none(
    tiny: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tiny("roberta").path

    def run(*words: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["triton", *map(str, words)])
        return caught.value.code, *capsys.readouterr()

    assert run(bundle, "-o", tmp_path / "repository")[0] == 0
    assert read_config(tmp_path / "repository" / bundle.name).name == bundle.name
    code, _, message = run(tmp_path, "-o", tmp_path / "repository")
    assert code == 1
    assert "is not a bundle" in message

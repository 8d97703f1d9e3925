"""Packages: what another tool computes from the folder alone is what `predict` computes."""

from __future__ import annotations

import ast
import json
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Export

pytest.importorskip("torch")

from package_parts import TEXTS, Foreign, tuned
from tiny_bundles import linked

from bbt_accel.cli.commands import main
from bbt_accel.core.bundle import Bundle
from bbt_accel.core.settings import READOUTS
from bbt_accel.errors import BbtError, PackageError
from bbt_accel.exporters.convert.optimize import optimize_bundle
from bbt_accel.io.manifests import facts_digest
from bbt_accel.package import card, web_page
from bbt_accel.package.formats import FORMATS
from bbt_accel.package.layout import find_layout
from bbt_accel.package.manifest import PackageInfo, read_info, write_info
from bbt_accel.package.package import Options, check_package, package_run
from bbt_accel.package.push import push
from bbt_accel.predict.inference import evaluate, predict_texts
from bbt_accel.search.run import Run
from bbt_accel.tasks.encoding import Encoder

HARD = ["", "  ", "[MASK] </s> <mask> it", "👩‍🚀 é 東京", "was " * 120]
PAIRS = [
    ("it was", "great"),
    ("", "was it bad"),
    ("a", ""),
    ("", ""),
    ("[SEP] it", "</s>"),
    ("was " * 70, "was " * 90),
]
PAIRS += [
    ("7777 " * i, "it 7 " * j)
    for i, j in ((14, 30), (30, 14), (21, 22), (22, 21), (40, 40), (41, 40))
]
COMPUTATIONS = [
    ("roberta", "bbt", "add"), ("roberta", "bbt", "cat"), ("roberta", "bbtv2", "add"), ("bert",
    "bbt", "add"),
    ("bart", "bbt", "cat"), ("bart", "bbtv2", "add"), ("t5", "bbt", "add"), ("t5-v1.1", "bbt",
    "cat"),
    ("gpt2", "bbt", "add"), ("gpt2", "bbt", "cat"), ("gpt2", "bbtv2", "add"),
]  # fmt: skip
"""Every way to compute and to place a prompt, and every kind of tokenizer; all families share their
code.
"""
MakeRun = Callable[..., Run]


@pytest.fixture(scope="session")
def made(tiny: Export, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """`made(name, method, mode, **options)`: a run of a tiny backbone, tuned at the first call."""
    known: dict[str, Run] = {}

    def call(name: str = "bert", method: str = "bbt", mode: str = "add", **options: Any) -> Run:
        key = repr((name, method, mode, options))
        if key not in known:
            known[key] = tuned(tiny(name, method, mode), tmp_path_factory.mktemp("run"), **options)
        return known[key]

    return call


@pytest.fixture(scope="session")
def demo(made: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path, PackageInfo]:
    """A package that no test changes."""
    run, folder = made(), tmp_path_factory.mktemp("packages") / "demo"
    return run, folder, package_run(run.path, folder, Options(threads=1))


def package(run: Run, folder: Path, **options: Any) -> tuple[Path, PackageInfo]:
    return folder / "package", package_run(
        run.path, folder / "package", Options(**{"threads": 1, **options})
    )


def wanted(run: Run, texts: list[Any], bundle: Path | None = None) -> Any:
    """Probabilities (N, C) by `predict`."""
    rows = [
        dict(zip(run.task.text, [text] if isinstance(text, str) else text, strict=True))
        for text in texts
    ]
    found = predict_texts(run.path, rows, threads=1, bundle=bundle)
    return np.array([list(answer["probabilities"].values()) for answer in found])


def agrees(run: Run, folder: Path, info: PackageInfo, texts: list[Any]) -> None:
    foreign, expected = Foreign(folder, info.model), wanted(run, texts)
    assert foreign.probabilities(texts) == pytest.approx(expected, abs=1e-5)
    assert foreign.probabilities(texts, truncate=True) == pytest.approx(expected, abs=1e-5)
    assert foreign.probabilities(texts[:1]) == pytest.approx(expected[:1], abs=1e-5)


# What is computed


@pytest.mark.parametrize(("name", "method", "mode"), COMPUTATIONS)
def test_every_way_to_compute(
    made: MakeRun, tmp_path: Path, name: str, method: str, mode: str
) -> None:
    run = made(name, method, mode)
    agrees(run, *package(run, tmp_path), TEXTS + HARD)


@pytest.mark.parametrize("name", ["bert", "roberta", "t5", "gpt2"])
def test_a_pair_of_texts(made: MakeRun, tmp_path: Path, name: str) -> None:
    run = made(name, pair=True)
    folder, info = package(run, tmp_path)
    agrees(run, folder, info, PAIRS)
    usage = (folder / "README.md").read_text(encoding="utf-8")
    assert (
        'tokenizer(["one"], { text_pair: ["another"], padding: true, truncation: true })' in usage
    )


def test_both_texts_of_a_pair_have_a_space_in_front_or_neither(
    made: MakeRun, tmp_path: Path
) -> None:
    with pytest.raises(
        PackageError,
        match="write a space in front of both texts, also where one begins the template",
    ):
        package(made("gpt2", "bbt", "cat", pair=True), tmp_path)
    run = made(
        "gpt2", "bbt", "cat", pair=True, templates={"causal": " {first} and {second} ? It was"}
    )
    agrees(run, *package(run, tmp_path), PAIRS)


@pytest.mark.parametrize("readout", [name for name in READOUTS if name != "verbalizer"])
def test_a_package_has_the_readout_of_its_run(made: MakeRun, tmp_path: Path, readout: str) -> None:
    run = made(readout=readout)
    folder, info = package(run, tmp_path)
    assert info.readout == readout
    agrees(run, folder, info, TEXTS)


def test_several_label_words_of_a_class(made: MakeRun, tmp_path: Path) -> None:
    run = made(readout="prototype", several=True)
    agrees(run, *package(run, tmp_path), TEXTS)


@pytest.mark.parametrize(("method", "mode"), [("bbt", "cat"), ("bbtv2", "add")])
def test_the_context_of_a_decoder_and_its_begin_token(
    made: MakeRun, tmp_path: Path, method: str, mode: str
) -> None:
    run = made("llama", method, mode, demonstrations=2)
    assert run.info.demonstrations
    folder, info = package(run, tmp_path)
    agrees(run, folder, info, TEXTS[:4] + HARD[:3])
    assert "| before every row | 2 labelled train rows |" in (folder / "README.md").read_text(
        encoding="utf-8"
    )


def test_line_breaks_that_a_task_cleans(made: MakeRun, tmp_path: Path) -> None:
    run = made(clean="newlines")
    agrees(run, *package(run, tmp_path), ["it\\nwas\\n", "\\n", " \\nit \n was "])


def test_white_space_as_python_strips_it(demo: tuple[Run, Path, PackageInfo]) -> None:
    spaces = [chr(c) for c in range(0x3001) if chr(c).isspace()]
    agrees(*demo, [f"{c}{c}it{c}was{c}" for c in spaces])


def test_int8_of_a_run_in_fp32(made: MakeRun, tmp_path: Path) -> None:
    run = made("roberta")
    folder, info = package(run, tmp_path, int8=True)
    assert (info.model, info.precision, info.quantized) == (
        "onnx/model_quantized.onnx",
        "int8",
        True,
    )
    foreign = Foreign(folder, info.model)
    assert foreign.probabilities(TEXTS) == pytest.approx(wanted(run, TEXTS), abs=0.1)
    assert foreign.config["transformers.js_config"] == {"dtype": "q8"}
    assert info.calibrated_on == "the run's rows"
    assert "| precision | int8, calibrated on the run's rows |" in (folder / "README.md").read_text(
        encoding="utf-8"
    )
    assert check_package(folder, threads=1).comparison.rows == info.comparison.rows


def test_int8_without_the_runs_rows_is_calibrated_on_the_shipped_texts(
    made: MakeRun, tmp_path: Path
) -> None:
    moved = tmp_path / "run"
    shutil.copytree(made("roberta").path, moved)
    record = json.loads((moved / "run.json").read_text(encoding="utf-8"))
    record["data"]["path"] = str(tmp_path / "gone")
    (moved / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert package(Run.read(moved), tmp_path, int8=True)[1].calibrated_on == "shipped texts"


def test_an_int8_package_is_not_compared_with_one_of_another_calibration(
    made: MakeRun, tmp_path: Path
) -> None:
    data, moved = tmp_path / "data", tmp_path / "run"
    shutil.copytree(made("roberta").path, moved)
    record = json.loads((moved / "run.json").read_text(encoding="utf-8"))
    shutil.copytree(record["data"]["path"], data)
    record["data"]["path"] = str(data)
    (moved / "run.json").write_text(json.dumps(record), encoding="utf-8")
    folder, _ = package(Run.read(moved), tmp_path, int8=True)
    train = data / "train.jsonl"
    train.write_text(
        train.read_text(encoding="utf-8").replace("good", "nice").replace("it", "that"),
        encoding="utf-8",
    )
    with pytest.raises(
        PackageError,
        match=(
            "was calibrated on the run's rows, here that would be on shipped texts; package "
            "the run again"
        ),
    ):
        check_package(folder, threads=1, run=moved)


# The folder


def test_what_loaders_read(demo: tuple[Run, Path, PackageInfo]) -> None:
    _, folder, info = demo
    foreign = Foreign(folder)
    assert foreign.config["architectures"] == ["BertForSequenceClassification"]
    assert foreign.config["id2label"] == {"0": "bad", "1": "great"}
    assert foreign.config["label2id"] == {"bad": 0, "great": 1}
    assert foreign.config["problem_type"] == "single_label_classification"
    assert foreign.configuration["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert foreign.configuration["model_input_names"] == ["input_ids", "attention_mask"]
    assert foreign.configuration["model_max_length"] == info.max_tokens + 1  # the mark
    assert {i.name: i.type for i in foreign.session.get_inputs()} == {
        "input_ids": "tensor(int64)",
        "attention_mask": "tensor(int64)",
    }
    assert [o.name for o in foreign.session.get_outputs()] == ["logits"]
    assert sorted(p.name for p in (folder / "onnx").iterdir()) == ["model.onnx"]


def test_no_text_can_hold_a_special_token(demo: tuple[Run, Path, PackageInfo]) -> None:
    tokenizer = Foreign(demo[1]).tokenizer
    contents = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    assert all(0xE000 <= ord(content[0]) <= 0xF8FF for content in contents)
    special = Bundle.read(demo[0].open_bundle().path).info.special
    assert not {special.mask, special.begin, special.end} & set(
        tokenizer.encode("[MASK] [CLS] [SEP]").ids
    )


def test_an_empty_text_is_not_an_empty_input(demo: tuple[Run, Path, PackageInfo]) -> None:
    assert len(Foreign(demo[1]).tokenizer.encode("").ids) == 1


@pytest.mark.parametrize(("name", "method"), [("roberta", "bbtv2"), ("gpt2", "bbtv2")])
def test_weights_are_in_a_package_once(
    made: MakeRun, tmp_path: Path, name: str, method: str
) -> None:
    import onnx

    run = made(name, method)
    folder, info = package(run, tmp_path)
    weights = sum(
        int(np.prod(t.dims))
        for t in onnx.load(folder / info.model).graph.initializer
        if np.prod(t.dims) > 300
    )
    from safetensors.numpy import load_file

    checkpoint = load_file(run.open_bundle().path / "model.safetensors").values()
    assert weights <= 1.05 * sum(value.size for value in checkpoint)


def test_weights_that_one_file_cannot_hold_are_beside_it(
    made: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bbt_accel.package.compose.LARGEST", 1000)
    run = made()
    folder, info = package(run, tmp_path / "onnx")
    assert {"onnx/model.onnx", "onnx/model.onnx_data"} <= info.sha256.keys()
    agrees(run, folder, info, TEXTS)
    found = {"dtype": "fp32", "use_external_data_format": True}
    assert json.loads((folder / "config.json").read_text())["transformers.js_config"] == found
    folder, info = package(
        run, tmp_path / "triton", format="triton"
    )  # which takes several files as a folder
    assert {
        "mood/1/model.onnx/model.onnx",
        "mood/1/model.onnx/model.onnx_data",
    } <= info.sha256.keys()
    agrees(run, folder, info, TEXTS)


def test_a_bundle_of_links_as_in_the_cache_of_the_hub_is_packaged(
    made: MakeRun, tmp_path: Path
) -> None:
    run = made()
    bundle = linked(run.open_bundle(), tmp_path)
    folder, info = package(run, tmp_path / "onnx", bundle=bundle.path)
    agrees(run, folder, info, TEXTS)


def test_the_card_names_what_a_result_rests_on(demo: tuple[Run, Path, PackageInfo]) -> None:
    run, folder, info = demo
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\npipeline_tag: text-classification\n")
    assert info.score is not None
    for part in (
        "bert", "bbt, add, 3 prompt tokens", "{text} It was {mask} .", "bad", "great",
        run.info.data.digest,
        f"{info.score.score:.4f}", f"{info.score.without_prompt:.4f}", f"{run.info.calls} calls",
        "ort", "onnxruntime",
        "bbt-accel package", "licence", info.comparison.digest,
    ):  # fmt: skip
        assert part in card
    assert str(run.path.parent.parent) not in (folder / "bbt_accel.json").read_text(
        encoding="utf-8"
    ).replace(info.command, "")


def test_a_licence_is_quoted_for_the_hub(demo: tuple[Run, Path, PackageInfo]) -> None:
    from huggingface_hub import ModelCard

    run, folder, info = demo
    for licence in ("other: see LICENSE", "mit\ntags: [x]"):
        record = run.info.model_copy(
            update={"bundle": run.info.bundle.model_copy(update={"license": licence})}
        )
        data = ModelCard(card.model_card(info, record, "", folder)).data
        assert (data.license, data.tags) == (licence, ["bbt-accel", "prompt-tuning"])


def test_the_licence_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    from bbt_accel.core.demo import BACKBONE
    from bbt_accel.exporters.families.checkpoint import license_of

    (tmp_path / "README.md").write_text(
        "---\nlanguage: en\nlicense: mit\n---\n# A model\n", encoding="utf-8"
    )
    assert license_of(tmp_path) == "mit"
    assert license_of(BACKBONE) == "apache-2.0"
    assert license_of("nobody/has-this") is None
    (tmp_path / "README.md").write_text(
        "---\nlicense: [apache-2.0, mit]\n---\n# A model\n", encoding="utf-8"
    )
    assert license_of(tmp_path) == "apache-2.0"


# The check


def test_check_repeats_the_comparison(demo: tuple[Run, Path, PackageInfo]) -> None:
    assert check_package(demo[1], threads=1) == demo[2]


def test_a_package_tells_no_path(demo: tuple[Run, Path, PackageInfo], shared: Path) -> None:
    run, folder, info = demo
    for file in (folder / "README.md", folder / "bbt_accel.json"):
        text = file.read_text(encoding="utf-8")
        assert not [
            p
            for p in (shared.name, run.path.parent.name, folder.parent.name, "..")
            if f"{p}/" in text
        ], file
    assert (info.run.name, info.bundle.name) == ("run", run.open_bundle().path.name)


def test_check_finds_the_run_near_the_package_or_is_told(made: MakeRun, tmp_path: Path) -> None:
    moved = tmp_path / "deep" / "est" / "here" / "run"
    shutil.copytree(made().path, moved)
    package_run(moved, tmp_path / "packages" / "demo", Options(threads=1))
    shutil.copytree(tmp_path / "packages", tmp_path / "runs")
    with pytest.raises(
        PackageError,
        match=r"was made from the run 'run' \(sha256 .*\), which is not near it.*--run",
    ):
        check_package(tmp_path / "runs" / "demo")
    with pytest.raises(PackageError, match=r"is not the run that .* was made from"):
        check_package(tmp_path / "runs" / "demo", run=made(readout="state").path)
    check_package(tmp_path / "runs" / "demo", threads=1, run=moved)
    shutil.move(moved, tmp_path / "runs" / "run")
    check_package(tmp_path / "packages" / "demo", threads=1)


def test_check_reads_what_the_page_reads(
    demo: tuple[Run, Path, PackageInfo], tmp_path: Path
) -> None:
    """The page takes the labels from bbt_accel.json."""
    shutil.copytree(demo[1], tmp_path / "copy")
    file = tmp_path / "copy" / "bbt_accel.json"
    swapped = json.loads(file.read_text(encoding="utf-8")) | {"labels": ["great", "bad"]}
    file.write_text(json.dumps(swapped), encoding="utf-8")
    for check in (check_package, lambda path: push(path, "me/mood")):
        with pytest.raises(
            PackageError, match=r"bbt_accel.json has been changed by hand \(sha256\)"
        ):
            check(tmp_path / "copy")
    file.write_text(
        json.dumps(swapped | {"facts": facts_digest(file.read_bytes())}), encoding="utf-8"
    )
    with pytest.raises(PackageError, match="has another labels than its run"):
        check_package(tmp_path / "copy", run=demo[0].path)


def test_check_refuses_an_added_file(demo: tuple[Run, Path, PackageInfo], tmp_path: Path) -> None:
    shutil.copytree(demo[1], tmp_path / "copy")
    (tmp_path / "copy" / ".gitattributes").write_text("")  # which the hub adds
    read_info(tmp_path / "copy")
    (tmp_path / "copy" / "onnx" / "model.onnx_data").write_text("")
    for check in (check_package, lambda path: push(path, "me/mood")):
        with pytest.raises(
            PackageError, match=r"onnx/model.onnx_data was added since the package was written"
        ):
            check(tmp_path / "copy")


@pytest.mark.parametrize("change", ["labels", "model", "score"])
def test_check_finds_what_somebody_else_has_sealed(
    demo: tuple[Run, Path, PackageInfo], tmp_path: Path, change: str
) -> None:
    folder = shutil.copytree(demo[1], tmp_path / "copy")
    info = read_info(folder)
    if change == "labels":
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["id2label"]["0"] = "another"
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    elif change == "model":
        shutil.copyfile(folder / info.model, folder / "onnx" / "other.onnx")
        info.model = "onnx/other.onnx"
    elif info.score is not None:
        info.score.score -= 0.5
        (folder / "README.md").write_text(
            card.model_card(info, demo[0].info, FORMATS["onnx"].usage, folder), encoding="utf-8"
        )
    write_info(folder, info)
    said = {
        "labels": "config.json is not what",
        "model": "names the model 'onnx/other.onnx'",
        "score": "states a test",
    }
    with pytest.raises(PackageError, match=said[change]):
        check_package(folder, threads=1, run=demo[0].path)


def test_the_card_names_the_file_that_transformers_js_loads(
    made: MakeRun, optimized: Export, tmp_path: Path
) -> None:
    run, bundle = made("gpt2", "bbt", "cat"), optimized(("gpt2", "bbt", "cat"), "fp16")
    folder, info = package(run, tmp_path, bundle=bundle.path)
    assert info.model == "onnx/model_fp16.onnx"
    assert '"transformers.js_config": {"dtype": "fp16"} });' in (folder / "README.md").read_text(
        encoding="utf-8"
    )


def test_check_finds_a_changed_file(demo: tuple[Run, Path, PackageInfo], tmp_path: Path) -> None:
    shutil.copytree(demo[1], tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(
        PackageError, match=r"tokenizer.json has changed .*sha256.*; package the run again"
    ):
        check_package(tmp_path / "copy")
    (tmp_path / "copy" / "config.json").unlink()
    with pytest.raises(PackageError, match=r"lacks config\.json"):
        check_package(tmp_path / "copy")


def test_a_graph_that_differs_from_predict_is_refused(made: MakeRun, tmp_path: Path) -> None:
    from bbt_accel.package.package import classifier_of

    run = made()
    with pytest.MonkeyPatch.context() as patch:
        changed = classifier_of(run, run.open_bundle())
        changed.prompt = changed.prompt + 1
        patch.setattr("bbt_accel.package.package.classifier_of", lambda *_: changed)
        with pytest.raises(
            PackageError, match=r"row \d+ \('.*'\) has scores that differ by .* in the package"
        ):
            package(run, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rows_with_other_token_ids_are_refused(made: MakeRun, tmp_path: Path) -> None:
    from bbt_accel.package.package import classifier_of

    run = made()
    with pytest.MonkeyPatch.context() as patch:
        changed = classifier_of(run, run.open_bundle())
        changed.layout = replace(
            changed.layout, pieces=dict.fromkeys(changed.layout.pieces, ((5,), (6, 4)))
        )
        patch.setattr("bbt_accel.package.package.classifier_of", lambda *_: changed)
        with pytest.raises(
            PackageError, match="has other token ids in the package than in predict"
        ):
            package(run, tmp_path)


# What cannot be packaged


@pytest.mark.parametrize(
    ("name", "task", "reason"),
    [
        (
            "bert",
            {"templates": {"masked": "so{text} {mask}"}},
            "a text has other tokens than alone",
        ),
        ("bert", {"templates": {"masked": "{text} {text} {mask}"}}, "has a text twice"),
        (
            "gpt2",
            {"templates": {"causal": "{text} {prompt} It was"}},
            r"has a text under the prompt; put \{prompt\}",
        ),
        (
            "bert",
            {"columns": ["a", "b", "c"], "templates": {"masked": "{a} {b} {c} {mask}"}},
            "3 text columns",
        ),
    ],
)
def test_a_template_that_no_graph_can_hold(
    made: MakeRun, tmp_path: Path, name: str, task: dict[str, Any], reason: str
) -> None:
    run = made(name, **task)
    with pytest.raises(PackageError, match=reason):
        package(run, tmp_path)
    assert not (tmp_path / "package").exists()


def test_a_template_without_room_for_a_text_is_refused(made: MakeRun) -> None:
    run = made()
    encoder = Encoder(run.open_bundle(), run.task)
    encoder.limit = len(encoder.tokens({"text": "it"})) - 2
    with pytest.raises(PackageError, match="leaves no room for its texts; shorten it"):
        find_layout(encoder)


def test_a_bundle_for_another_runtime_names_what_to_pass(made: MakeRun, tmp_path: Path) -> None:
    run = made()
    bundle = optimize_bundle(
        run.open_bundle().path, tmp_path / "bf16", target="torch", precision="bf16"
    )
    with pytest.raises(
        PackageError,
        match=r"is optimized for torch in bf16; pass one of onnx, ort .* with --bundle",
    ):
        package(run, tmp_path, bundle=bundle.path)


def test_nothing_is_replaced(demo: tuple[Run, Path, PackageInfo]) -> None:
    with pytest.raises(BbtError, match="exists already"):
        package_run(demo[0].path, demo[1], Options())


# Other formats


@pytest.mark.parametrize(
    ("name", "method", "mode", "int8", "readout"),
    [
        ("bert", "bbt", "add", False, "prototype"),
        ("gpt2", "bbtv2", "add", False, None),
        ("roberta", "bbt", "add", True, None),
    ],
)
def test_an_openvino_package_predicts_what_predict_does(
    made: MakeRun,
    tmp_path: Path,
    name: str,
    method: str,
    mode: str,
    int8: bool,
    readout: str | None,
) -> None:
    pytest.importorskip("openvino")
    run = made(name, method, mode, **({} if readout is None else {"readout": readout}))  # type: ignore[arg-type]
    folder, info = package(run, tmp_path, format="openvino", int8=int8)
    assert {
        "openvino_model.xml",
        "openvino_model.bin",
        "config.json",
        "tokenizer.json",
    } <= info.sha256.keys()
    assert in_openvino(folder, info) == pytest.approx(
        wanted(run, TEXTS + HARD), abs=0.1 if int8 else 1e-5
    )


def in_openvino(folder: Path, info: PackageInfo) -> Any:
    openvino = pytest.importorskip("openvino")
    foreign = Foreign.__new__(Foreign)
    foreign.read_texts(folder)
    model = openvino.Core().compile_model(
        folder / info.model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    return foreign.shares(model(foreign.feeds(TEXTS + HARD))["logits"])


def test_openvino_where_the_lm_head_reads_a_state_of_another_width(
    made: MakeRun, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    run = made("electra", readout="ensemble")
    bundle = optimize_bundle(run.open_bundle().path, tmp_path / "bundle", target="openvino").path
    folder, info = package(run, tmp_path, format="openvino", bundle=bundle)
    assert in_openvino(folder, info) == pytest.approx(wanted(run, TEXTS + HARD), abs=1e-5)


def test_a_triton_repository(made: MakeRun, tmp_path: Path) -> None:
    run = made()
    folder, info = package(run, tmp_path, format="triton")
    assert info.model == "mood/1/model.onnx"
    config = (folder / "mood" / "config.pbtxt").read_text(encoding="utf-8").splitlines()
    assert {"max_batch_size: 64", "dynamic_batching { }"} <= set(config), (
        "the axis of the rows is that of a batch"
    )
    assert 'input { name: "input_ids" data_type: TYPE_INT64 dims: [ -1 ] }' in config
    assert (
        'output { name: "logits" data_type: TYPE_FP32 dims: [ 2 ] label_filename: "labels.txt" }'
        in config
    )
    assert (folder / "mood" / "labels.txt").read_text(encoding="utf-8").splitlines() == info.labels
    assert "N up to 64;" in (folder / "README.md").read_text(encoding="utf-8")
    agrees(run, folder, info, TEXTS)


def test_tritons_own_reader_takes_the_configuration_of_a_package(
    made: MakeRun, tmp_path: Path
) -> None:
    pytest.importorskip(
        "tritonclient.grpc",
        reason="tritonclient and grpcio are not installed",
        exc_type=ImportError,
    )
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as model_config

    folder, _ = package(made(), tmp_path, format="triton")
    found = text_format.Parse(
        (folder / "mood" / "config.pbtxt").read_text(), model_config.ModelConfig()
    )
    assert found.HasField("dynamic_batching")
    assert (found.max_batch_size, found.output[0].label_filename) == (64, "labels.txt")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {}),
        ("llama", {"demonstrations": 2, "readout": "calibrated"}),
        ("t5-v1.1", {}),
        ("bart", {}),
    ],
)
def test_an_adapter_for_peft(
    made: MakeRun, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    pytest.importorskip("peft")
    run = made(name, "bbt", "cat", **options)
    folder, info = package(run, tmp_path, format="peft")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "PROMPT_TUNING"
    assert config["num_virtual_tokens"] >= 3
    front = (folder / "README.md").read_text(encoding="utf-8").split("---")[1]
    assert "base_model_relation: adapter\n" in front, (
        "the hub lists it under its backbone, with PEFT's snippet"
    )
    assert "library_name: peft\n" in front
    assert info.comparison.largest_error < 1e-5
    assert check_package(folder, threads=1) == info


@pytest.mark.parametrize("name", ["bart", "t5-v1.1", "llama"])
def test_the_code_on_an_adapters_card_predicts_what_predict_does(
    made: MakeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    pytest.importorskip("peft")
    run = made(name, "bbt", "cat", readout="calibrated")
    folder, _ = package(run, tmp_path, format="peft")
    code = (
        (folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    )
    monkeypatch.chdir(folder)
    exec(compile(code, "README.md", "exec"), {})
    printed = ast.literal_eval(capsys.readouterr().out.strip().splitlines()[-1])
    columns = dict.fromkeys(run.task.text, "a text")
    assert printed == pytest.approx(
        predict_texts(run.path, [columns], threads=1)[0]["probabilities"], abs=1e-4
    )


@pytest.mark.parametrize(
    ("name", "method", "mode", "readout", "reason"),
    [
        ("gpt2", "bbt", "add", "verbalizer", "the prompt is added to tokens.*--prompt-mode cat"),
        ("gpt2", "bbtv2", "add", "verbalizer", "bbtv2 adds a prompt in every layer"),
        ("roberta", "bbt", "cat", "verbalizer", "no prompt tuning for masked language models"),
        ("gpt2", "bbt", "cat", "state", "the readout state reads more than label words' logits"),
    ],
)
def test_what_peft_cannot_represent(
    made: MakeRun, tmp_path: Path, name: str, method: str, mode: str, readout: str, reason: str
) -> None:
    with pytest.raises(PackageError, match=f"this run cannot be an adapter: .*{reason}"):
        package(made(name, method, mode, readout=readout), tmp_path, format="peft")


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Archives like npm's, with other content, in place of those that npm fetches."""
    folder, archives, packages = tmp_path / "npm", [], []
    for own in web_page.PACKAGES:
        (folder / own.name / "package").mkdir(parents=True)
        for name in own.files:
            file = folder / own.name / "package" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("import a " + "; import b ".join(web_page.IMPORTS), encoding="utf-8")
        archive = folder / f"{len(archives)}.tgz"
        with tarfile.open(archive, "w:gz") as files:
            files.add(folder / own.name / "package", "package")
        archives.append(archive)
        packages.append(
            own.__class__(own.name, own.version, web_page.integrity(archive), own.files)
        )
    monkeypatch.setattr(web_page, "PACKAGES", tuple(packages))
    monkeypatch.setattr(web_page, "fetch", lambda place: archives)
    yield folder
    shutil.rmtree(folder)


def test_the_page_needs_no_file_of_another_host(made: MakeRun, npm: Path, tmp_path: Path) -> None:
    folder, info = package(made(), tmp_path, format="web")
    assert (folder / info.model).is_file()
    page, script = (
        (folder / name).read_text(encoding="utf-8") for name in ("index.html", "app.js")
    )
    for name in re.findall(r'(?:src|href)="([^":]+)"', page) + re.findall(
        r'from "\./([^"]+)"', script
    ):
        assert (folder / name).is_file(), name
    assert not re.search(r"https?://(?!www\.w3\.org)", page + script)
    library = (folder / "vendor" / "transformers.js").read_text(encoding="utf-8")
    assert library.count('from"./ort.js"') == 2
    assert "onnxruntime" not in library
    assert "Copyright (c) Microsoft" in (folder / "vendor" / "ort.LICENSE").read_text(
        encoding="utf-8"
    )
    assert check_package(folder, threads=1) == info


def test_the_file_names_of_older_npms_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["@huggingface/transformers-4.3.1.tgz", "huggingface-transformers-4.3.1.tgz"]
    answer = SimpleNamespace(
        returncode=0, stdout=json.dumps([{"filename": name} for name in names]), stderr=""
    )
    monkeypatch.setattr(web_page.shutil, "which", lambda name: name)
    monkeypatch.setattr(web_page.subprocess, "run", lambda *given, **options: answer)
    assert web_page.fetch(tmp_path) == [tmp_path / "huggingface-transformers-4.3.1.tgz"] * 2


def test_an_archive_with_another_hash_is_refused(made: MakeRun, npm: Path, tmp_path: Path) -> None:
    (npm / "1.tgz").write_bytes(b"other")
    with pytest.raises(
        PackageError, match=r"onnxruntime-web@.* has another sha512 than its release"
    ):
        package(made(), tmp_path, format="web")
    assert not (tmp_path / "package").exists()


# The command


def test_the_command_packages_and_checks(
    made: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder = made(), tmp_path / "package"
    for arguments in (
        [str(run.path), "-o", str(folder), "--max-rows", "2"],
        [str(folder), "--check"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(["package", *arguments, "--threads", "1", "--json"])
        assert ended.value.code == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["path"], found["kind"], found["max_rows"]) == (str(folder), "onnx", 2)


@pytest.mark.parametrize("arguments", [["run"], ["run", "-o", "x", "--check"]])
def test_the_command_takes_an_output_or_check(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["package", *arguments])
    assert ended.value.code == 2
    assert "give -o DIR to package a run, or --check" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["run", "-o", "x", "--run", "y"], "--run is for --check"),
        (
            ["x", "--check", "--max-rows", "3"],
            "--max-rows cannot be used with --check; the package fixes it",
        ),
        (["x", "--check", "--int8"], "--int8 cannot be used with --check"),
    ],
)
def test_options_of_packaging_and_of_the_check_are_not_mixed(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["package", *arguments])
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


# Rows and names


def test_held_out_rows_alone_are_test_rows(tiny: Export, tmp_path: Path) -> None:
    """Of a file that the search took its rows from; the card would give the score of rows that it
    was fitted on.
    """
    run = tuned(tiny("bert"), tmp_path, hold_out=True)
    info = package(run, tmp_path)[1]
    assert info.score is not None
    assert info.score.rows == 16 - 2 * 2 * 3
    assert info.score.score == evaluate(run.path, threads=1)["score"]


def test_labels_are_the_names_of_classes(tiny: Export, tmp_path: Path) -> None:
    run = tuned(tiny("bert"), tmp_path, classes=["0", "1"])
    folder, info = package(run, tmp_path)
    assert info.labels == ["0", "1"] != run.info.label_words
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"] == {
        "0": "0",
        "1": "1",
    }


def test_int8_is_made_of_the_bundle_that_the_runs_was_optimized_from(
    tiny: Export, tmp_path: Path
) -> None:
    place = tmp_path / "bundles"
    shutil.copytree(tiny("bert").path, place / "exported")
    run = tuned(optimize_bundle(place / "exported", place / "ort"), tmp_path)
    assert package(run, tmp_path, int8=True)[1].precision == "int8"

"""The Hugging Face hub, as a server on loopback: export a hub id, read a data set, push a run and
use it there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Export
from fake_hub import FakeHub, fake_hub
from search_parts import SETTINGS, search_bundle, task_file

from bbt_accel import tune
from bbt_accel.core.backbone_names import hub_id
from bbt_accel.core.bundle import Bundle
from bbt_accel.core.bundle import write_info as write_bundle_info
from bbt_accel.errors import BundleError, PackageError, RunError, UsageError
from bbt_accel.io.hub import fetched
from bbt_accel.package.push import portable, push
from bbt_accel.predict.inference import predict_texts
from bbt_accel.search.model_card import model_card
from bbt_accel.search.run import Run, write_info
from bbt_accel.tasks.data import Row
from bbt_accel.tasks.task import Context

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def cli(hub: FakeHub, tmp_path: Path) -> Cli:
    """`bbt-accel` in a process of its own, which knows the fake hub alone."""

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **hub.environment(tmp_path / "cache")}
        command = [sys.executable, "-m", "bbt_accel.cli.commands", *words]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
        )

    return call


@pytest.fixture
def run(tmp_path: Path) -> Run:
    bundle, task = search_bundle(tmp_path / "bundle"), task_file(tmp_path / "data")
    options = {
        "data": tmp_path / "data",
        "engine": "dummy",
        "progress": False,
        "settings": SETTINGS,
    }
    return tune(bundle, task, output=tmp_path / "run", **options)  # type: ignore[arg-type]


def test_a_pushed_run_works_from_the_hub(cli: Cli, hub: FakeHub, run: Run, tmp_path: Path) -> None:
    asked = cli("push", "run", "me/toy")
    assert (asked.returncode, hub.requests) == (
        2,
        [],
    )  # nothing leaves the machine unless confirmed
    assert "confirm with --yes" in asked.stderr
    done = cli("push", "run", "me/toy", "--yes")
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/me/toy/commit/" in done.stdout
    assert "use it as hf://me/toy" in done.stdout
    assert {token for _, _, token in hub.requests} == {"Bearer hf_fake"}
    pushed = tmp_path / "hub" / "models" / "me" / "toy"
    assert {p.name for p in run.path.iterdir()} | {"bundle"} == {p.name for p in pushed.iterdir()}
    for file in pushed.rglob("*"):
        assert file.is_dir() or str(tmp_path) not in file.read_text(encoding="latin-1"), file
    shutil.rmtree(tmp_path / "bundle")
    shutil.move(run.path, tmp_path / "gone")
    words = ("predict", "hf://me/toy", "w1 w2", "--json")
    found = json.loads(cli(*words).stdout)
    assert found["class"] in ("bad", "great")
    score = json.loads(cli("evaluate", "hf://me/toy", "--data", "data", "--json").stdout)
    assert score["rows"] == 70


def test_what_the_hub_refuses_is_one_line(cli: Cli, run: Run) -> None:
    for words in (("predict", "hf://me/none", "w1"), ("evaluate", "hf://me/none")):
        found = cli(*words)
        assert found.returncode == 1
        assert found.stderr.count("\n") == 1
        assert "cannot load hf://me/none (RepositoryNotFoundError" in found.stderr


def test_only_the_prefix_asks_the_hub() -> None:
    assert fetched("runs/sst2") == Path("runs/sst2")
    for wrong in ("hf://sst2", "hf://a/b/c", "hf://a/b@"):
        with pytest.raises(UsageError, match="is not hf://OWNER/NAME"):
            fetched(wrong)


def test_a_model_card_has_the_scores_and_the_licence(run: Run) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(run.path / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == (
        "bbt-accel",
        "text-classification",
        None,
    )
    assert "not stated by its checkpoint" in card.text
    assert run.info.best is not None
    assert f"| this classifier | {100 * run.info.best.dev_score:.1f} |" in card.text
    assert f"| chance | {50:.1f} |" in card.text
    bundle = run.info.bundle.model_copy(update={"license": "mit", "backbone": "owner/name"})
    other = ModelCard(model_card(run.info.model_copy(update={"bundle": bundle})))
    assert (other.data.license, other.data.base_model) == ("mit", "owner/name")
    odd = run.task.model_copy(
        update={"templates": {"masked": "a | b\n{text} {mask}", "span": None, "causal": None}}
    )
    assert r"| template | `a \| b\n{text} {mask}` |" in model_card(
        run.info.model_copy(update={"task": odd})
    )
    local = run.info.bundle.model_copy(update={"backbone": "/home/somebody/checkpoint"})
    assert "somebody" not in model_card(run.info.model_copy(update={"bundle": local}))


def test_a_model_card_says_what_is_in_front_of_every_row_of_a_decoder(run: Run) -> None:
    assert "before every row" not in model_card(run.info)
    of_decoder = {
        "context": Context(instruction="Topic?"),
        "templates": {"causal": "{text} {mask}"},
    }
    decoder = {
        "bundle": run.info.bundle.model_copy(update={"template_group": "causal"}),
        "task": run.task.model_copy(update=of_decoder),
        "demonstrations": [Row({"text": "a"}, 0)] * 4,
    }
    card = model_card(run.info.model_copy(update=decoder))
    assert "| before every row | 'Topic?', then 4 labelled train rows |\n| label words |" in card


def test_a_portable_copy_is_a_run(run: Run) -> None:
    with portable(run.path, run.open_bundle()) as copy:
        again = Run.read(copy)
        assert again.open_bundle().path == copy.absolute() / "bundle"
        assert again.info.data.path is None
    assert Run.read(run.path).info.data.path is not None


def test_a_link_out_of_a_run_is_not_uploaded(run: Run, tmp_path: Path) -> None:
    secret, card = tmp_path / "secret", run.path / "README.md"
    secret.write_text("my key")
    card.unlink()
    card.symlink_to(secret)
    with (
        pytest.raises(RunError, match=r"README.md is a link to .*secret; replace it"),
        portable(run.path),
    ):
        pass
    cached = tmp_path / "models--me--toy" / "snapshots" / "1" / "run"
    shutil.copytree(run.path, cached)  # follows the link
    blob = cached.parents[2] / "blobs" / "card"
    blob.parent.mkdir()
    shutil.move(cached / "README.md", blob)
    (cached / "README.md").symlink_to(blob)  # as the hub's cache has it
    with portable(cached) as copy:
        assert (copy / "README.md").read_text() == "my key"


# What nobody else should see

PRIVATE = ("alice", "gpu-host")
"""Parts of paths and addresses of this machine, in `private`."""


@pytest.fixture
def private(tmp_path: Path) -> Run:
    """A run of a local checkpoint, with the address of a server and TensorBoard's file, which has
    the host's name.
    """
    home = tmp_path / "alice"
    info = search_bundle(home / "bundle").info.model_copy(
        update={"backbone": str(home / "checkpoint")}
    )
    write_bundle_info(home / "bundle", info)
    options = {"data": home / "data", "engine": "dummy", "progress": False, "settings": SETTINGS}
    run = tune(home / "bundle", task_file(home / "data"), output=home / "run", **options)  # type: ignore[arg-type]
    engine = run.info.engine.model_copy(
        update={"url": "http://gpu-host:8000", "versions": {"url": "http://gpu-host"}}
    )
    write_info(run.path, run.info.model_copy(update={"engine": engine}))
    (run.path / "tensorboard").mkdir()
    (run.path / "tensorboard" / "events.out.tfevents.1.gpu-host").write_text("gpu-host")
    (run.path / "notes.txt").write_text("alice")
    return Run.read(run.path)


def tells_nothing(folder: Path, *private: str) -> None:
    for file in folder.rglob("*"):
        told = str(file.relative_to(folder)) + (
            file.read_text(encoding="latin-1") if file.is_file() else ""
        )
        assert not [name for name in (*PRIVATE, *private) if name in told], file


def test_a_pushed_run_tells_no_path_host_or_address(private: Run, tmp_path: Path) -> None:
    with portable(private.path, private.open_bundle()) as copy:
        tells_nothing(copy, str(tmp_path))
        again = Run.read(copy)
        assert again.open_bundle().info.backbone == again.info.bundle.backbone == "checkpoint"
    with portable(private.path) as copy:
        tells_nothing(copy, str(tmp_path))


def test_a_pushed_run_takes_a_local_bundle_of_its_backbone(private: Run, tmp_path: Path) -> None:
    with portable(private.path) as copy:
        local = tmp_path / "alice" / "bundle"
        assert Run.read(copy).open_bundle(local).path == local
        for backbone in ("/home/bob/another", "owner/checkpoint"):
            write_bundle_info(
                local, Bundle.read(local).info.model_copy(update={"backbone": backbone})
            )
            with pytest.raises(
                BundleError, match=f"has the backbone {backbone}, the prompt .* needs checkpoint"
            ):
                Run.read(copy).open_bundle(local)
    write_bundle_info(
        local, Bundle.read(local).info.model_copy(update={"backbone": "/home/bob/checkpoint"})
    )
    with pytest.raises(
        BundleError, match="has the backbone /home/bob/checkpoint"
    ):  # of that name, but another
        private.open_bundle(local)


def test_a_local_checkpoint_of_what_was_pushed_is_no_hub_id() -> None:
    assert hub_id("checkpoint", None) is None
    assert hub_id("roberta-large", "0123") == "roberta-large"


def test_a_pushed_run_or_classifier_is_used_by_its_address(
    cli: Cli, hub: FakeHub, private: Run, tmp_path: Path
) -> None:
    pytest.importorskip("sklearn")
    from bbt_accel import PromptClassifier

    engine = private.info.engine.model_copy(update={"url": None})
    write_info(private.path, private.info.model_copy(update={"engine": engine}))
    estimator = PromptClassifier.load(private.path)
    assert estimator.get_params()["backbone"] == str(tmp_path / "alice" / "checkpoint")
    assert set(estimator.predict(["w1 w2", "w3"])) <= {"bad", "great"}
    estimator.save(tmp_path / "saved")
    probabilities = estimator.predict_proba(["w1 w2"]).tolist()
    assert cli("push", str(private.path), "me/run", "--yes").returncode == 0
    assert "use it as hf://me/saved" in cli("push", "saved", "me/saved", "--yes").stdout
    tells_nothing(tmp_path / "hub", str(tmp_path))
    shutil.rmtree(tmp_path / "saved")
    shutil.rmtree(tmp_path / "alice")
    found = json.loads(cli("predict", "hf://me/saved", "w1 w2", "--json").stdout)
    assert list(found["probabilities"].values()) == pytest.approx(probabilities[0])
    script = (
        "from bbt_accel import PromptClassifier as P\n"
        "for name in ('run', 'saved'): print(P.load(f'hf://me/{name}').predict_proba(['w1 "
        "w2']).tolist())"
    )
    environment = {**os.environ, **hub.environment(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert json.loads(line)[0] == pytest.approx(probabilities[0], abs=1e-6)
    assert done.stdout.count("\n") == 2


def test_a_push_replaces_what_the_repository_held(
    cli: Cli, hub: FakeHub, run: Run, tmp_path: Path
) -> None:
    former = tmp_path / "hub" / "models" / "me" / "toy"
    (former / "run").mkdir(parents=True)
    for name in (
        "classifier.json",
        "run/run.json",
    ):  # by which it would be taken for a saved classifier
        (former / name).write_text("{}")
    assert cli("push", "run", "me/toy", "--yes").returncode == 0
    assert not (former / "classifier.json").exists()
    assert Run.read(former).prompt.tobytes() == run.prompt.tobytes()


def test_a_private_push_to_a_public_repository_uploads_nothing(
    cli: Cli, hub: FakeHub, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "hub" / "models" / "me" / "public").mkdir(parents=True)  # the fake hub's are public
    found = cli("push", "run", "me/public", "--yes", "--private")
    assert found.returncode == 1
    assert (
        found.stderr == "error: me/public exists and is public; make it private on the hub, "
        "or choose another name\n"
    )
    assert list((tmp_path / "hub" / "models" / "me" / "public").iterdir()) == []


def test_what_a_saved_classifier_needs_is_not_left_out(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from bbt_accel import PromptClassifier

    PromptClassifier.load(run.path).save(tmp_path / "saved")
    with pytest.raises(UsageError, match=r"needs its bundle; push .*run without it"):
        push(tmp_path / "saved", "me/saved", with_bundle=False)
    (tmp_path / "saved" / "classifier.json").write_text("{")
    with pytest.raises(RunError, match=r"classifier\.json cannot be read"):
        push(tmp_path / "saved", "me/saved")


def test_an_adapter_of_a_local_checkpoint_is_not_pushed(tmp_path: Path) -> None:
    from bbt_accel.package.push import check_base_model

    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"base_model_name_or_path": "owner/name", "revision": None}))
    check_base_model(file)
    for local in ("/home/alice/checkpoint", "checkpoint"):
        file.write_text(json.dumps({"base_model_name_or_path": local, "revision": None}))
        with pytest.raises(PackageError, match=f"the adapter is for {local}, which is no hub id"):
            check_base_model(file)


@pytest.mark.slow
def test_a_pushed_package_is_loaded_by_its_name(
    cli: Cli, hub: FakeHub, tmp_path: Path, tiny: Export
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    from package_parts import TEXTS, Foreign, tuned

    run = tuned(tiny("roberta"), tmp_path / "tuned")
    assert cli("package", str(run.path), "-o", "packaged", "--threads", "1").returncode == 0
    (tmp_path / "packaged" / ".env").write_text("TOKEN")  # which no file of the package is
    done = cli("push", "packaged", "me/mood", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["package"] == "me/mood"
    script = "import sys, huggingface_hub; print(huggingface_hub.snapshot_download(sys.argv[1]))"
    environment = {**os.environ, **hub.environment(tmp_path / "another cache")}
    fetch = [sys.executable, "-c", script, "me/mood"]
    folder = Path(
        subprocess.run(
            fetch, capture_output=True, text=True, env=environment, check=True
        ).stdout.strip()
    )
    tells_nothing(folder, str(tmp_path), ".env")
    found = Foreign(folder).probabilities(TEXTS)
    predicted = predict_texts(run.path, [{"text": text} for text in TEXTS], threads=1)
    wanted = [list(own["probabilities"].values()) for own in predicted]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    (tmp_path / "packaged" / "config.json").write_text("{}")
    refused = cli("push", "packaged", "me/mood", "--yes")
    assert (refused.returncode, "has changed since" in refused.stderr) == (1, True)


@pytest.mark.slow
def test_a_hub_id_is_exported_and_its_data_set_read(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tiny_backbones import save_recorded_backbone

    checkpoint = tmp_path / "hub" / "models" / "owner" / "tiny"
    save_recorded_backbone("roberta", checkpoint)
    (checkpoint / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Tiny\n")
    data = tmp_path / "hub" / "datasets" / "owner" / "rows"
    data.mkdir(parents=True)
    for split, count in (("train", 40), ("test", 12)):
        rows = (json.dumps({"text": f"text {i}", "label": i % 2}) for i in range(count))
        (data / f"{split}.jsonl").write_text("\n".join(rows))
    (tmp_path / "task.toml").write_text(
        'name = "rows"\ntext = "text"\nn_classes = 2\n[hub]\npath = "owner/rows"\n'
        '[templates]\nmasked = "{text} {mask}"\n[label_words]\nmasked = ["a", "b"]\n'
    )
    exported = cli(
        "export",
        "owner/tiny",
        "-o",
        "bundle",
        "--n-prompt-tokens",
        "5",
        "--revision",
        "main",
        "--json",
    )
    assert exported.returncode == 0, exported.stderr
    assert json.loads(exported.stdout)["license"] == "cc-by-4.0"
    words = [
        "tune",
        "--bundle",
        "bundle",
        "--task",
        "task.toml",
        "--budget",
        "1",
        "--k-shot",
        "4",
        "--set",
        "threads=1",
    ]
    tuned = cli(*words, "-o", "tuned", "--json")
    assert tuned.returncode == 0, tuned.stderr
    assert "license: cc-by-4.0" in (tmp_path / "tuned" / "README.md").read_text()
    assert "base_model: owner/tiny" in (tmp_path / "tuned" / "README.md").read_text()
    assert json.loads(cli("evaluate", "tuned", "--json").stdout)["rows"] == 12
